"""Reading, splitting, tokenizing and packing rows, and the stage prepare_data on a tiny model's tokenizer."""

import contextlib
import http.server
import io
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trnlora.data import rows as data
from trnlora.data import templates
from trnlora.errors import UserError
from trnlora.files import sha256, write_sums

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "data" / "tasks.jsonl"


def line(**changes: Any) -> bytes:
    """One good row as JSON with some columns changed; None removes a column."""
    values = {"instruction": "Say it.", "context": "", "response": "it", "category": "talk", **changes}
    return json.dumps({key: value for key, value in values.items() if value != "absent"}).encode()


def row(number: int, category: str = "talk", split: str | None = None, prompt: int | None = None) -> data.Row:
    return data.Row(number, f"Say {number if prompt is None else prompt}.", "", f"It is {number}.", category, split)


def keys(rows: Iterable[data.Row], seed: int = 17) -> list[data.Key]:
    return [data.key(one, seed) for one in rows]


def packed_rows(examples: list[data.Example], *options: Any) -> list[dict[str, list[int]]]:
    rows = data.pack(examples, [len(one) for one in examples], *options)
    return [{column: values.tolist() for column, values in packed.items()} for packed in rows]


def example(tokens: Iterator[int], prompt: int, response: int) -> data.Example:
    prompt_ids, response_ids = [next(tokens) for _ in range(prompt)], [next(tokens) for _ in range(response)]
    return data.Example(row(1), "", prompt_ids, response_ids)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


# Reading


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"instruction": ', r"line 2 is not valid JSON \(.* at column 16\)"),
        (b'{"instruction": "\xff"}', "line 2 is not valid UTF-8 .* at byte 17"),
        (b'["a"]', "line 2 is not a JSON object with the columns instruction, context, response, category"),
        (b"[" * 100_000, r"line 2 is not valid JSON \(nested too deeply\)"),
        (line(context="absent"), r"line 2 has no column 'context'"),
        (line(response=["it"]), r'line 2: response must be a string, it is \["it"\]'),
        (line(context=None), "line 2: context must be a string, it is null"),
        (line(response=" \n"), "line 2: response is empty"),
        (line(category=""), "line 2: category is empty"),
        (line(response="\ud800"), "line 2: response holds half of a surrogate pair"),
        (line(split="dev"), 'line 2: split must be train or test, it is "dev"'),
        (line(split=None), "line 2: split must be train or test, it is null"),
        (line(split="test"), "line 1 has no column 'split', but other lines do"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line() + b"\n" + bad + b"\n" + line() + b"\n")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} {message}"):
        data.read_keys(path, seed=17)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_file_without_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no rows"):
        data.read_keys(path, seed=17)


def test_what_editors_and_texts_bring_along_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # U+2028 is a line end for str.splitlines, but not in JSON Lines.
    text = json.dumps(
        {"instruction": " a\u2028b\n", "context": "", "response": "한국어", "category": "c", "id": 7},
        ensure_ascii=False,
    )
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n" + line())
    rows = data.read_rows(path)
    assert rows == [data.Row(1, "a\u2028b", "", "한국어", "c", None), data.Row(3, "Say it.", "", "it", "talk", None)]


