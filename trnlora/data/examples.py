"""What the JSON files hold that stages hand to each other and to the tools, and the names of rows."""

from pathlib import Path
from typing import cast

from typing_extensions import TypedDict  # before Python 3.12, pydantic reads only this one

from trnlora.errors import UserError
from trnlora.readers import read_jsonl

SOURCES = "sources.json"  # in artifacts/prepared: a FileEntry for each file of the data


class FileEntry(TypedDict):
    """A file of the data. A row's id is its line or row number plus the offset of its file."""

    file: str
    unit: str
    offset: int
    format: str


def row_name(table: list[FileEntry], id: int) -> str:
    """What errors and warnings call the row with an id: `data/mine.csv row 5`."""
    entry = next(entry for entry in reversed(table) if entry["offset"] < id)
    return f"{entry['file']} {entry['unit']} {id - entry['offset']}"


class PreparedExample(TypedDict):
    """A row of artifacts/prepared/validation.jsonl and test.jsonl: a tokenized row that is not trained on.

    Its loss is that of the tokens in `labelled`. For its answer, the model is given the tokens before the last of these
    spans, which is the last message and ends with EOS unless it was truncated to data.seq_len.
    """

    id: int  # the row's line or row number in the data, from 1
    category: str
    messages: list[dict[str, str]]  # role, content, context; the last one, which is never truncated, is the reference
    prompt: str  # the rendered template, up to where the last message begins
    token_ids: list[int]
    labelled: list[list[int]]  # spans (start, end) of token_ids


class Answer(TypedDict):
    """A row of artifacts/answers.jsonl: what the base model and the tuned one answered to a test example."""

    id: int  # PreparedExample.id
    category: str
    prompt: str
    reference: str  # the example's last message
    base: str
    tuned: str
    base_exact: bool  # equal to the reference, as evaluation/scoring.py compares
    tuned_exact: bool
    base_finish_reason: str | None  # vLLM's: "stop" after EOS, "length" at eval.max_tokens
    tuned_finish_reason: str | None


def reference(example: PreparedExample) -> str:
    """What the answer to an example is compared with."""
    return example["messages"][-1]["content"]


def prompt_token_ids(example: PreparedExample) -> list[int]:
    """What the model is given for its answer to an example."""
    return example["token_ids"][: example["labelled"][-1][0]]


def read_examples(path: Path) -> list[PreparedExample]:
    """The examples of artifacts/prepared/validation.jsonl or test.jsonl, in the order of the data set; may be empty.

    Raises UserError if the file is missing, is not JSONL or has a row that lacks a key.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if missing := sorted(PreparedExample.__required_keys__ - row.keys()):
            raise UserError(f"{path} line {number} has no {', '.join(missing)}: run `dvc repro -f prepare_data`")
    return cast(list[PreparedExample], rows)
