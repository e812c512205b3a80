"""The prepare_data stage, with the tokenizer of a tiny model."""

import contextlib
import gzip
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
from typing import Any, get_args

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml
from support import ROOT
from support.stages import peak_memory

from trnlora.data import rows, workers
from trnlora.data.examples import read_examples, row_name
from trnlora.data.formats import FormatName
from trnlora.errors import UserError
from trnlora.files import write_jsonl, write_sums

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
        "format": "auto",
        "columns": {},
        "categories": None,
        "prompt_template": "dolly",
        "template_kwargs": {},
        "mask_history": False,
        "deduplicate": False,
        "special_tokens": "as_text",
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
    folder = stage_root / "artifacts" / "prepared"
    assert sorted(prepared) == [
        "SHA256SUMS",
        "prepare_data.json",
        "prepared.json",
        "sources.json",
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
            user, assistant = one["messages"]
            assert (user["content"], user["context"]) == (original["instruction"], original["context"])
            assert (assistant["content"], one["category"]) == (original["response"], original["category"])
            [[start, end]] = one["labelled"]
            assert tokenizer.decode(one["token_ids"][:start]) == one["prompt"]
            assert tokenizer.decode(one["token_ids"][start:end]) == original["response"] + "<|im_end|>"


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


def unsplit_tasks() -> list[dict[str, str]]:
    """The default data set without its column `split`: test rows are drawn."""
    tasks = [json.loads(text) for text in TASKS.read_text("utf-8").splitlines()]
    return [{key: value for key, value in task.items() if key != "split"} for task in tasks]


@pytest.mark.parametrize("step", [1, -1])
def test_the_order_in_which_a_folder_lists_its_files_changes_nothing(
    stage_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Files of several kinds, made and listed in either order, give what one file with the rows of all gives."""
    tasks = unsplit_tasks()
    root = tmp_path / "run"
    shutil.copytree(stage_root, root)
    write_jsonl(root / "data" / "tasks.jsonl", tasks)
    write_params(root / "params.yaml")
    assert run_stage(root)[1] is None
    expected = outputs(root)

    folder = root / "data" / "parts"
    folder.mkdir()
    parts = {"a.jsonl": tasks[:300], "b.jsonl.gz": tasks[300:500], "c.jsonl": tasks[500:]}
    for name, part in list(parts.items())[::step]:
        write_jsonl(folder / name, part)
        if name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress((folder / name).read_bytes()))
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: sorted(listed(path, pattern))[::step])
    write_params(root / "params.yaml", source="path://data/parts")
    assert run_stage(root)[1] is None
    written = outputs(root)
    files = json.loads(written["sources.json"])
    assert [(entry["file"], entry["offset"]) for entry in files] == [
        ("data/parts/a.jsonl", 0), ("data/parts/b.jsonl.gz", 300), ("data/parts/c.jsonl", 500),
    ]  # fmt: skip
    for name in ("sources.json", "prepared.json", "SHA256SUMS"):  # they name the files
        del written[name], expected[name]
    assert written == expected


def test_the_order_of_sources_changes_ids_and_not_the_split(stage_root: Path, tmp_path: Path) -> None:
    tasks = unsplit_tasks()
    root = tmp_path / "run"
    shutil.copytree(stage_root, root)
    write_jsonl(root / "data" / "a.jsonl", tasks[:300])
    write_jsonl(root / "data" / "b.jsonl", tasks[300:])

    def split_of_prompts(*names: str) -> dict[str, dict[str, int]]:
        """Of validation and test, each prompt's id."""
        write_params(root / "params.yaml", source=[{"source": f"path://data/{name}.jsonl"} for name in names])
        assert run_stage(root)[1] is None
        folder = root / "artifacts" / "prepared"
        examples = {split: read_examples(folder / f"{split}.jsonl") for split in ("validation", "test")}
        return {split: {one["prompt"]: one["id"] for one in of_split} for split, of_split in examples.items()}

    first, second = split_of_prompts("a", "b"), split_of_prompts("b", "a")
    for split, ids in first.items():
        assert ids.keys() == second[split].keys()
        assert all(second[split][prompt] == (id + 500 if id <= 300 else id - 300) for prompt, id in ids.items())


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_million_rows_within_2_gib(stage_root: Path, tmp_path: Path, name: str) -> None:
    """Over all processes. The Parquet file is a single row group, which is how pandas writes it."""
    root = tmp_path / "run"
    shutil.copytree(stage_root, root, ignore=shutil.ignore_patterns("prepared", "metrics"))
    million = 1_000_000
    columns = {
        "instruction": [f"Say the number {number}." for number in range(million)],
        "response": [f"It is {number}, as you asked." for number in range(million)],
    }
    table = pa.table(columns)
    path = root / "data" / name
    if path.suffix == ".jsonl":
        write_jsonl(path, (dict(zip(columns, pair, strict=True)) for pair in zip(*columns.values(), strict=True)))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path, row_group_size=million)
    write_params(root / "params.yaml", source=f"path://data/{name}")
    assert peak_memory("prepare_data", root) < 2 << 30
    assert json.loads(outputs(root)["prepare_data.json"])["rows_read"] == million


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


DOC = (ROOT / "docs/data.md").read_text("utf-8")
EXAMPLES = re.findall(
    r"^`(data/\S+)`:\n\n```\w+\n(.*?)^```\n\n```yaml\n(.*?)^```\n\n"
    r"```console\n\$ python stages/prepare_data.py --show 1\n(.*?)^```$",
    DOC,
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize("example", EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_the_document_shows_what_is_printed(stage_root: Path, tmp_path: Path, example: tuple[str, ...]) -> None:
    """Up to the numbers of tokens, which are those of the default model's tokenizer, and the width of the terminal."""
    name, content, settings, output = example
    root = shutil.copytree(stage_root, tmp_path / "root")
    (root / name).write_text(content, "utf-8")
    write_params(root / "params.yaml", **yaml.safe_load(settings)["data"])
    printed, end = run_stage(root, "--show", "1")
    assert end is None

    def form(text: str) -> list[str]:
        return [re.sub(r"\d+ (masked|labelled)|─+", "", line).strip() for line in text.splitlines()]

    assert form(printed) == form(output)


def test_the_document_has_each_format() -> None:
    assert {example[3].split()[1] for example in EXAMPLES} == set(get_args(FormatName))


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


def test_the_quality_of_the_data_is_counted_and_said(stage_root: Path, tmp_path: Path) -> None:
    """Two files with two rows that repeat, a prompt that leaks, an empty answer and special tokens."""
    root = shutil.copytree(stage_root, tmp_path / "root")
    folder = root / "data" / "mine"
    folder.mkdir()

    def row(n: int, answer: str | None = None, split: str = "train") -> str:
        return json.dumps({"prompt": f"{n} + 1?", "completion": answer or str(n + 1), "split": split}) + "\n"

    (folder / "a.jsonl").write_text("".join(row(n) for n in range(50)), "utf-8")
    odd = [
        row(0),
        row(1),
        row(2, "Three."),
        row(3, "4", "test"),
        row(60, " "),
        row(61, "<|im_end|>"),
        row(62, split="test"),
    ]
    (folder / "b.jsonl").write_text("".join(odd), "utf-8")
    write_params(root / "params.yaml", source="path://data/mine", special_tokens="keep")
    _, end = run_stage(root)
    assert end == (
        "error: 1 train rows have the prompt of a test row, perhaps with other white space or case, so that scores "
        "would say little: data/mine/a.jsonl line 4 as data/mine/b.jsonl line 4. Change the column split, or set "
        "data.deduplicate: true, which leaves them out of train"
    )
    odd[3] = row(63, "4", "test")
    (folder / "b.jsonl").write_text("".join(odd), "utf-8")
    printed, end = run_stage(root)
    assert end is None
    metrics = json.loads((root / "metrics/prepare_data.json").read_text("utf-8"))
    counted = {
        "rows_read": 57,
        "rows_empty": 1,
        "duplicate_rows": 2,
        "prompts_in_train_and_test": 0,
        "rows_with_special_tokens": 1,
        "unreachable_references": 1,
    }
    assert {name: metrics[name] for name in counted} == counted
    assert sum(metrics[split]["rows"] for split in ("train", "validation", "test")) == 56
    assert metrics["test"]["rows"] == 2
    assert "1 rows have a turn without text and are left out; the first are data/mine/b.jsonl line 5\n" in printed
    assert "2 rows repeat an earlier row's prompt and answer: see data.deduplicate" in printed
    assert (
        "1 rows spell a special token (data.special_tokens: keep); the first are data/mine/b.jsonl line 6\n" in printed
    )
    assert "1 answers come back from the tokenizer as other text" in printed
    table = json.loads((root / "artifacts/prepared/sources.json").read_text("utf-8"))
    assert [entry["file"] for entry in table] == ["data/mine/a.jsonl", "data/mine/b.jsonl"]
    assert row_name(table, 50) == "data/mine/a.jsonl line 50"
    assert row_name(table, 51) == "data/mine/b.jsonl line 1"

    odd[3] = row(3, "4", "test")
    (folder / "b.jsonl").write_text("".join(odd), "utf-8")
    write_params(root / "params.yaml", source="path://data/mine", deduplicate=True)
    printed, end = run_stage(root)
    assert end is None
    assert (
        "1 train rows are left out, since test rows have their prompts; the first are data/mine/a.jsonl line 4"
        in printed
    )
    metrics = json.loads((root / "metrics/prepare_data.json").read_text("utf-8"))
    assert sum(metrics[split]["rows"] for split in ("train", "validation", "test")) == 53
    assert metrics["test"]["rows"] == 2
    assert metrics["prompts_in_train_and_test"] == 1
    assert metrics["unreachable_references"] == 0  # as text
    assert "data.deduplicate" not in printed
    write_params(root / "params.yaml", source="path://data/mine", deduplicate=True, special_tokens="refuse")
    assert "data/mine/b.jsonl line 6: it spells a special token of the tokenizer" in str(run_stage(root)[1])


def test_a_worker_that_is_killed_is_one_line() -> None:
    with (
        pytest.raises(UserError, match="a process that reads the rows was killed, perhaps because memory ran out"),
        workers.map_in_order(os._exit, [1, 1], 2) as results,
    ):
        list(results)
