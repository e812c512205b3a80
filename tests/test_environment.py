"""The environment and what makes it: lock file, Makefile, doctor. Nothing here installs a package."""

import ast
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from support import ROOT

from trnlora import requirements
from trnlora.profiles import load_profile, profile_text


def doctor(*arguments: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/doctor.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """requirements.* read the files of the working directory."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def make(tmp_path: Path) -> "Make":
    return Make(tmp_path)


class Make:
    """`make` on this Makefile in a folder of its own, with nothing of the caller's make in its environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (
            "Makefile",
            "pyproject.toml",
            "requirements.lock",
            "params.yaml",
        ):
            shutil.copyfile(ROOT / name, root / name)
        for name in ("tools", "profiles"):
            shutil.copytree(ROOT / name, root / name)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *arguments]
        return subprocess.run(command, cwd=self.root, env=self.env | env, capture_output=True, text=True)


def test_the_lock_pins_every_requirement_with_a_hash() -> None:
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    locked = requirements.locked()
    for name, specifier in requirements.group("dev").items():
        assert SpecifierSet(specifier).contains(locked[name]), f"{name}{specifier} is locked as {locked[name]}"
    assert not re.search(r"^torch==", lock, re.M)  # installed on its own
    for block in re.split(r"^(?=\S)", lock, flags=re.M)[1:]:
        assert "--hash=sha256:" in block, block
    assert not re.search(r"^(nvidia-cu|torchvision|torchaudio|torchcodec)", lock, re.M)


def test_what_the_code_imports_is_required() -> None:
    """In the groups themselves, and not only because another package wants it too."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.split() if not name.startswith("tests/neuron/")]
    imported = set()
    for name in files:
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    providers = packages_distributions()
    required = requirements.group("dev").keys() | {"trnlora"}
    found = {name: {requirements.normalized(provider) for provider in providers.get(name, [])} for name in imported}
    assert found["yaml"] == {"pyyaml"}
    assert not {name: by for name, by in found.items() if by and not by & required}


def test_the_neuron_environment_gets_the_locks_versions() -> None:
    """`uv pip install --group neuron` in AWS's environment: what this project is tested with, to the version."""
    locked = requirements.locked()
    neuron = requirements.group("neuron")
    assert neuron == {name: f"=={locked[name]}" for name in neuron}
    assert not {"torch", *requirements.left_out()} & neuron.keys()


def test_nothing_of_the_cuda_build_is_installed() -> None:
    installed = {found.name.lower(): found.version for found in distributions()}
    assert requirements.left_out() == ["torchvision", "torchaudio", "torchcodec"]
    assert not set(requirements.left_out()) & installed.keys()
    assert not [name for name in installed if name.startswith("nvidia-cu")]
    assert installed["torch"].endswith("+cpu")


