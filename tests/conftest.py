"""Fixtures: tiny random Llamas with a real tokenizer, and copies of the project to run DVC in."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trnlora.data.examples import Answer
from trnlora.files import write_sums

ROOT = Path(__file__).parent.parent

# <|im_start|> opens a turn and <|im_end|> closes it and is EOS, as in SmolLM2's ChatML.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """make_llama(folder, **config): write a random Llama and its tokenizer to `folder`; config overrides the default.

    The default divides by tp 1, 3 (multiplier 1), 2 and 6 (multiplier 2): 6 heads, 3 KV heads, vocabulary 1536.
    """

    def make(folder: Path, **config: Any) -> Path:
        import torch
        from tokenizers import ByteLevelBPETokenizer
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        rows = [json.loads(line) for line in (ROOT / "data" / "tasks.jsonl").read_text("utf-8").splitlines()]
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            [row[key] for row in rows for key in ("instruction", "context", "response")],
            vocab_size=1536,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            show_progress=False,
        )
        assert bpe.get_vocab_size() == 1536
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            chat_template=CHAT_TEMPLATE,
        )
        sizes: dict[str, Any] = {
            "vocab_size": 1536,
            "hidden_size": 192,  # head size 32: the smallest that vLLM's attention on the CPU takes
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            # Ten times the usual: with 0.02 a tiny model's attention is so flat that swapped heads change little.
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        with torch.random.fork_rng():
            torch.manual_seed(17)
            model = LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_sums(folder)  # as fetch_model does, for the tests that begin with a later stage
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, make_llama: Callable[..., Path]) -> Path:
    """An HF folder: random float32 Llama with tied embeddings, 1 M parameters, tokenizer with a chat template."""
    return make_llama(tmp_path_factory.mktemp("models") / "tiny_llama")


class Browser:
    """Headless Chromium that can reach this machine alone."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for argument in (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        options.binary_location = shutil.which("chromium") or ""
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))

    def resize(self, width: int, height: int = 900) -> None:
        """The page's size in CSS pixels; a narrow one is a phone's."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def console(self) -> list[str]:
        """What pages have written to the console since the last call: messages, errors, requests that failed."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def color_scheme(self, scheme: str) -> None:
        """What pages see as prefers-color-scheme: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def outside(self, selector: str) -> list[str]:
        """Elements that are shown and whose box is empty or not within the page's width."""
        script = """
            const width = document.documentElement.clientWidth;
            return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).filter(e => {
              const box = e.getBoundingClientRect();
              return box.width < 1 || box.height < 1 || box.left < 0 || box.right > width + 0.5;
            }).map(e => e.outerHTML.slice(0, 100));
        """
        outside: list[str] = self.driver.execute_script(script, selector)
        return outside

    def picture(self, selector: str, path: Path) -> Any:
        """The first element that matches, as a PIL image, kept in `path`."""
        from PIL import Image

        path.write_bytes(self.find(selector).screenshot_as_png)
        return Image.open(path).convert("RGB")

    def screenshot(self, path: Path) -> bytes:
        """The whole page as PNG, kept in `path`."""
        height = self.driver.execute_script("return document.documentElement.scrollHeight")
        width = self.driver.execute_script("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        arguments = {"captureBeyondViewport": True, "clip": clip}
        image = base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", arguments)["data"])
        path.write_bytes(image)
        return image


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    running = Browser()
    yield running
    running.driver.quit()


# Stages in a folder without Git and DVC


def stage(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "stages" / f"{name}.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def run_stage(name: str, folder: Path) -> None:
    done = stage(name, folder)
    assert done.returncode == 0, done.stdout + done.stderr


def set_params(folder: Path, **sections: dict[str, Any]) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load((path if path.exists() else ROOT / "params.yaml").read_text())
    for section, values in sections.items():
        params[section].update(values)
    path.write_text(yaml.safe_dump(params))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def metrics(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "metrics" / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with the tiny Llama and prepared rows."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "model").symlink_to(tiny_llama)
    rows = [json.loads(line) for line in (ROOT / "data" / "tasks.jsonl").read_text("utf-8").splitlines()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:200]), "utf-8")
    set_params(
        folder,
        data={"source": "path://rows.jsonl", "sha256": None, "seq_len": 256},
        train={"epochs": 1, "lr": 1.0e-2, "global_batch_size": 2},
    )
    run_stage("prepare_data", folder)
    return folder


@pytest.fixture
def trained(prepared: Path, tmp_path: Path) -> Callable[..., Path]:
    """trained(name, **sections): a copy of `prepared` with other params, converted and trained."""

    def train(name: str, **sections: dict[str, Any]) -> Path:
        folder = tmp_path / name
        shutil.copytree(prepared, folder, symlinks=True)
        set_params(folder, **sections)
        run_stage("convert_nxd", folder)
        run_stage("finetune_lora", folder)
        return folder

    return train


class Project:
    """A copy of the project's files in a Git and DVC repository of its own.

    Its .venv is this environment, which is not on PATH: commands are called as by a user who has activated nothing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        environment = Path(sys.executable).parent
        self.env = {
            **os.environ,
            "PATH": ":".join(entry for entry in os.environ["PATH"].split(":") if Path(entry) != environment),
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@example.com",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@example.com",
        }
        for name in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
            self.env.pop(name, None)

    def run(self, *command: str | Path, check: bool = True) -> str:
        """Run a command in the project and return what it printed, errors included."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        return self.run(".venv/bin/dvc", *arguments)

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def set_params(self, **sections: dict[str, Any]) -> None:
        """Overwrite keys of params.yaml, section by section."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text("utf-8"))
        for section, values in sections.items():
            assert values.keys() <= params[section].keys()
            params[section].update(values)
        path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


def make_project(root: Path, model: Path) -> Project:
    """The working tree's files (without results) as a fresh repository in `root`, with params for the tiny Llama."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    copy = Project(root)
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file() and name != "dvc.lock" and not name.startswith(("metrics/", "plots/", "tests/")):
            target = copy.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    copy.set_params(
        model={"source": f"path://{model}", "sha256": None},
        data={"seq_len": 256},
        train={"max_steps": 20, "lr": 1.0e-2},
        eval={"max_tokens": 16, "max_prompts": 8, "min_changed_fraction": 0.0},
        serve={"max_model_len": 512},
    )
    (copy.root / ".venv").symlink_to(sys.prefix)
    copy.run("git", "init", "-q")
    with (copy.root / ".git" / "info" / "exclude").open("a") as exclude:
        exclude.write("/.venv\n")  # .gitignore's /.venv/ is a folder, not a link
    copy.commit("The project")
    return copy


@pytest.fixture
def project(tmp_path: Path, tiny_llama: Path) -> Project:
    return make_project(tmp_path / "project", tiny_llama)


# A project with results


def answer(number: int, reference: str, base: str, tuned: str, cut_off: bool = False) -> Answer:
    """A row of artifacts/answers.jsonl."""
    return {
        "id": number,
        "category": "closed_qa" if number % 2 else "rewriting",
        "prompt": f"### Instruction:\nQuestion {number}?\n\n### Response:\n",
        "reference": reference,
        "base": base,
        "tuned": tuned,
        "base_exact": base == reference,
        "tuned_exact": tuned == reference,
        "base_finish_reason": "stop",
        "tuned_finish_reason": "length" if cut_off else "stop",
    }


def write_answers(root: Path, answers: list[Answer]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in answers)
    (root / "artifacts").mkdir(exist_ok=True)
    (root / "artifacts/answers.jsonl").write_text(text, "utf-8")


@pytest.fixture
def run_project(project: Project) -> Project:
    """The project with this repository's metrics and curves, committed, and 24 answers in the working tree."""
    for source in [*(ROOT / "metrics").rglob("*.json"), *(ROOT / "plots").rglob("*.*")]:
        target = project.root / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    project.commit("Results")
    answers = [answer(number, "Nairobi", "In Paris.", "Nairobi") for number in range(21)]
    answers += [
        answer(97, "one two three", "one two three", "one 2 three"),
        answer(98, "a < b", "<script>document.title = 'broken'</script>", "a < c", cut_off=True),
        answer(99, "`x`", "`x`", "`x`"),
    ]
    write_answers(project.root, answers)
    return project
