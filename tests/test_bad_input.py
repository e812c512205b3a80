"""Tables of bad input: exit code 1, one line that names the problem, no traceback, no partial output, within 10 s.

The stages' `main` runs in this process, as with `python stages/….py`, but without the time for imports.
"""

import json
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT
from support.records import write_fetched, write_prepared_with, write_record, write_trained_with
from support.server import free_port

from trnlora.errors import run
from trnlora.files import write_json, write_jsonl, write_sums
from trnlora.model.config import ModelConfig
from trnlora.readers import read_json


class Bench:
    """A folder with params.yaml for the tiny Llama. A test breaks something in it and runs a stage."""

    def __init__(self, root: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self._model = model
        (root / "llama").symlink_to(model)
        self.params = yaml.safe_load((ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8"))
        self.params["model"] |= {"source": "path://llama", "sha256": None}
        self.params["data"] |= {"source": "path://rows.jsonl", "seq_len": 256}
        self.rows = [json.loads(line) for line in (ROOT / "data/tasks.jsonl").read_text("utf-8").splitlines()[:60]]
        monkeypatch.chdir(root)
        self._monkeypatch = monkeypatch
        self.patch_env(HF_TOKEN=None, HF_HUB_OFFLINE=None, VLLM_API_KEY=None)

    def patch_env(self, **values: str | None) -> None:
        for name, value in values.items():
            if value is None:
                self._monkeypatch.delenv(name, raising=False)
            else:
                self._monkeypatch.setenv(name, value)

    @cached_property
    def llama(self) -> Path:
        """The folder of model.source as a copy that may be damaged. Before, it is a link: most tests only read it."""
        (self.root / "llama").unlink()
        return Path(shutil.copytree(self._model, self.root / "llama"))

    def install_model(self) -> None:
        """Put the model where fetch_model writes it."""
        shutil.copytree(self._model, "artifacts/model")

    def write_rows(self, content: bytes | None = None) -> None:
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        Path("rows.jsonl").write_bytes(text.encode() if content is None else content)

    def write_params(self) -> None:
        Path("params.yaml").write_text(yaml.safe_dump(self.params), "utf-8")

    def refused(self, script: str, *arguments: str) -> str:
        """The error line with which the script ends."""
        outs = {path: path.stat().st_mtime_ns for path in Path().glob("artifacts/**/*")}
        main = runpy.run_path(str(ROOT / script))["main"]
        self._monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as end:
            run(main)
        line = end.value.code
        assert isinstance(line, str)
        assert line.startswith("error: ")
        assert "\n" not in line
        assert {path: path.stat().st_mtime_ns for path in Path().glob("artifacts/**/*")} == outs
        assert not list(Path().glob("**/.*.partial"))
        assert ".partial" not in line  # a folder that is gone
        return line


@pytest.fixture
def bench(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, tiny_llama, monkeypatch)


# params.yaml: every stage reads it first; fetch_model does so before any download

PARAMS: list[tuple[str, Any, str]] = [
    ("train.lr", "0.0001", "write it unquoted"),
    ("train.lr", -1.0, "train.lr"),
    ("train.lr", 0.0, "train.lr"),
    ("train.lr", float("nan"), "train.lr"),
    ("train.lr", float("inf"), "train.lr"),
    ("train.learning_rate", 1.0, "train.learning_rate is not a known key"),
    ("train.epochs", 0, "train.epochs"),
    ("train.epochs", 1.5, "train.epochs"),
    ("train.epochs", True, "train.epochs"),
    ("train.max_steps", -1, "max_steps: -1 is refused"),
    ("train.seed", -1, "train.seed"),
    ("train.schedule", "polynomial", "train.schedule"),
    ("train.decay_ratio", 0.0, "train.decay_ratio"),
    ("train.validate_every_steps", 0, "train.validate_every_steps"),
    ("train.keep", "lowest", "train.keep"),
    ("train.early_stopping_patience", 0, "train.early_stopping_patience"),
    ("train.loggers", ["comet"], "train.loggers"),
    ("train.loggers", "wandb", "train.loggers"),
    ("train.warmup_ratio", 1.1, "train.warmup_ratio"),
    ("train.global_batch_size", "8", "write it unquoted"),
    ("train.checkpoint_every_steps", 0, "train.checkpoint_every_steps"),
    ("train.threads", 0, "train.threads"),
    ("train.activation_checkpointing", "yes", "train.activation_checkpointing"),
    ("train", None, "train"),
    ("convert.tp_size", 5, "num_attention_heads % tp_size"),
    ("convert.tp_size", 0, "convert.tp_size"),
    ("convert.kv_size_multiplier", 2, "must be a multiple of kv_size_multiplier"),
    ("convert.hw_backend", "trn9", "convert.hw_backend"),
    ("lora.r", 0, "lora.r"),
    ("lora.lora_dropout", 1.0, "lora.lora_dropout"),
    ("lora.target_modules", ["lm_head"], "lora.target_modules"),
    ("lora.use_dora", True, "use_dora is not supported: DoRA needs"),
    ("data.seq_len", 4, "data.seq_len"),
    ("data.test_fraction", 0.95, "must be below 1"),
    ("data.prompt_template", "vicuna", "data.prompt_template"),
    ("model.source", "s3://bucket", "model.source"),
    ("model.source", "hf://org/name", "pin the revision"),
    ("model.source", "path:///nowhere", "there is no folder /nowhere"),
    ("model.sha256", "0" * 64, "write null"),
    ("model.dtype", "float8", "model.dtype"),
    ("lora.r", 513, "lora.r: Input should be less than or equal to 512"),
    ("train.seed", 2**32, "train.seed: Input should be less than"),
    ("data.seed", 2**64, "data.seed: Input should be less than"),
    ("train.threads", 10**6, "train.threads"),
    ("train.epochs", 10**12, "train.epochs"),
    ("train.epochs", -(10**400), "train.epochs"),
    ("train.dp_size", 10**9, "train.dp_size"),
    ("train.micro_batch_size", 10**12, "train.micro_batch_size"),
    ("train.max_grad_norm", 10**400, "train.max_grad_norm: Input should be a valid number"),
    ("convert.tp_size", 10**12, "convert.tp_size"),
    ("convert.buffer_mib", 10**9, "convert.buffer_mib"),
    ("data.seq_len", 10**12, "data.seq_len"),
    ("data.template_kwargs", {"a": float("inf")}, "data.template_kwargs"),
    ("data.prompt_template", "path://a\0b", "data.prompt_template: it holds a line break or another character"),
    ("data.source", "path://a\nb", "data.source: it holds a line break or another character"),
    ("model.source", "path://" + "a" * 5000, "model.source: it is longer than 4095 bytes"),
    ("eval.adapter", "path://a\x85b", "eval.adapter: it holds a line break or another character"),
    ("eval.max_tokens", 10**9, "eval.max_tokens"),
    ("neuron.python", " ", "neuron.python: it is empty"),
    ("neuron.compile_cache", "", "neuron.compile_cache: it is empty"),
    ("neuron.cc_flags", "-O1\n-O2", "neuron.cc_flags: it holds a line break or another character"),
    ("serve.max_num_seqs", 10**9, "serve.max_num_seqs"),
    ("serve.kv_cache_gib", 10**9, "serve.kv_cache_gib"),
    ("serve.host", "", "serve.host: it must be a host name or an address"),
    ("serve.host", "http://localhost", "serve.host: it must be a host name or an address"),
    ("serve.host", "localhost:80", "serve.host: it must be a host name or an address"),
    ("serve.host", "[::1]", "serve.host: it must be a host name or an address"),
    ("serve.host", "a..b", "serve.host: it must be a host name or an address"),
    ("serve.host", "a\0", "serve.host: it holds a line break or another character"),
    ("serve.port", 70000, "serve.port"),
    ("backend", "tpu", "backend"),
]


@pytest.mark.parametrize(("key", "value", "message"), PARAMS, ids=lambda value: str(value)[:30])
def test_params(bench: Bench, key: str, value: Any, message: str) -> None:
    section, _, name = key.partition(".")
    if name:
        bench.params[section][name] = value
    else:
        bench.params[section] = value
    bench.write_params()
    assert message in bench.refused("stages/fetch_model.py")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no keys"), (b"train: [", "not valid YAML"), (b"\xff\xfe\x00", "not valid YAML"), (b"- 1", "no keys")],
    ids=["empty", "broken", "binary", "list"],
)
def test_params_file(bench: Bench, content: bytes, message: str) -> None:
    Path("params.yaml").write_bytes(content)
    assert message in bench.refused("stages/fetch_model.py")


# Models: the files of an HF folder that fetch_model reads


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        (model / "config.json").write_text(json.dumps(read_json(model / "config.json") | changes), "utf-8")

    return edit


def truncate(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-100])


def break_weights(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def name_a_missing_shard(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def drop_eos(model: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).exists():
            kept = {key: value for key, value in read_json(model / name).items() if key != "eos_token"}
            (model / name).write_text(json.dumps(kept), "utf-8")


def drop_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    # More of each: tests/test_model_config.py, tests/test_safetensors_header.py, tests/test_model_files.py
    "no config": (lambda model: (model / "config.json").unlink(), "llama has no config.json"),
    "broken config": (lambda model: (model / "config.json").write_text("{"), "llama/config.json is not valid JSON"),
    "config of a wrong type": (
        edit_config(num_hidden_layers="2"),
        "llama/config.json: num_hidden_layers: Input should",
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "has no model.safetensors"),
    "truncated weights": (truncate, "where its header says"),
    "no safetensors": (
        lambda model: (model / "model.safetensors").write_bytes(b"PK"),
        "llama/model.safetensors is not a valid safetensors file",
    ),
    "NaN weights": (break_weights, "model.norm.weight holds NaN or Inf"),
    "missing shard": (
        name_a_missing_shard,
        "model-00001-of-00002.safetensors is missing, which its",
    ),
    "wrong architecture": (edit_config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    "quantized": (edit_config(quantization_config={"quant_method": "awq"}), "quantized"),
    "config without sizes": (
        edit_config(hidden_size=None),
        "hidden_size: Input should be a valid integer",
    ),
    "config of another model": (edit_config(hidden_size=384, head_dim=32), "of different models"),
    "more layers than weights": (edit_config(num_hidden_layers=5), "llama has no tensor model.layers.2"),
    "fewer layers than weights": (edit_config(num_hidden_layers=1), "llama: model.layers.1.input_layernorm.weight"),
    "more positions than the model": (edit_config(max_position_embeddings=1000), "serve.max_model_len 1024 is above"),
    "EOS beyond the vocabulary": (edit_config(eos_token_id=1536), "eos_token_id 1536 is not below vocab_size 1536"),
    "vocabulary": (edit_config(vocab_size=1530), "1530"),
    "no tokenizer": (drop_tokenizer, "tokenizer"),
    "broken tokenizer": (
        lambda model: (model / "tokenizer.json").write_text("{"),
        "llama/tokenizer.json is not valid JSON",
    ),
    "generation defaults": (
        lambda model: (model / "generation_config.json").write_text('{"top_p": 7}'),
        "llama/generation_config.json: top_p: Input should be less than or equal to 1",
    ),
    "no EOS": (drop_eos, "has no eos_token"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(bench: Bench, case: str) -> None:
    break_it, message = MODELS[case]
    break_it(bench.llama)
    bench.write_params()
    assert message in bench.refused("stages/fetch_model.py")


# Data: prepare_data on rows of this test

GOOD = json.dumps({"instruction": "Say it.", "context": "", "response": "it", "category": "talk"}).encode() + b"\n"

DATA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no rows"),
    "bad JSON": (GOOD + b"{\n", "line 2 is not valid JSON"),
    "not an object": (GOOD + b"[1]\n", "line 2 is not a JSON object"),
    "missing column": (GOOD + b'{"instruction": "a"}\n', "line 2 has no column"),
    "non-string": (GOOD + GOOD.replace(b'"it"', b"7"), "line 2: response must be a string"),
    "null": (GOOD + GOOD.replace(b'"it"', b"null"), "line 2: response must be a string"),
    "empty responses": (2 * GOOD.replace(b'"it"', b'" "'), "all 2 rows have a turn without text"),
    "invalid UTF-8": (GOOD + b'{"instruction": "\xff"}\n', "line 2 is not valid UTF-8"),
    "one row": (GOOD, "no rows are left for the"),
    "1 MB responses": (
        b"".join(
            GOOD.replace(b"Say it.", f"Say {n}.".encode()).replace(b'"it"', b'"' + b"word " * 200_000 + b'"')
            for n in range(4)
        ),
        "rows exceed data.seq_len",
    ),
    "deep": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(bench: Bench, case: str) -> None:
    content, message = DATA[case]
    bench.write_rows(content)
    bench.install_model()
    bench.write_params()
    assert message in bench.refused("stages/prepare_data.py")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ["no such"]}, "no row has no such"),
        ({"categories": []}, "the list is empty"),
        ({"seq_len": 8}, "rows exceed data.seq_len 8"),
        ({"sha256": "0" * 64}, "but data.sha256 pins"),
        ({"source": "path://absent.jsonl"}, "data.source: there is no absent.jsonl; path:// is relative to"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_data_params(bench: Bench, changes: dict[str, Any], message: str) -> None:
    bench.params["data"] |= changes
    bench.write_rows()
    bench.install_model()
    bench.write_params()
    assert message in bench.refused("stages/prepare_data.py")


# Outputs of earlier stages: damaged, missing or of another run


def adapter_of(bench: Bench) -> list[Path]:
    """Write the shards of an adapter for the tiny Llama, tp 3."""
    import torch

    from trnlora.model.targets import adapter_tensors, nxd_adapter_config, rank_shapes
    from trnlora.params import Params
    from trnlora.weights.storage import LORA_TAG, rank_file, save_rank

    params = Params.model_validate(bench.params)
    folder = Path("artifacts/lora_adapter")
    table = adapter_tensors(ModelConfig.from_folder(Path("artifacts/model")), params.lora)
    shapes = rank_shapes(table, 3, params.convert.kv_size_multiplier)
    files = [rank_file(folder, LORA_TAG, rank) for rank in range(3)]
    for file in files:
        save_rank(file, {name: torch.full(shape, 0.5) for name, shape in shapes.items()})
    write_json(folder / "adapter_config.json", nxd_adapter_config(params.lora))
    return files


def change(index: int, edit: Callable[[dict[str, Any]], Any]) -> Callable[[list[Path]], None]:
    def apply(files: list[Path]) -> None:
        import torch

        tensors = torch.load(files[index], weights_only=True)
        edit(tensors)
        torch.save(tensors, files[index])

    return apply


A = "model.layers.0.self_attn.qkv_proj.lora_A.weight"
B = "model.layers.0.self_attn.qkv_proj.lora_B.weight_q"

ADAPTERS: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "missing rank": (lambda files: files[1].unlink(), "tp_rank_01_pp_rank_00.pt is missing"),
    "extra file": (lambda files: shutil.copy(files[0], files[0].with_name("more.pt")), "more.pt does not belong"),
    "truncated": (lambda files: files[2].write_bytes(files[2].read_bytes()[:999]), "tp_rank_02_pp_rank_00.pt"),
    "another rank's config": (
        lambda files: (files[0].parents[2] / "adapter_config.json").write_text('{"r": 4}'),
        "adapter_config.json",
    ),
    "replica mismatch": (change(1, lambda tensors: tensors[A].add_(1)), "differs between ranks 0 and 1"),
    "another shape": (change(0, lambda tensors: tensors.update({B: tensors[B][:1].clone()})), "has shape (1, 16)"),
    "NaN": (change(0, lambda tensors: tensors[B].fill_(float("nan"))), "holds NaN or Inf"),
    "not tensors": (lambda files: files[0].write_bytes(b"junk"), "cannot be read"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(bench: Bench, case: str) -> None:
    break_it, message = ADAPTERS[case]
    bench.install_model()
    bench.write_params()
    break_it(adapter_of(bench))
    write_fetched(Path())
    Path("metrics/finetune_lora.json").write_text('{"validation_loss": 1.0}')
    Path("artifacts/prepared").mkdir()
    Path("artifacts/prepared/validation.jsonl").write_text("")
    write_prepared_with(Path("artifacts/prepared"))
    write_trained_with(Path())
    write_sums(Path("artifacts/lora_adapter"))  # with correct checksums: wrong, but not damaged
    assert message in bench.refused("stages/flatten_adapter.py")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("stage", "damaged"),
    [
        ("prepare_data", "model/tokenizer.json"),
        ("convert_nxd", "model/model.safetensors"),
        # finetune_lora: see tests/test_finetune.py
        ("flatten_adapter", "model/model.safetensors"),
        ("flatten_adapter", "prepared/validation.jsonl"),
        ("flatten_adapter", "lora_adapter/lora/model/dp_rank_00_tp_rank_01_pp_rank_00.pt"),
        ("flatten_adapter", "lora_adapter/training.json"),
        ("flatten_adapter", "prepared/prepared.json"),
        ("flatten_adapter", "prepared/sources.json"),
        ("eval_vllm", "model/model.safetensors"),
        ("eval_vllm", "prepared/prepared.json"),
        ("eval_vllm", "prepared/validation.jsonl"),
        ("eval_vllm", "prepared/test.jsonl"),
        ("eval_vllm", "adapter/adapter_model.safetensors"),
        ("eval_vllm", "adapter/trnlora.json"),
    ],
)
def test_a_flipped_byte_is_found_by_the_stage_that_reads_it(bench: Bench, stage: str, damaged: str) -> None:
    from safetensors.torch import save_file

    from trnlora.params import Params
    from trnlora.weights.peft_export import peft_adapter, peft_adapter_config
    from trnlora.weights.storage import load_rank

    bench.install_model()
    bench.write_rows()
    bench.write_params()
    artifacts, params = Path("artifacts"), Params.model_validate(bench.params)
    shards = [load_rank(file) for file in adapter_of(bench)]
    (artifacts / "adapter").mkdir()
    adapter = peft_adapter(shards, ModelConfig.from_folder(Path("artifacts/model")), params.convert, params.lora)
    save_file(adapter, artifacts / "adapter/adapter_model.safetensors")
    write_json(artifacts / "adapter/adapter_config.json", peft_adapter_config(params.lora, params.model.source))
    examples = [
        {
            "id": 1,
            "category": "talk",
            "messages": [{"role": "user", "content": "A", "context": ""}, {"role": "assistant", "content": "B"}],
            "prompt": "A",
            "token_ids": [1, 2],
            "labelled": [[1, 2]],
        }
    ]
    for split in ("validation", "test"):
        write_jsonl(artifacts / f"prepared/{split}.jsonl", examples)
    write_prepared_with(artifacts / "prepared")
    write_trained_with(Path())
    write_sums(artifacts / "lora_adapter")
    write_record(artifacts / "adapter", artifacts / "model", prepared=artifacts / "prepared")
    write_sums(artifacts / "adapter", artifacts / "adapter.SHA256SUMS")
    write_fetched(Path())
    write_json(Path("metrics/finetune_lora.json"), {"validation_loss": 1.0})
    write_json(Path("metrics/flatten_adapter.json"), {"peft_validation_loss": 1.0})

    flip_a_byte(artifacts / damaged)
    line = bench.refused(f"stages/{stage}.py")
    assert f"artifacts/{damaged} is damaged" in line
    assert "run `dvc repro -f " in line


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("stages/prepare_data.py", "artifacts/model has no tokenizer"),
        ("stages/convert_nxd.py", "artifacts/model/config.json is missing"),
        ("stages/finetune_lora.py", "artifacts/model/config.json is missing"),
        ("stages/flatten_adapter.py", "artifacts/model/config.json is missing"),
        ("stages/eval_vllm.py", "artifacts/prepared is missing"),
        ("tools/serve.py", "artifacts/adapter is missing"),
    ],
)
def test_a_stage_without_the_one_before(bench: Bench, script: str, message: str) -> None:
    bench.params["serve"]["port"] = free_port()
    bench.write_rows()
    bench.write_params()
    assert message in bench.refused(script)


# The environment


def test_port_in_use(bench: Bench) -> None:
    bench.write_params()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "in use" in bench.refused("tools/serve.py", "--port", port)


def test_listening_for_other_machines_needs_a_key(bench: Bench) -> None:
    bench.write_params()
    assert "set VLLM_API_KEY" in bench.refused("tools/serve.py", "--host", "0.0.0.0")


def test_a_directory_where_a_file_is_expected(bench: Bench) -> None:
    Path("params.yaml").mkdir()
    assert "params.yaml is a directory where" in bench.refused("stages/fetch_model.py")


@pytest.mark.parametrize("stage", ["fetch_model", "prepare_data", "convert_nxd"])
def test_no_space_left(bench: Bench, tiny_llama: Path, stage: str) -> None:
    """artifacts/ is a small disk of its own. What was there before stays as it was."""
    bench.write_params()
    bench.write_rows()
    disk = Path("artifacts")
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one: run as root")
    try:
        if stage != "fetch_model":
            (disk / "model").symlink_to(tiny_llama)
        (disk / "model.safetensors").write_bytes(b"1" * 30_000)
        assert re.search("no space left on the disk|its disk has 0.0 GiB free", bench.refused(f"stages/{stage}.py"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the error still holds open files
