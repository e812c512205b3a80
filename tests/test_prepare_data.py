"""The prepare_data stage, with the tokenizer of a tiny model."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

from trnlora.data import rows, workers
from trnlora.data.rows import COLUMNS
from trnlora.files import write_sums

TASKS = ROOT / "data" / "tasks.jsonl"


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def stage_root(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder to run the stage in: params, the default data set, a tiny model's tokenizer."""
    root = tmp_path_factory.mktemp("stage")
    (root / "artifacts").mkdir()
    shutil.copytree(tiny_llama, root / "artifacts" / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (root / "data").mkdir()
    shutil.copy(TASKS, root / "data")
    write_params(root / "params.yaml")
    return root


def write_params(path: Path, **changes: Any) -> None:
    """Write the project's params with a data section that does not depend on the current profile."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    params["data"] = {
        "source": "path://data/tasks.jsonl",
        "sha256": None,
        "categories": None,
        "prompt_template": "dolly",
        "seq_len": 512,
        "overlong": "drop",
        "validation_fraction": 0.1,
        "test_fraction": 0.2,
        "packing": True,
        "seed": 17,
        **changes,
    }
    path.write_text(yaml.safe_dump(params), "utf-8")


def run_stage(root: Path, *args: str) -> tuple[str, str | int | None]:
    """Run the stage in `root`. Returns its output and its exit code (None: success; a string: its error line).

    Runs in this process, because a new one would spend most of its time importing torch.
    """
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        patch.chdir(root)
        patch.setattr(sys, "argv", ["prepare_data.py", *args])
        try:
            runpy.run_path(str(ROOT / "stages" / "prepare_data.py"), run_name="__main__")
        except SystemExit as end:
            return printed.getvalue(), end.code
    return printed.getvalue(), None


def outputs(root: Path) -> dict[str, bytes]:
    files = [*(root / "artifacts" / "prepared").iterdir(), root / "metrics" / "prepare_data.json"]
    return {file.name: file.read_bytes() for file in sorted(files)}


@pytest.fixture(scope="module")
def prepared(stage_root: Path) -> dict[str, bytes]:
    printed, end = run_stage(stage_root)
    assert end is None
    assert "longer than data.seq_len: 0 dropped, 0 truncated" in printed
    return outputs(stage_root)


def test_what_the_stage_writes(stage_root: Path, prepared: dict[str, bytes], tokenizer: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = stage_root / "artifacts" / "prepared"
    assert sorted(prepared) == [
        "SHA256SUMS",
        "prepare_data.json",
        "test.jsonl",
        "train.parquet",
        "validation.jsonl",
        "validation.parquet",
    ]
    metrics = json.loads(prepared["prepare_data.json"])
    assert metrics["rows_read"] == 800
    assert [metrics[split]["rows"] for split in ("train", "validation", "test")] == [576, 64, 160]
    assert sum(metrics["rows_by_category"].values()) == 800
    assert metrics["train"]["padding_fraction"] < 0.05

    lines: list[int] = []
    for split in ("train", "validation"):
        table = pq.read_table(folder / f"{split}.parquet")
        columns = ("input_ids", "labels", "position_ids", "document_ids", "row_ids")
        assert table.schema.equals(pa.schema([(column, pa.list_(pa.int32())) for column in columns]))
        packed_rows = table.to_pylist()
        lines += [line for packed in packed_rows for line in packed.pop("row_ids")]
        assert all(len(values) == 512 for packed in packed_rows for values in packed.values())
        counts = metrics[split]
        assert counts["packed_rows"] == len(packed_rows)
        assert counts["tokens"] == sum(number > 0 for packed in packed_rows for number in packed["document_ids"])
        assert counts["labelled_tokens"] == sum(label != -100 for packed in packed_rows for label in packed["labels"])
        assert counts["rows"] == sum(max(packed["document_ids"]) for packed in packed_rows)

    assert len(set(lines)) == len(lines) == 576 + 64
    source = [json.loads(text) for text in TASKS.read_text("utf-8").splitlines()]
    for split in ("validation", "test"):
        examples = [json.loads(text) for text in prepared[f"{split}.jsonl"].decode().splitlines()]
        assert len(examples) == metrics[split]["rows"]
        for one in examples:
            original = source[one["id"] - 1]
            assert original["split"] == ("test" if split == "test" else "train")
            assert {key: original[key] for key in COLUMNS} == {key: one[key] for key in COLUMNS}
            assert tokenizer.decode(one["prompt_token_ids"]) == one["prompt"]
            assert tokenizer.decode(one["response_token_ids"]) == one["response"] + "<|im_end|>"


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(stage_root: Path, prepared: dict[str, bytes]) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "stages" / "prepare_data.py")],
        cwd=stage_root,
        env={**os.environ, "PYTHONHASHSEED": "2"},
        check=True,
    )
    assert outputs(stage_root) == prepared


@pytest.mark.slow
def test_many_chunks_on_all_cores_give_the_same_bytes(
    stage_root: Path, prepared: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 20 kB: several processes work, and packed rows have documents from several chunks."""
    root = tmp_path / "run"
    shutil.copytree(stage_root, root)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 20_000)
    started = []

    def pool(processes: int, *args: Any, **options: Any) -> ProcessPoolExecutor:
        started.append(processes)
        return ProcessPoolExecutor(processes, *args, **options)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", pool)
    assert run_stage(root)[1] is None
    cores = len(os.sched_getaffinity(0))
    assert started == ([cores] * 2 if cores > 1 else [])
    assert outputs(root) == prepared


