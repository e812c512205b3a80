"""What the JSON files hold that stages hand to each other and to the tools, and the names of rows."""

from pathlib import Path
from typing import Any, cast

from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

from trnlora.data.prompt_template import TemplateText
from trnlora.errors import UserError
from trnlora.files import check_sums
from trnlora.readers import StrictModel, read_json_as, read_jsonl

# In artifacts/prepared:
SOURCES = "sources.json"  # a FileEntry for each file of the data
PREPARED_WITH = "prepared.json"  # PreparedWith


class FileEntry(TypedDict):
    """A file of the data. A row's id is its line or row number plus the offset of its file."""

    file: str
    unit: str
    offset: int
    format: str
    sha256: str  # of the file as it was found: compressed, CSV …


class PreparedWith(StrictModel):
    """What the rows of artifacts/prepared were made with. params.yaml may have other values since."""

    template: TemplateText
    params: dict[str, Any]  # the section `data` of params.yaml


def read_prepared_with(prepared: Path) -> PreparedWith:
    """What the rows in the folder `prepared` were made with. Raises UserError for a missing or damaged file."""
    check_sums(prepared, "prepare_data", [PREPARED_WITH])
    return read_json_as(prepared / PREPARED_WITH, PreparedWith, ": run `dvc repro -f prepare_data`")


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
