"""The forms of rows that people have: how they are recognized, what becomes of them, and what is refused."""

from typing import Any

import pytest

from trnlora.data.formats import NO_CATEGORY, Message, detect
from trnlora.errors import UserError

USER, ANSWER = Message("user", "One?"), Message("assistant", "Two.")
SYSTEM = Message("system", "Be brief.")
MORE = (Message("user", "Three?"), Message("assistant", "Four."))


def said(*pairs: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


TURNS = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")]
SHAREGPT = [("human", "One?"), ("gpt", "Two."), ("human", "Three?"), ("gpt", "Four.")]
PARTS = [{"type": "text", "text": "One"}, {"type": "text", "text": "?"}]

FORMS: dict[str, tuple[str, dict[str, Any], tuple[Message, ...]]] = {
    "dolly": (
        "instruction (instruction, context, response, category)",
        {"instruction": " One?", "context": "A text.\n", "response": "Two. ", "category": "talk"},
        (Message("user", "One?", "A text."), ANSWER),
    ),
    "dolly without category": (
        "instruction (instruction, context, response)",
        {"instruction": "One?", "context": "", "response": "Two."},
        (USER, ANSWER),
    ),
    "alpaca": (
        "instruction (instruction, input as context, output as response)",
        {"instruction": "One?", "input": "A text.", "output": "Two.", "text": "ignored"},
        (Message("user", "One?", "A text."), ANSWER),
    ),
    "prompt, completion": (
        "prompt_completion (prompt, completion)",
        {"prompt": "One?", "completion": "Two."},
        (USER, ANSWER),
    ),
    "prompt, completion as messages": (
        "prompt_completion (prompt, completion)",
        {"prompt": said(("system", "Be brief."), *TURNS[:3]), "completion": said(TURNS[3])},
        (SYSTEM, USER, ANSWER, *MORE),
    ),
    "messages": ("messages (messages)", {"messages": said(*TURNS)}, (USER, ANSWER, *MORE)),
    "messages in parts": (
        "messages (messages, category)",
        {"messages": said(("user", PARTS), TURNS[1]), "category": "talk"},
        (USER, ANSWER),
    ),
    "sharegpt": (
        "sharegpt (conversations)",
        {"conversations": said(("system", "Be brief."), *SHAREGPT, keys=("from", "value"))},
        (SYSTEM, USER, ANSWER, *MORE),
    ),
    "sharegpt with a system column": (
        "sharegpt (conversations, system)",
        {"conversations": said(*SHAREGPT, keys=("from", "value")), "system": "Be brief."},
        (SYSTEM, USER, ANSWER, *MORE),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_recognized_and_read(form: str) -> None:
    shown, values, messages = FORMS[form]
    found = detect(values, "auto", {}, "rows.jsonl line 1")
    assert str(found) == shown
    row = found.read(values, 7, "rows.jsonl line 7")
    assert row.messages == messages
    assert (row.id, row.category, row.split) == (7, values.get("category", NO_CATEGORY), None)


def test_other_column_names() -> None:
    values = {"question": "One?", "answer": "Two.", "topic": "talk", "part": "test"}
    columns = {"instruction": "question", "response": "answer", "category": "topic", "split": "part"}
    found = detect(values, "auto", columns, "rows.csv row 1")
    assert str(found) == "instruction (question as instruction, answer as response, topic as category, part as split)"
    row = found.read(values, 1, "rows.csv row 1")
    assert (row.messages, row.category, row.split) == ((USER, ANSWER), "talk", "test")
    with pytest.raises(UserError, match=r'rows\.csv row 2: part must be train or test, but it is "dev"'):
        found.read({**values, "part": "dev"}, 2, "rows.csv row 2")


@pytest.mark.parametrize(
    ("values", "name", "columns", "message"),
    [
        ({"question": "?", "answer": "!"}, "auto", {}, "has the columns question, answer, which fit no format"),
        (
            {"question": "?", "answer": "!"},
            "instruction",
            {},
            r"instruction needs instruction, response/output",
        ),
        ({"question": "?"}, "auto", {"instruction": "question"}, "fit no format"),
        ({"prompt": "?", "completion": "!"}, "messages", {}, "messages needs messages"),
        (
            {"prompt": "?", "completion": "!"},
            "auto",
            {"completion": "answer"},
            'names "answer" as completion, but f line 1 has the columns prompt, completion',
        ),
        ({"prompt": "?", "completion": "!"}, "auto", {"question": "prompt"}, 'no format has "question"; known are '),
        (
            {"prompt": "?", "completion": "!"},
            "auto",
            {"prompt": "completion"},
            'the column "completion" would be read as prompt and as completion',
        ),
        ({"prompt": "?", "completion": "!"}, "auto", {"split": "prompt"}, "would be read as prompt and as split"),
        ({"instruction": "?", "response": "!", "messages": []}, "auto", {}, "fit instruction and messages: say which"),
        (["a"], "auto", {}, r"is not a JSON object with named columns, but \[\"a\"\]"),
    ],
)
def test_a_form_that_is_not_recognized(values: Any, name: Any, columns: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=rf"f line 1.*{message}|^data.columns.*{message}"):
        detect(values, name, columns, "f line 1")


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("alpaca", {"input": None}, "input must be a string, but it is null"),
        ("alpaca", {"output": 7}, "output must be a string, but it is 7"),
        ("dolly without category", {"category": "talk"}, "has a column 'category', but the first row has not"),
        ("prompt, completion", {"completion": [1]}, "completion must be a string, but it is"),
        ("messages", {"messages": "hi"}, 'messages must be a list of messages, but it is "hi"'),
        ("messages", {"messages": []}, "the turns are none; they must be user, assistant"),
        ("messages", {"messages": said(*TURNS[:3])}, "the turns are user, assistant, user; they must be"),
        ("messages", {"messages": said(TURNS[0], TURNS[0], TURNS[1])}, "the turns are user, user, assistant"),
        ("messages", {"messages": said(TURNS[1])}, "the turns are assistant"),
        ("messages", {"messages": said(TURNS[0], ("system", "x"), TURNS[1])}, "the turns are user, system, assistant"),
        (
            "messages",
            {"messages": said(TURNS[0], ("tool", "x"))},
            'message 2 of messages has role "tool"; only turns',
        ),
        ("messages", {"messages": [{**said(TURNS[0])[0], "tool_calls": [1]}]}, "message 1 of messages has tool calls"),
        *(
            (
                "messages",
                {"messages": [{**said(TURNS[0])[0], **more}, *said(TURNS[1])]},
                f"message 1 .* has {next(iter(more))}",
            )
            for more in (
                {"function_call": {"name": "f"}},
                {"reasoning_content": "Hm."},
                {"weight": 0},
                {"train": False},
                {"images": ["a.png"]},
                {"refusal": "No."},
            )
        ),
        (
            "messages",
            {"messages": said(TURNS[0], ("assistant", None))},
            "text of message 2 .* must be a string",
        ),
        ("messages", {"messages": [{"role": "user"}]}, "message 1 of messages must have role and content"),
        ("messages", {"messages": said(("human", "One?"), TURNS[1])}, 'message 1 of messages has role "human"'),
        (
            "messages in parts",
            {"messages": said(("user", [{"type": "image"}]), TURNS[1])},
            "must be a string",
        ),
        ("sharegpt", {"conversations": said(("tool", "x"), keys=("from", "value"))}, 'has from "tool"; only turns of'),
        ("sharegpt", {"conversations": said(TURNS[0])}, "message 1 of conversations must have from and value"),
    ],
)
def test_a_bad_row_is_refused(form: str, changes: dict[str, Any], message: str) -> None:
    values = FORMS[form][1]
    found = detect(values, "auto", {}, "f line 1")
    with pytest.raises(UserError, match=rf"^f line 2:? .*{message}"):
        found.read({**values, **changes}, 2, "f line 2")


@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_a_row_without_a_column_is_refused(column: str) -> None:
    values = FORMS["alpaca"][1]
    found = detect(values, "auto", {}, "f line 1")
    without = {key: value for key, value in values.items() if key != column}
    with pytest.raises(UserError, match=rf"^f line 2 has no column '{column}' \(required: instruction, input, "):
        found.read(without, 2, "f line 2")


@pytest.mark.parametrize(
    ("form", "changes", "empty"),
    [
        ("alpaca", {"input": " "}, False),
        ("alpaca", {"output": " \n"}, True),
        ("prompt, completion", {"prompt": ""}, True),
        ("messages", {"messages": said(TURNS[0], ("assistant", ""), *TURNS[2:])}, True),
        ("messages", {"messages": said(("system", ""), *TURNS)}, False),
        ("sharegpt with a system column", {"system": ""}, False),
        ("alpaca", {"output": "\u200b\ufeff\u00ad"}, True),
        ("alpaca", {"output": "\u200b네"}, False),
        ("messages", {"messages": [{**turn, "weight": 1, "refusal": None} for turn in said(*TURNS)]}, False),
    ],
)
def test_a_row_with_a_turn_without_text(form: str, changes: dict[str, Any], empty: bool) -> None:
    values = FORMS[form][1]
    row = detect(values, "auto", {}, "f line 1").read({**values, **changes}, 1, "f line 1")
    assert row.is_empty == empty
    assert Message("system", "") not in row.messages