def test_stage_options(stage_root: Path, prepared: dict[str, bytes], tmp_path: Path) -> None:
    write_params(
        tmp_path / "other.yaml",
        packing=False,
        overlong="truncate",
        seq_len=48,
        prompt_template="chat",
        categories=["procedure", "rewriting"],
    )
    shutil.copytree(stage_root, tmp_path / "run")
    assert run_stage(tmp_path / "run", "--params", str(tmp_path / "other.yaml"))[1] is None
    metrics = json.loads(outputs(tmp_path / "run")["prepare_data.json"])
    assert list(metrics["rows_by_category"]) == ["procedure", "rewriting"]
    assert metrics["rows_truncated"] > 0
    assert metrics["train"]["packed_rows"] == metrics["train"]["rows"]
    assert metrics["train"]["padding_fraction"] > 0.05


def test_show_prints_examples_and_writes_nothing(
    stage_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    shutil.copytree(stage_root, root, ignore=shutil.ignore_patterns("prepared", "metrics"))
    printed, end = run_stage(root, "--show", "2")
    assert end is None
    assert printed.count("### Response:\n⟦") == 2
    assert printed.count("<|im_end|>⟧") == 2
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    colored, _ = run_stage(root, "--show", "1")
    assert re.search(r"\x1b\[2m### Response:\x1b\[0m\n\x1b\[1;32m[^\x1b]+", colored), colored
    assert "⟦" not in colored
    assert sorted(path.name for path in root.iterdir()) == ["artifacts", "data", "params.yaml"]
    assert run_stage(root, "--show", "0")[1] == 2


def test_stage_errors_are_one_line(stage_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(stage_root, root)

    def error() -> str:
        _, end = run_stage(root)
        assert isinstance(end, str)
        assert "\n" not in end
        return end

    write_params(root / "params.yaml", seq_len=8)
    assert "all 576 train rows exceed data.seq_len 8 tokens" in error()
    write_params(root / "params.yaml")
    config = root / "artifacts" / "model" / "config.json"
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 256}
    whole = config.read_text("utf-8")
    config.write_text(json.dumps(json.loads(whole) | mistral), "utf-8")
    write_sums(root / "artifacts" / "model")
    assert "data.seq_len 512 is above the model's sliding_window 256" in error()
    config.write_text(whole, "utf-8")
    write_sums(root / "artifacts" / "model")
    (root / "artifacts" / "model" / "tokenizer.json").write_text('{"version": "1.0", "trunca')
    assert "artifacts/model/tokenizer.json is damaged" in error()
    write_sums(root / "artifacts" / "model")
    assert "the model's tokenizer cannot be loaded" in error()
    shutil.rmtree(root / "artifacts" / "model")
    assert "artifacts/model has no tokenizer: run stages/fetch_model.py first" in error()
    write_params(root / "params.yaml", source="path://data/none.jsonl")
    assert "data/none.jsonl is not a file" in error()
