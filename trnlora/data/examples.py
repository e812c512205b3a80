"""The rows of the JSONL files that stages hand to each other and to the tools."""

from pathlib import Path
from typing import TypedDict, cast

from trnlora.errors import UserError
from trnlora.files import read_jsonl


class PreparedExample(TypedDict):
    """A row of artifacts/prepared/validation.jsonl and test.jsonl: a tokenized row that is not trained on.

    The model is given `prompt_token_ids` and should continue with `response_token_ids`, whose last token is EOS unless
    the response was truncated to data.seq_len.
    """

    id: int  # the row's line in the data set, from 1
    category: str
    instruction: str
    context: str  # may be empty
    response: str  # the reference; whole even where response_token_ids are truncated
    prompt: str  # the rendered template, up to where the response begins
    prompt_token_ids: list[int]
    response_token_ids: list[int]


class Answer(TypedDict):
    """A row of artifacts/answers.jsonl: what the base model and the tuned one answered to a test example."""

    id: int  # PreparedExample.id
    category: str
    prompt: str
    reference: str  # PreparedExample.response
    base: str
    tuned: str
    base_exact: bool  # equal to the reference, as evaluation/scoring.py compares
    tuned_exact: bool
    base_finish_reason: str  # vLLM's: "stop" after EOS, "length" at eval.max_tokens
    tuned_finish_reason: str


def read_examples(path: Path) -> list[PreparedExample]:
    """The examples of artifacts/prepared/validation.jsonl or test.jsonl, in the order of the data set; may be empty.

    Raises UserError if the file is missing, is not JSONL or has a row that lacks a key.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if missing := sorted(PreparedExample.__required_keys__ - row.keys()):
            raise UserError(f"{path} line {number} has no {', '.join(missing)}: run `dvc repro -f prepare_data`")
    return cast(list[PreparedExample], rows)
