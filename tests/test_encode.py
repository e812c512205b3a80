"""Rendering and tokenizing rows."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from support.rows import question, rows_of
from tokenizers import normalizers
from transformers import AddedToken

from trnlora.data.encode import Counts, RowEncoder
from trnlora.data.formats import Message, Row
from trnlora.data.statistics import response_statistics
from trnlora.data.templates import chat_messages, load_template
from trnlora.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def encoder(
    tokenizer: Any, template: str = "dolly", seq_len: int = 512, overlong: str = "drop", mask_history: bool = False,
    special_tokens: str = "as_text",
) -> RowEncoder:  # fmt: skip
    loaded = load_template(template, {}, tokenizer)
    return RowEncoder(tokenizer, loaded, seq_len, overlong, mask_history, special_tokens)  # type: ignore[arg-type]


def test_an_example_is_prompt_and_response_with_eos(tokenizer: Any) -> None:
    rows = rows_of(ROOT / "data" / "tasks.jsonl")[:50]
    examples, counts = encoder(tokenizer).encode(rows)
    assert counts == Counts()
    template = load_template("dolly", {}, tokenizer)
    for one, its in zip(examples, rows, strict=True):
        assert one.row == its
        assert one.prompt == template.render(tokenizer, its.messages[:-1])
        assert tokenizer.decode(one.tokens) == one.prompt + its.messages[-1].content + tokenizer.eos_token
        [(start, end)] = one.labelled
        assert tokenizer.decode(one.tokens[:start]) == one.prompt
        assert end == len(one)
        assert one.tokens.count(tokenizer.eos_token_id) == 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(8, 40))
@settings(deadline=None)
def test_overlong_rows(tokenizer: Any, prompt: int, response: int, seq_len: int) -> None:
    one = question(1, "a " * prompt, "", "b " * response)
    [whole], _ = encoder(tokenizer, seq_len=10_000).encode([one])
    [(start, _)] = whole.labelled
    fits, prompt_fits = len(whole) <= seq_len, start < seq_len

    dropped, counts = encoder(tokenizer, seq_len=seq_len).encode([one])
    assert dropped == ([whole] if fits else [])
    assert counts == Counts(dropped=not fits)

    cut, counts = encoder(tokenizer, seq_len=seq_len, overlong="truncate").encode([one])
    assert counts == Counts(dropped=not prompt_fits, truncated=prompt_fits and not fits)
    if prompt_fits:
        assert cut[0].tokens == whole.tokens[:seq_len]
        assert cut[0].labelled == [(start, min(seq_len, len(whole)))]
        assert cut[0].messages == one.messages  # the reference is not truncated
    else:
        assert cut == []


CONVERSATION = Row(
    1,
    (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "Two."),
        Message("user", "Three?", "A context."),
        Message("assistant", "Four — 넷."),
    ),
    "talk",
    None,
)


@pytest.mark.parametrize("template", ["dolly", "alpaca", "chat"])
def test_every_answer_of_a_conversation_has_labels(tokenizer: Any, template: str) -> None:
    [one], _ = encoder(tokenizer, template).encode([CONVERSATION])
    labelled = [tokenizer.decode(one.tokens[start:end]) for start, end in one.labelled]
    assert labelled == ["Two.<|im_end|>", "Four — 넷.<|im_end|>"]
    # The prompt of the last answer has the tokens that the server gives the conversation before it.
    start, end = one.labelled[-1]
    loaded = load_template(template, {}, tokenizer)
    assert one.prompt == loaded.render(tokenizer, CONVERSATION.messages[:-1])
    assert one.tokens[:start] == tokenizer(one.prompt, add_special_tokens=False)["input_ids"]
    assert end == len(one)
    [last], _ = encoder(tokenizer, template, mask_history=True).encode([CONVERSATION])
    assert last.tokens == one.tokens
    assert last.labelled == one.labelled[-1:]


def test_labels_are_those_of_hugging_face(tokenizer: Any) -> None:
    """`assistant_masks` of a template that marks what the assistant says, as `chat` tokenizes it."""
    generation = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' -}}"
        "{%- if m['role'] == 'assistant' -%}{%- generation -%}{{- m['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- m['content'] + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}{%- endfor -%}"
    )
    chat = chat_messages("chat", CONVERSATION.messages)
    found = tokenizer.apply_chat_template(
        chat, chat_template=generation, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    [one], _ = encoder(tokenizer, "chat").encode([CONVERSATION])
    mask = [int(any(start <= place < end for start, end in one.labelled)) for place in range(len(one))]
    assert found["input_ids"][: len(one)] == one.tokens
    assert found["assistant_masks"][: len(one)] == mask
    assert sum(found["assistant_masks"][len(one) :]) == 0  # the line break behind the last turn


def test_truncation_leaves_out_turns_whose_question_does_not_fit(tokenizer: Any) -> None:
    [whole], _ = encoder(tokenizer).encode([CONVERSATION])
    (first, second), (start, end) = whole.labelled
    for seq_len, turns, spans in (
        (end - 1, 5, [(first, second), (start, end - 1)]),
        (start + 1, 5, [(first, second), (start, start + 1)]),
        (start, 3, [(first, second)]),
        (second, 3, [(first, second)]),
        (first + 1, 3, [(first, first + 1)]),
    ):
        [cut], counts = encoder(tokenizer, seq_len=seq_len, overlong="truncate").encode([CONVERSATION])
        assert counts == Counts(truncated=1)
        assert cut.messages == CONVERSATION.messages[:turns]
        assert cut.labelled == spans
        assert cut.tokens == whole.tokens[: min(seq_len, spans[-1][1])]
    assert encoder(tokenizer, seq_len=first, overlong="truncate").encode([CONVERSATION]) == ([], Counts(dropped=1))


SPECIAL = question(3, "What is <|im_end|>?", "a<|im_start|>b", "<|im_end|> ends it.")


@pytest.mark.parametrize("template", ["dolly", "chat"])
def test_special_tokens_in_text(tokenizer: Any, template: str) -> None:
    [text], counts = encoder(tokenizer, template).encode([SPECIAL])
    assert (counts.with_special_tokens, counts.unreachable) == ([3], [])
    # The text is what it is, and its only special tokens are the template's.
    assert tokenizer.decode(text.tokens) == text.prompt + "<|im_end|> ends it.<|im_end|>"
    own = text.prompt.count("<|im_end|>") - 1 + 1  # without the question's, with the answer's end
    assert text.tokens.count(tokenizer.eos_token_id) == own
    plain = tokenizer("<|im_end|> ends it.", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    start, end = text.labelled[-1]
    assert text.tokens[start:end] == [*plain, tokenizer.eos_token_id]

    [kept], counts = encoder(tokenizer, template, special_tokens="keep").encode([SPECIAL])
    assert (counts.with_special_tokens, counts.unreachable) == ([3], [3])
    assert kept.tokens.count(tokenizer.eos_token_id) == own + 2
    assert kept.prompt == text.prompt
    with pytest.raises(UserError, match=r"^line 3: it spells a special token .* set data\.special_tokens to as_text"):
        encoder(tokenizer, template, special_tokens="refuse").encode([SPECIAL], "line {}".format)


@pytest.mark.parametrize("field", ["system", "question", "context", "earlier answer", "answer"])
def test_special_tokens_in_every_field(tokenizer: Any, field: str) -> None:
    def text(name: str) -> str:
        return f"{name} <|im_end|>" if name == field else name

    messages = (
        Message("system", text("system")),
        Message("user", text("question"), text("context")),
        Message("assistant", text("earlier answer")),
        Message("user", "more"),
        Message("assistant", text("answer")),
    )
    row = Row(1, messages, "talk", None)
    [example], counts = encoder(tokenizer, "chat").encode([row])
    assert counts.with_special_tokens == [1]
    assert example.tokens.count(tokenizer.eos_token_id) == 5  # one for each turn
    assert all(example.tokens[end - 1] == tokenizer.eos_token_id for _, end in example.labelled)
    [kept], counts = encoder(tokenizer, "chat", special_tokens="keep").encode([row])
    assert kept.tokens.count(tokenizer.eos_token_id) == 6
    assert counts.unreachable == ([1] if field == "answer" else [])
    with pytest.raises(UserError, match="row 1: it spells a special token"):
        encoder(tokenizer, "chat", special_tokens="refuse").encode([row])


@pytest.fixture
def joining(tokenizer: Any, tmp_path: Path) -> Any:
    """A template that puts texts side by side."""
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} A:", "utf-8")
    return load_template(f"path://{tmp_path / 'own.jinja'}", {}, tokenizer)


JOINED = Row(1, (Message("system", "a<|im_"), Message("user", "end|>b"), Message("assistant", "c")), "talk", None)


@pytest.mark.parametrize("policy", ["refuse", "as_text", "keep"])
def test_texts_that_spell_a_special_token_together(tokenizer: Any, joining: Any, policy: str) -> None:
    one = RowEncoder(tokenizer, joining, 512, "drop", False, policy)  # type: ignore[arg-type]
    if policy == "keep":
        assert one.encode([JOINED])[1].with_special_tokens == [1]
        return
    with pytest.raises(
        UserError, match=rf"^row 1: its text would change the special tokens .*<\|im_end\|>.*{policy} does"
    ):
        one.encode([JOINED])


def normalizing(tokenizer: Any, normalizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.normalizer = normalizer
    return changed


def test_a_tokenizer_that_changes_text(tokenizer: Any) -> None:
    """An answer that it cannot give back is counted; text that it turns into a special token is refused."""
    lower = normalizing(tokenizer, normalizers.Lowercase())
    rows = [question(1, "A?", "", "ok."), question(2, "B?", "", "Oh no.")]
    assert encoder(tokenizer).encode(rows)[1].unreachable == []
    assert encoder(lower).encode(rows)[1].unreachable == [2]
    wide = normalizing(tokenizer, normalizers.NFKC())
    wide.add_tokens([AddedToken("<|im_end|>", special=True, normalized=True)])
    with pytest.raises(UserError, match=r"^row 3: its text would change the special tokens"):
        encoder(wide).encode([*rows, question(3, "\uff1c|im_end|\uff1e", "", "x")])


def test_added_tokens_of_the_template_are_not_spelled_either(tokenizer: Any, tmp_path: Path) -> None:
    """Tokens that are added but not special, as DeepSeek's <｜User｜>: text that spells them is refused."""
    more = copy.deepcopy(tokenizer)
    more.add_tokens([AddedToken("<user>", special=False), AddedToken("<think>", special=False)])
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<user>{{ m.content }}{{ eos_token }}{% endfor %}", "utf-8"
    )
    template = load_template(f"path://{tmp_path / 'own.jinja'}", {}, more)
    one = RowEncoder(more, template, 512, "drop", False, "as_text")
    assert one.encode([question(1, "a", "", "<think>b")])[1] == Counts()
    with pytest.raises(UserError, match=r"row 2: its text would change the special tokens of the prompt .<user>."):
        one.encode([question(2, "a<user>", "", "b")])


@pytest.mark.parametrize("names", [("user",), ("system", "user")])
def test_a_template_that_ignores_a_turn_is_refused_however_short_its_text(
    tokenizer: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    (tmp_path / "own.jinja").write_text(
        "abcdefghijklmnopqrstuvwxyz"
        + "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}" * (len(names) - 1),
        "utf-8",
    )
    template = load_template(f"path://{tmp_path / 'own.jinja'}", {}, tokenizer)
    messages = (*(Message(name, "a") for name in names), Message("assistant", "b"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"row 1: .* leaves out or changes the text of a {names[0]} message"):
        RowEncoder(tokenizer, template, 512, "drop", False, "keep").encode([Row(1, messages, "talk", None)])


def test_response_statistics() -> None:
    responses = ["One two. Three four five!", "Six.", '{"qty":3}']
    assert response_statistics(responses) == {"mean_sentences": 1.333, "mean_words": 2.667}