def test_path_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in" / "rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(line())
    monkeypatch.chdir(tmp_path)
    assert data.fetch(f"path://{path}", None) == path
    assert data.fetch("path://in/rows.jsonl", sha256(path)) == Path("in/rows.jsonl")
    with pytest.raises(UserError, match=rf"rows.jsonl has sha256 {sha256(path)}, but data.sha256 pins 000"):
        data.fetch("path://in/rows.jsonl", "0" * 64)
    for missing in ("path://rows.jsonl", "path://in"):
        with pytest.raises(UserError, match=rf"is not a file; path:// is relative to {tmp_path}"):
            data.fetch(missing, None)


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    """The three requests of the Hugging Face Hub that a download makes; `.files` are those of every data set.

    org/gated wants the token `let-me-in`, as gated repositories do.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "org/gated/" in self.path and self.headers["Authorization"] != "Bearer let-me-in":
                self.answer(403, b"gated", {"X-Error-Code": "GatedRepo"})
            elif re.match(r"/api/datasets/org/\w+/revision/v1$", self.path):
                self.answer(200, json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": []}).encode())
            elif re.match(rf"/api/datasets/org/\w+/tree/{'a' * 40}", self.path):
                files = self.server.files.items()  # type: ignore[attr-defined]
                tree = [{"type": "file", "path": name, "size": len(f), "oid": "b" * 40} for name, f in files]
                self.answer(200, json.dumps(tree).encode())
            elif found := re.match(rf"/datasets/org/\w+/resolve/{'a' * 40}/(.+)$", self.path):
                content = self.server.files[found[1]]  # type: ignore[attr-defined]
                self.answer(200, content, {"ETag": '"' + "b" * 40 + '"', "X-Repo-Commit": "a" * 40})
            else:
                self.answer(404, b"no such revision", {"X-Error-Code": "RevisionNotFound"})

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {"README.md": b"# rows", "rows.jsonl": line() + b"\n"}  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch_in_a_process(source: str, port: int, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """data.fetch with the hub's address in the environment, from where huggingface_hub reads it at import."""
    code = (
        "import sys\nfrom trnlora import data\nfrom trnlora.errors import run\n"
        "run(lambda: print(data.fetch(sys.argv[1], None)))"
    )
    unset = ("HF_TOKEN", "HF_HUB_OFFLINE")
    base = {key: value for key, value in os.environ.items() if key not in unset}
    return subprocess.run(
        [sys.executable, "-c", code, source],
        env={**base, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_hub_source(tmp_path: Path, hub: Any) -> None:
    done = fetch_in_a_process("hf://org/name@v1", hub.server_port, tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.name == "rows.jsonl"
    assert data.read_rows(path)[0].response == "it"


@pytest.mark.parametrize(
    ("source", "token", "message"),
    [
        ("hf://org/name", "", "must have the form hf://org/name@revision"),
        ("hf://org/name@v2", "", "org/name has no revision v2"),
        ("hf://org/gated@v1", "", "org/gated is gated: accept its terms at .*/datasets/org/gated and set HF_TOKEN"),
        ("hf://org/gated@v1", "let-me-in", ""),
    ],
)
def test_what_the_hub_refuses_is_one_line(tmp_path: Path, hub: Any, source: str, token: str, message: str) -> None:
    done = fetch_in_a_process(source, hub.server_port, tmp_path, **({"HF_TOKEN": token} if token else {}))
    if message:
        assert done.returncode == 1
        assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr), done.stderr
    else:
        assert done.returncode == 0, done.stderr
    assert "let-me-in" not in done.stdout + done.stderr


def test_a_hub_data_set_of_several_files(tmp_path: Path, hub: Any) -> None:
    hub.files = {"a.jsonl": line(), "more/b.jsonl": line()}
    done = fetch_in_a_process("hf://org/name@v1", hub.server_port, tmp_path)
    assert done.returncode == 1
    assert "must hold one .jsonl file, it holds a.jsonl, b.jsonl" in done.stderr


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        port = server.server_port  # free again, and so refusing connections, when the block ends
    done = fetch_in_a_process("hf://org/name@v1", port, tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"error: cannot reach the hub at .*\n", done.stderr), done.stderr


# Choosing and splitting


def test_categories() -> None:
    rows = keys([row(1, "talk"), row(2, "list"), row(3, "talk")])
    assert data.keep_categories(rows, None) == rows
    assert [kept.id for kept in data.keep_categories(rows, ["talk"])] == [1, 3]
    with pytest.raises(UserError, match=r"^data\.categories: no row has lists, tlak; the rows have list, talk$"):
        data.keep_categories(rows, ["talk", "tlak", "lists"])
    with pytest.raises(UserError, match="the list is empty; null keeps all; the rows have list, talk"):
        data.keep_categories(rows, [])


@given(
    prompts=st.lists(st.integers(0, 40), min_size=12, max_size=60).filter(lambda prompts: len(set(prompts)) >= 8),
    seed=st.integers(0, 5),
    shuffled=st.randoms(use_true_random=False),
)
def test_a_drawn_split(prompts: list[int], seed: int, shuffled: random.Random) -> None:
    rows = keys((row(number, prompt=prompt) for number, prompt in enumerate(prompts)), seed)
    splits = data.split_rows(rows, 0.2, 0.25)
    # Each row once, in the order of the file.
    assert sorted(member.id for members in splits.values() for member in members) == list(range(len(rows)))
    assert all(members == sorted(members, key=lambda member: member.id) for members in splits.values())
    # No prompt in two splits, and the fractions are those of different prompts.
    of = {name: {prompts[member.id] for member in members} for name, members in splits.items()}
    assert not of["train"] & of["test"] | of["train"] & of["validation"] | of["validation"] & of["test"]
    different = len(set(prompts))
    assert len(of["test"]) == max(1, round(0.2 * different))
    assert len(of["validation"]) == max(1, round(0.25 * (different - len(of["test"]))))
    # The order of the rows does not matter.
    shuffled.shuffle(rows)
    again = data.split_rows(rows, 0.2, 0.25)
    assert {name: {member.id for member in members} for name, members in splits.items()} == {
        name: {member.id for member in members} for name, members in again.items()
    }


def test_the_seed_changes_what_is_drawn() -> None:
    rows = [row(number) for number in range(50)]
    splits = [data.split_rows(keys(rows, seed), 0.2, 0.2) for seed in (0, 0, 1)]
    drawn = [{name: [member.id for member in members] for name, members in one.items()} for one in splits]
    assert drawn[0] == drawn[1]
    assert drawn[0]["test"] != drawn[2]["test"]
    assert drawn[0]["validation"] != drawn[2]["validation"]


def test_a_column_split_is_respected() -> None:
    rows = keys(row(number, split="test" if number % 3 == 0 else "train") for number in range(30))
    splits = data.split_rows(rows, 0.9, 0.1)
    assert [member.id for member in splits["test"]] == list(range(0, 30, 3))
    assert len(splits["validation"]) == 2


def test_a_split_without_rows() -> None:
    with pytest.raises(UserError, match="2 rows leave none for test"):
        data.split_rows(keys([row(1, split="train"), row(2, split="train")]), 0.2, 0.1)
    with pytest.raises(UserError, match="1 rows leave none for train"):
        data.split_rows(keys([row(1)]), 0.2, 0.1)


# Tokenizing


def test_an_example_is_prompt_and_response_with_eos(tokenizer: Any) -> None:
    rows = data.read_rows(TASKS)[:50]
    examples, overlong = data.encode(rows, tokenizer, "dolly", 512, "drop")
    assert overlong == data.Overlong(0, 0)
    for one, its in zip(examples, rows, strict=True):
        assert one.row == its
        assert one.prompt == templates.render_prompt(tokenizer, "dolly", its.instruction, its.context)
        assert tokenizer.decode(one.prompt_ids + one.response_ids) == one.prompt + its.response + tokenizer.eos_token
        assert one.response_ids.count(tokenizer.eos_token_id) == 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(8, 40))
@settings(deadline=None)
def test_overlong_rows(tokenizer: Any, prompt: int, response: int, seq_len: int) -> None:
    one = data.Row(1, "a " * prompt, "", "b " * response, "talk", None)
    [whole], _ = data.encode([one], tokenizer, "dolly", 10_000, "drop")
    fits, prompt_fits = len(whole) <= seq_len, len(whole.prompt_ids) < seq_len

    dropped, counts = data.encode([one], tokenizer, "dolly", seq_len, "drop")
    assert dropped == ([whole] if fits else [])
    assert counts == data.Overlong(dropped=not fits)

    cut, counts = data.encode([one], tokenizer, "dolly", seq_len, "truncate")
    assert counts == data.Overlong(dropped=not prompt_fits, truncated=prompt_fits and not fits)
    if prompt_fits:
        assert len(cut[0]) == min(seq_len, len(whole))
        assert cut[0].prompt_ids == whole.prompt_ids
        assert cut[0].response_ids == whole.response_ids[: seq_len - len(whole.prompt_ids)]
        assert cut[0].row == one  # the reference text stays whole
    else:
        assert cut == []


# Packing

PACKABLE = st.integers(2, 40).flatmap(
    lambda seq_len: st.tuples(
        st.just(seq_len),
        st.lists(
            st.integers(2, seq_len).flatmap(
                lambda total: st.integers(1, total - 1).map(lambda prompt: (prompt, total - prompt))
            ),
            min_size=1,
            max_size=40,
        ),
    )
)


@given(PACKABLE, st.booleans(), st.integers(0, 3))
def test_packing_keeps_every_document_whole(sizes: tuple[int, list[tuple[int, int]]], packing: bool, seed: int) -> None:
    seq_len, lengths = sizes
    pad = 0
    tokens = iter(range(1, 10_000))  # every token occurs once, so a document is known by any of its tokens
    examples = [example(tokens, prompt, response) for prompt, response in lengths]
    found = []
    packed = packed_rows(examples, seq_len, pad, packing, seed)
    for whole in packed:
        one = dict(whole)
        assert list(one) == ["input_ids", "labels", "position_ids", "document_ids", "row_ids"]
        assert len(one.pop("row_ids")) == max(one["document_ids"])
        assert all(len(values) == seq_len for values in one.values())
        columns = list(zip(*one.values(), strict=True))
        documents = max(one["document_ids"])
        assert one["document_ids"] == sorted(one["document_ids"], key=lambda number: number or seq_len + 1)
        for number in range(1, documents + 1):
            document = [column for column in columns if column[3] == number]
            ids, labels, positions = ([column[i] for column in document] for i in range(3))
            [source] = [e for e in examples if e.prompt_ids[0] == ids[0]]
            assert ids == source.prompt_ids + source.response_ids
            assert labels == [data.IGNORED] * len(source.prompt_ids) + source.response_ids
            assert positions == list(range(len(ids)))
            found.append(ids[0])
        assert all(column == (pad, data.IGNORED, 0, 0) for column in columns if column[3] == 0)
    assert sorted(found) == [e.prompt_ids[0] for e in examples]
    if packing:
        # Best fit opens a row only for what no open row takes, so no two rows would fit into one.
        free = sorted(one["document_ids"].count(0) for one in packed)
        assert len(free) == 1 or free[-1] + free[-2] < seq_len
        assert packed == packed_rows(examples, seq_len, pad, packing, seed)
    else:
        assert found == [e.prompt_ids[0] for e in examples]


def test_packed_rows_mix_documents_of_all_lengths() -> None:
    """Sorted by length, all rows but one would hold a single length; in the seeded order most hold both."""
    lengths = [10] * 100 + [50] * 100
    packed = data.assign(lengths, 300, 17)
    assert sum(len({lengths[document] for document in documents}) == 2 for documents in packed) > len(packed) / 2
    assert data.assign(lengths, 300, 18) != packed


# Counting


def test_response_statistics() -> None:
    responses = ["One two. Three four five!", "Six.", '{"qty":3}']
    assert data.response_statistics(responses) == {"mean_sentences": 1.333, "mean_words": 2.667}


# The stage


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
    """The project's params, with a data section that does not depend on the profile that is active."""
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
    """Run the stage in `root`: what it printed, and what it ended with (None: well; a string: its error line).

    In this process, since a new one would spend most of its time on importing torch again.
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


def test_stage_writes_what_it_should(stage_root: Path, prepared: dict[str, bytes], tokenizer: Any) -> None:
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
        rows = table.to_pylist()
        lines += [line for packed in rows for line in packed.pop("row_ids")]
        assert all(len(values) == 512 for packed in rows for values in packed.values())
        counts = metrics[split]
        assert counts["packed_rows"] == len(rows)
        assert counts["tokens"] == sum(number > 0 for packed in rows for number in packed["document_ids"])
        assert counts["labelled_tokens"] == sum(label != -100 for packed in rows for label in packed["labels"])
        assert counts["rows"] == sum(max(packed["document_ids"]) for packed in rows)

    assert len(set(lines)) == len(lines) == 576 + 64
    source = [json.loads(text) for text in TASKS.read_text("utf-8").splitlines()]
    for split in ("validation", "test"):
        examples = [json.loads(text) for text in prepared[f"{split}.jsonl"].decode().splitlines()]
        assert len(examples) == metrics[split]["rows"]
        for one in examples:
            original = source[one["id"] - 1]
            assert original["split"] == ("test" if split == "test" else "train")
            assert {key: original[key] for key in data.COLUMNS} == {key: one[key] for key in data.COLUMNS}
            assert tokenizer.decode(one["prompt_token_ids"]) == one["prompt"]
            assert tokenizer.decode(one["response_token_ids"]) == one["response"] + "<|im_end|>"


def test_another_process_writes_the_same_bytes(stage_root: Path, prepared: dict[str, bytes]) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "stages" / "prepare_data.py")],
        cwd=stage_root,
        env={**os.environ, "PYTHONHASHSEED": "2"},
        check=True,
    )
    assert outputs(stage_root) == prepared


def test_many_chunks_on_all_cores_give_the_same_bytes(
    stage_root: Path, prepared: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set in chunks of 20 kB: real processes, and documents and rows across the borders of chunks."""
    root = tmp_path / "run"
    shutil.copytree(stage_root, root)
    monkeypatch.setattr(data, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(data.chunks, "__defaults__", (20_000,))
    started = []

    def pool(processes: int, *args: Any, **options: Any) -> ProcessPoolExecutor:
        started.append(processes)
        return ProcessPoolExecutor(processes, *args, **options)

    monkeypatch.setattr(data, "ProcessPoolExecutor", pool)
    assert run_stage(root)[1] is None
    cores = len(os.sched_getaffinity(0))
    assert started == ([cores] * 2 if cores > 1 else [])
    assert outputs(root) == prepared


def test_best_fit_is_what_it_says() -> None:
    """`assign` against best fit as one would write it down: the fullest row that takes the document, the first such."""
    lengths = random.Random(3).choices(range(1, 65), k=400)
    rows: list[list[int]] = []
    for document in random.Random(17).sample(range(400), 400):
        room = [64 - sum(lengths[member] for member in row) for row in rows]
        fitting = [(left, number) for number, left in enumerate(room) if left >= lengths[document]]
        if fitting:
            rows[min(fitting)[1]].append(document)
        else:
            rows.append([document])
    assert data.assign(lengths, 64, 17) == rows


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
    coloured, _ = run_stage(root, "--show", "1")
    assert re.search(r"\x1b\[2m### Response:\x1b\[0m\n\x1b\[1;32m[^\x1b]+", coloured), coloured
    assert "⟦" not in coloured
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
    (root / "artifacts" / "model" / "tokenizer.json").write_text('{"version": "1.0", "trunca')
    assert "artifacts/model/tokenizer.json is damaged" in error()
    write_sums(root / "artifacts" / "model")
    assert "artifacts/model: the tokenizer cannot be read" in error()
    shutil.rmtree(root / "artifacts" / "model")
    assert "artifacts/model has no tokenizer: run stages/fetch_model.py first" in error()
    write_params(root / "params.yaml", source="path://data/none.jsonl")
    assert "data/none.jsonl is not a file" in error()
