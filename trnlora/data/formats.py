"""The forms of rows that people have, each read into the one form that the rest of the pipeline knows: messages.

    instruction        instruction, context (or Alpaca's input), response (or Alpaca's output)
    prompt_completion  prompt, completion: two strings, or two lists of messages as TRL has them
    messages           messages: a list of {role, content}
    sharegpt           conversations: a list of {from, value}; perhaps system, a string

All may have `category`, and `split` (train | test). Nothing is converted in silence: a missing column, a number where
text belongs, a role that cannot be trained on are errors that name the row. A row with an empty text, as many public
data sets have them, is read, so that it can be counted; it is used nowhere.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from trnlora.errors import UserError
from trnlora.params import FormatName

MARK = "\U0010fffd"  # what `special_tokens` puts into text; a private-use character, refused in the data
_SURROGATE = re.compile("[\ud800-\udfff]")
Role = Literal["system", "user", "assistant"]
SPLIT_VALUES = ("train", "test")  # of the column `split`; validation rows are always drawn from train rows
NO_CATEGORY = "all"  # the category of rows of a file without that column


class Message(NamedTuple):
    """One turn of a conversation, stripped of leading and trailing white space.

    context: what a user's turn is about, e.g. a text to summarize. The prompt template puts it under a heading.
    """

    role: Role
    content: str
    context: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the data. `id`: its line or row number, from 1, on top of those of the files before it."""

    id: int
    messages: tuple[Message, ...]  # the last one is the assistant's
    category: str
    split: str | None  # train | test; None where the files have no such column

    @property
    def is_empty(self) -> bool:
        """Has it a turn in which nothing can be read, only white space or invisible characters?"""
        return not all(any(map(_is_visible, message.content)) for message in self.messages)


def _is_visible(char: str) -> bool:
    return char.isprintable() and not char.isspace()