def test_help_names_every_target(make: Make) -> None:
    (declared,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for arguments in ((), ("help",)):
        shown = re.findall(r"^  make ([\w-]+) +\S", make.run(*arguments).stdout, re.M)
        assert shown == declared.split()


def test_profile_is_written(make: Make) -> None:
    (make.root / ".venv").symlink_to(sys.prefix)
    made = "--old-file=.venv/.ready"  # or it would be made again, for the copies of what it depends on are newer
    done = make.run(made, "profile", "NAME=llama3-8b-trn2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("params.yaml is now profiles/llama3-8b-trn2.yaml; 'git diff params.yaml' shows")
    written = (make.root / "params.yaml").read_text("utf-8")
    assert written == profile_text("llama3-8b-trn2", ROOT / "profiles")
    for arguments in (("profile",), ("profile", "NAME=no-such"), ("profile", "NAME=../params")):
        done = make.run(made, *arguments)
        assert done.returncode != 0
        assert "use NAME= with one of llama3-70b-trn2 llama3-8b-trn1 llama3-8b-trn2" in done.stderr
    assert (make.root / "params.yaml").read_text("utf-8") == written
    shown = make.run("-n", made, "plan", "PROFILE=llama3-8b-trn2").stdout
    assert shown == "python tools/plan.py --profile 'llama3-8b-trn2' \n"


def test_a_wrong_python_is_named(make: Make) -> None:
    done = make.run("setup", "PYTHON=/bin/false")
    assert done.returncode != 0
    assert "error: Python 3.11 is needed and /bin/false is not that" in done.stderr
    assert not (make.root / ".venv").exists()


@pytest.mark.slow
def test_a_setup_that_fails_is_not_taken_for_done(make: Make) -> None:
    """An installer that cannot be had: one line says so, and the next call starts over."""
    (make.root / "requirements.lock").write_text(f"uv==0.0.1 \\\n    --hash=sha256:{'0' * 64}\n", "utf-8")
    for _ in range(2):
        done = make.run("setup", f"PYTHON={sys.executable}", PIP_NO_INDEX="1", PIP_FIND_LINKS="/nowhere")
        assert done.returncode != 0
        assert "uv==0.0.1" in done.stderr
        assert not (make.root / ".venv/.ready").exists()


def test_doctor_passes_here() -> None:
    done = doctor("--repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_doctor_tells_what_is_wrong(tmp_path: Path) -> None:
    """A project whose lock, DVC lock, divisors, memory and port are all wrong: a line each, and exit 1."""
    import socket

    params = yaml.safe_load((ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8"))
    params["convert"]["tp_size"] = 5
    params["train"]["dp_size"] = params["train"]["global_batch_size"] = 100_000
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    (tmp_path / "requirements.lock").write_text(lock.replace("\ndvc==", "\ndvc==0.", 1), "utf-8")
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/tmp/rwlock").write_text('{"half": ', "utf-8")
    source = params["model"]["source"]
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/fetch_model.json").write_text(f'{{"source": "{source}", "weights_gib": 0.5}}', "utf-8")
    (tmp_path / "artifacts/model").mkdir(parents=True)
    config = '{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, '
    config += '"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}'
    (tmp_path / "artifacts/model/config.json").write_text(config, "utf-8")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    git = [
        "git",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@example.com",
        "commit",
        "-q",
        "--allow-empty",
        "-m",
        ".",
    ]
    subprocess.run(git, cwd=tmp_path, check=True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        params["serve"]["port"] = taken.getsockname()[1]
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
        done = doctor(cwd=tmp_path)
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    assert len(wrong) == 5, done.stdout
    for line, part in zip(
        wrong,
        [
            "run `make setup`",
            "rwlock is unreadable",
            "num_attention_heads % tp_size",
            "of memory available",
            "cannot bind",
        ],
        strict=True,
    ):
        assert part in line
    assert "mend the lines with ✗" in done.stderr


def test_doctor_on_the_trn2_profile_says_what_this_machine_lacks() -> None:
    done = doctor("--profile", "llama3-8b-trn2", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert re.search(r"^✗ backend nxd lacks the Neuron driver .*; neuron.python /opt/aws", done.stdout, re.M)
    assert re.search(r"^✗ cannot reach the hub", done.stdout, re.M)
    assert re.search(r"^✓ HF_TOKEN is", done.stdout, re.M)
    assert re.search(r"^. [\d.]+ GiB of memory available, about 12[34]\b", done.stdout, re.M)  # 2 · 15 · dp 2 + 64


@pytest.mark.parametrize(
    ("devices", "size", "cores"),
    [
        ([{"nc_count": 4, "logical_neuroncore_config": 2}] * 16, 2, 64),  # a trn2.48xlarge as it comes
        ([{"nc_count": 4, "logical_neuroncore_config": 2}] * 16, 1, 128),
        ([{"nc_count": 2}] * 16, 1, 32),  # a trn1.32xlarge
    ],
)
def test_doctor_counts_the_cores_of_the_run(
    devices: list[dict[str, int]], size: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("doctor", ROOT / "tools/doctor.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tool = tmp_path / "neuron-ls"
    tool.write_text(f"#!/bin/sh\necho '{json.dumps(devices)}'\n", "utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    params = load_profile("llama3-8b-trn2", ROOT / "profiles")
    neuron = params.neuron.model_copy(update={"logical_core_size": size})
    assert module.neuron_cores(params.model_copy(update={"neuron": neuron})) == cores


def test_doctor_and_plan_start_without_torch() -> None:
    """`make repro` calls doctor each time: what imports torch takes seconds."""
    code = "import sys; import doctor, plan; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_metrics_table_without_metrics(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/show_metrics.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: there are no metrics yet: run `make repro`\n"


class Osv(http.server.BaseHTTPRequestHandler):
    """OSV's query, with one vulnerability that it knows."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.asked.append(name)
        affected = [{"package": query["package"], "versions": [query["version"]]}]
        found = {"id": "OSV-2026-1", "summary": "Bad", "affected": affected, "modified": "2026-01-01T00:00:00Z"}
        body = json.dumps({"vulns": [found]} if name == "vllm" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_audit_asks_for_all_that_is_installed_and_names_what_it_finds() -> None:
    command = [sys.executable, str(ROOT / "tools/audit.py"), "--osv-url"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = subprocess.run([*command, url], cwd=ROOT, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 1
    assert re.search(r"^vllm +[\d.]+ +OSV-2026-1", done.stdout, re.M), done.stdout + done.stderr
    assert done.stderr.startswith("error: Found 1 known vulnerability in 1 package: raise")
    assert sorted(Osv.asked) == sorted([*requirements.locked(), "vllm"])

    done = subprocess.run([*command, url], cwd=ROOT, capture_output=True, text=True)  # nobody listens any more
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: no audit without {url}")
