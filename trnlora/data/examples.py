"""The rows that stages pass on as JSON lines."""

from typing import TypedDict


class PreparedExample(TypedDict):
    """A row of artifacts/prepared/{validation,test}.jsonl. response_token_ids ends with EOS."""

    id: str
    category: str
    instruction: str
    context: str
    response: str
    prompt: str
    prompt_token_ids: list[int]
    response_token_ids: list[int]


class Answer(TypedDict):
    """A row of artifacts/answers.jsonl: the answers of the base model and of the adapter to one test row."""

    id: str
    category: str
    prompt: str
    reference: str
    base: str
    tuned: str
    base_exact: bool
    tuned_exact: bool
    base_finish_reason: str | None
    tuned_finish_reason: str | None