# For each format, its columns and the names under which they are looked for. Those in OPTIONAL may be absent, but then
# from all rows of a file.
COLUMNS: dict[FormatName, dict[str, tuple[str, ...]]] = {
    "instruction": {
        "instruction": ("instruction",), "context": ("context", "input"), "response": ("response", "output"),
    },
    "prompt_completion": {"prompt": ("prompt",), "completion": ("completion",)},
    "messages": {"messages": ("messages",)},
    "sharegpt": {"conversations": ("conversations",), "system": ("system",)},
}  # fmt: skip
_COMMON = {"category": ("category",), "split": ("split",)}
OPTIONAL = ("context", "system", "category", "split")
_SHAREGPT_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a file are read: a format, and the file's column for each of the format's columns."""

    name: FormatName
    columns: Mapping[str, str]

    def __str__(self) -> str:
        renamed = (name if name == column else f"{column} as {name}" for name, column in self.columns.items())
        return f"{self.name} ({', '.join(renamed)})"

    def read(self, values: Any, id: int, where: str) -> Row:
        """A row from a parsed JSON object. Raises UserError with `where` and what is wrong."""
        if not isinstance(values, dict):
            raise UserError(f"{where} is not a JSON object with the columns {', '.join(self.columns.values())}")
        for column in self.columns.values():
            if column not in values:
                raise UserError(f"{where} has no column {column!r} (required: {', '.join(self.columns.values())})")
        for column in self._absent:
            if column in values:
                raise UserError(f"{where} has a column {column!r}, but the first row has not: add it to all or none")
        get = {name: values[column] for name, column in self.columns.items()}
        messages = check_turns(self._messages(get, where), where)
        category = text(get["category"], self._column("category"), where) if "category" in get else NO_CATEGORY
        if not category:
            raise UserError(f"{where}: {self._column('category')} is empty")
        split = get.get("split")
        if "split" in get and split not in SPLIT_VALUES:
            raise UserError(f"{where}: {self._column('split')} must be train or test, but it is {short(split)}")
        return Row(id, messages, category, split)

    @functools.cached_property
    def _absent(self) -> list[str]:
        """The names of optional columns that the first row has not."""
        known = COLUMNS[self.name] | _COMMON
        return [column for name in OPTIONAL if name not in self.columns for column in known.get(name, ())]

    def _column(self, name: str) -> str:
        return self.columns[name]

    def _messages(self, get: dict[str, Any], where: str) -> list[Message]:
        if self.name == "instruction":
            context = text(get["context"], self._column("context"), where) if "context" in get else ""
            return [
                Message("user", text(get["instruction"], self._column("instruction"), where), context),
                Message("assistant", text(get["response"], self._column("response"), where)),
            ]
        if self.name == "prompt_completion":
            prompt, completion = get["prompt"], get["completion"]
            if isinstance(prompt, list) and isinstance(completion, list):
                return [
                    *turns(prompt, self._column("prompt"), "role", "content", where),
                    *turns(completion, self._column("completion"), "role", "content", where),
                ]
            return [
                Message("user", text(prompt, self._column("prompt"), where)),
                Message("assistant", text(completion, self._column("completion"), where)),
            ]
        if self.name == "messages":
            return turns(get["messages"], self._column("messages"), "role", "content", where)
        found = turns(get["conversations"], self._column("conversations"), "from", "value", where)
        if "system" in get:
            return [Message("system", text(get["system"], self._column("system"), where)), *found]
        return found


def detect(first: Any, name: FormatName | Literal["auto"], columns: Mapping[str, str], where: str) -> RowFormat:
    """The format of a file from its first row. `columns`: the file's column for some of the format's columns.

    Raises UserError where no format fits, where several do, where `columns` names what is not there, and where one
    column would be read as two.
    """
    if not isinstance(first, dict):
        raise UserError(f"{where} is not a JSON object with named columns, but {short(first)}")
    _check_columns(columns, first, where)
    fitting = [
        found
        for known in get_args(FormatName)
        if name in ("auto", known) and (found := _match(known, columns, first.keys())) is not None
    ]
    if len(fitting) == 1:
        last = {column: ours for ours, column in fitting[0].columns.items()}
        for ours, column in fitting[0].columns.items():
            if last[column] != ours:
                raise UserError(
                    f"{where}: the column {short(column)} would be read as {ours} and as {last[column]}: name "
                    "another for one of them in data.columns"
                )
        return fitting[0]
    has = f"{where} has the columns {', '.join(short(name)[1:-1] for name in first) or 'none'}"
    if fitting:
        raise UserError(f"{has}, which fit {' and '.join(each.name for each in fitting)}: say which in data.format")
    wanted = {known: _wanted(known) for known in get_args(FormatName) if name in ("auto", known)}
    forms = "; ".join(f"{known} needs {needs}" for known, needs in wanted.items())
    raise UserError(f"{has}, which fit no format ({forms}): name them in data.columns, e.g. instruction: question")


def _check_columns(columns: Mapping[str, str], first: dict[str, Any], where: str) -> None:
    """Raise UserError for a key of data.columns that no format has, or a value that the first row has not."""
    known = {name for each in COLUMNS.values() for name in each} | _COMMON.keys()
    for name, column in columns.items():
        if name not in known:
            raise UserError(f"data.columns: no format has {short(name)}; known are {', '.join(sorted(known))}")
        if column not in first:
            has = ", ".join(short(each)[1:-1] for each in first) or "none"
            raise UserError(f"data.columns names {short(column)} as {name}, but {where} has the columns {has}")


def _match(name: FormatName, columns: Mapping[str, str], present: Iterable[str]) -> RowFormat | None:
    """The format with its columns in a row that has `present`; None if it does not fit."""
    known = COLUMNS[name] | _COMMON
    if not columns.keys() <= known.keys():
        return None
    found: dict[str, str] = {}
    for column, names in known.items():
        choices = [columns[column]] if column in columns else [each for each in names if each in present]
        if not set(choices) <= set(present) or (not choices and column not in OPTIONAL):
            return None
        if choices:
            found[column] = choices[0]
    return RowFormat(name, found)


def _wanted(name: FormatName) -> str:
    return ", ".join("/".join(names) for column, names in COLUMNS[name].items() if column not in OPTIONAL)


def turns(value: Any, column: str, role_key: str, content_key: str, where: str) -> list[Message]:
    """The messages of a list of {role, content}."""
    if not isinstance(value, list):
        raise UserError(f"{where}: {column} must be a list of messages, but it is {short(value)}")
    messages = []
    for number, turn in enumerate(value, 1):
        place = f"message {number} of {column}"
        if not isinstance(turn, dict) or not {role_key, content_key} <= turn.keys():
            raise UserError(f"{where}: {place} must have {role_key} and {content_key}, but it is {short(turn)}")
        role = turn[role_key]
        known = _SHAREGPT_ROLES.get(role) if isinstance(role, str) else None
        if known is None or (role_key == "role" and role != known) or turn.get("tool_calls"):
            found = "tool calls" if turn.get("tool_calls") else f"{role_key} {short(role)}"
            roles = "system, user and assistant" if role_key == "role" else "system, human and gpt"
            raise UserError(f"{where}: {place} has {found}; only turns of {roles} can be trained on")
        if lost := [key for key in turn if key in _UNTRAINABLE and not _is_nothing(key, turn[key])]:
            raise UserError(
                f"{where}: {place} has {lost[0]} {short(turn[lost[0]])}, which would be lost: remove it, or the row"
            )
        messages.append(Message(known, text(_joined(turn[content_key]), f"the text of {place}", where)))
    return messages


# Keys of a turn that hold text or calls for the model, or say that the turn is not to be trained on.
_UNTRAINABLE = (
    "function_call", "tool_call_id", "tool_responses", "reasoning_content", "reasoning", "thinking", "refusal", "audio",
    "images", "image", "videos", "weight", "train",
)  # fmt: skip


def _is_nothing(key: str, value: Any) -> bool:
    """Is the value of such a key the one that a turn without it has?"""
    return not value if key not in ("weight", "train") else value is None or value == 1


def _joined(content: Any) -> Any:
    """The text of a content that is a list of parts, if all parts are text."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(each, str) for each in texts):
            return "".join(texts)
    return content


def check_turns(messages: list[Message], where: str) -> tuple[Message, ...]:
    """Raise UserError unless a system message is the first, and a question and its answer follow one another."""
    rest = [message.role for message in messages]
    if rest[:1] == ["system"]:
        del rest[0]
        if not messages[0].content:
            del messages[0]
    if len(rest) < 2 or len(rest) % 2 or rest != ["user", "assistant"] * (len(rest) // 2):
        raise UserError(
            f"{where}: the turns are {', '.join(message.role for message in messages) or 'none'}; they must be user, "
            "assistant, user, assistant, …, after a system message if there is one"
        )
    return tuple(messages)


def text(value: Any, column: str, where: str) -> str:
    """`value` as text without white space at its ends. Raises UserError for what is not text a tokenizer takes."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column} must be a string, but it is {short(value)}")
    if not value.isascii():
        if _SURROGATE.search(value):
            raise UserError(f"{where}: {column} contains half of a surrogate pair, which no tokenizer accepts")
        if MARK in value:
            raise UserError(f"{where}: {column} contains U+10FFFD, a private-use character that is reserved: remove it")
    return value.strip()


def short(value: Any) -> str:
    """The beginning of a value as JSON, for an error."""
    return json.dumps(value, default=repr)[:60]
