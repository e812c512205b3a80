"""The prompt templates: their exact text, and that the server builds the same prompts."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trnlora.data import template_checks, templates
from trnlora.data.formats import Message
from trnlora.data.prompt_template import NAMES
from trnlora.errors import UserError

NOTE = "Write a response that appropriately completes the request.\n\n"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def rendered(tokenizer: Any, name: str, content: str, context: str, **variables: Any) -> str:
    return templates.load_template(name, variables, tokenizer).render(tokenizer, [Message("user", content, context)])


@pytest.mark.parametrize(
    ("name", "context", "prompt"),
    [
        ("dolly", "", "### Instruction:\nName it.\n\n### Response:\n"),
        ("dolly", "A cat.", "### Instruction:\nName it.\n\n### Context:\nA cat.\n\n### Response:\n"),
        (
            "alpaca",
            "",
            f"Below is an instruction that describes a task. {NOTE}### Instruction:\nName it.\n\n### Response:\n",
        ),
        (
            "alpaca",
            "A cat.",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            f"{NOTE}### Instruction:\nName it.\n\n### Input:\nA cat.\n\n### Response:\n",
        ),
        ("chat", "", "<|im_start|>user\nName it.<|im_end|>\n<|im_start|>assistant\n"),
        ("chat", "A cat.", "<|im_start|>user\nName it.\n\nA cat.<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_prompt_text(tokenizer: Any, name: str, context: str, prompt: str) -> None:
    assert rendered(tokenizer, name, "Name it.", context) == prompt


@pytest.mark.parametrize("name", ["alpaca", "dolly"])
def test_jinja_syntax_in_a_row_is_not_interpreted(tokenizer: Any, name: str) -> None:
    text = "{{ 7 * 7 }} {% if x %} \\n 'quoted' \"twice\" — 한국어"
    assert f"### Instruction:\n{text}\n\n" in rendered(tokenizer, name, text, "")


def test_a_conversation(tokenizer: Any) -> None:
    messages = [
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "Two."),
        Message("user", "Three?"),
    ]
    assert templates.load_template("dolly", {}, tokenizer).render(tokenizer, messages) == (
        "Be brief.\n\n### Instruction:\nOne?\n\n### Response:\nTwo.<|im_end|>\n\n"
        "### Instruction:\nThree?\n\n### Response:\n"
    )


def test_chat_needs_a_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"data\.prompt_template: chat needs .* use dolly or alpaca"):
        rendered(tokenizer, "chat", "Name it.", "")
    assert rendered(tokenizer, "dolly", "Name it.", "").startswith("### Instruction")


def test_a_template_of_ones_own(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    name = f"path://{file}"
    with pytest.raises(UserError, match=r"data\.prompt_template: .*own\.jinja cannot be read"):
        rendered(tokenizer, name, "Name it.", "")
    turns = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    file.write_text("{{ date }}|{{ strict }}|" + turns + "A:", "utf-8")
    text = rendered(tokenizer, name, "Name it.", "A cat.", date='26 "Jul" 2024', strict=True)
    assert text == '26 "Jul" 2024|True|Name it.\n\nA cat.<|im_end|>A:'
    file.write_text("{{ messages[1].content }}", "utf-8")
    with pytest.raises(UserError, match=rf"data\.prompt_template {name} refuses a conversation: "):
        rendered(tokenizer, name, "Name it.", "")
    file.write_text("{{ raise_exception('no system role') }}", "utf-8")
    with pytest.raises(UserError, match="refuses a conversation: no system role"):
        rendered(tokenizer, name, "Name it.", "")


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for m in messages %}{{ m.content }}\n{% endfor %}A:",  # no special token ends a turn
        # The text of an answer changes when a turn follows.
        "{% for m in messages %}{% if not loop.last %}- {% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_separate_turns_is_refused(tokenizer: Any, tmp_path: Path, jinja: str) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(jinja, "utf-8")
    template = templates.load_template(f"path://{file}", {}, tokenizer)
    turns = [Message("user", "a?"), Message("assistant", "b."), Message("user", "c?"), Message("assistant", "d.")]
    with pytest.raises(UserError, match=r"data\.prompt_template does not separate the turns"):
        templates.conversation(template, tokenizer, turns)


@pytest.mark.parametrize(
    ("jinja", "role"),
    [
        ("{{ messages[0].content }}{{ messages[-1].content }}{{ eos_token }}", "user"),
        ("{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}", "system"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "system",
        ),
        (
            "{% for m in messages %}{{ m.content | replace('b.', '') }}{{ eos_token }}{% endfor %}",
            "assistant",
        ),
    ],
)
def test_a_template_that_loses_text_is_refused(tokenizer: Any, tmp_path: Path, jinja: str, role: str) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(jinja, "utf-8")
    template = templates.load_template(f"path://{file}", {}, tokenizer)
    turns = [
        Message("system", "s."), Message("user", "a?"), Message("assistant", "b."), Message("user", "c?"),
        Message("assistant", "d."),
    ]  # fmt: skip
    with pytest.raises(UserError, match=f"leaves out or changes the text of a {role} message"):
        templates.conversation(template, tokenizer, turns)


TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}A: "
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

FAULTY: dict[str, tuple[str, str]] = {
    "ignores the question": ("abcdefghijklmnopqrstuvwxyz", "leaves out or changes the text of a user message"),
    "nothing": ("", "leaves out or changes the text of a user message"),
    "cuts": (TURNS.replace("m.content", "m.content[:20]"), "leaves out or changes the text of a user message"),
    "upper case": (TURNS.replace("m.content", "m.content | upper"), "leaves out or changes the text of a user message"),
    "no end": (ENDLESS + TURNS, "does not end within 1 s"),
    "no end with more turns": ("{% if messages[1] %}" + ENDLESS + "{% endif %}" + TURNS, "does not end within 1 s"),
    "macro without end": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}" + TURNS,
        "does not end within 1 s",
    ),
    "a constant without end": ("{{ 10 ** (10 ** 9) }}" + TURNS, "does not end within 1 s"),
    "macro that calls itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "refuses .*: maximum recursion depth",
    ),
    "gigabytes": ("{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}" + TURNS, "needs too much memory"),
    "megabytes": ("{{ 'a' * 2000000 }}" + TURNS, "makes 2000.* characters of a short conversation"),
    "raises": ("{{ raise_exception('no') }}", "refuses a conversation: no"),
    "syntax": ("\n{% for m in %}", "is not valid Jinja: .* in line 2"),
    "includes": ("{% include 'a' %}" + TURNS, "refuses a conversation: no loader"),
    "unsafe": ("{{ ''.__class__.__mro__ }}" + TURNS, "refuses a conversation: access to attribute '__class__'"),
    "undefined": ("{{ date_sting }}" + TURNS, "uses date_sting, which has no value: set it in data.template_kwargs"),
    "the date": ("{{ strftime_now('%d %b %Y') }}" + TURNS, "writes the date, so that prompts change from day to day"),
    "the date unless": (
        "{% if day is not defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}" + TURNS,
        "writes the date",
    ),
    "random": ("{{ [1, 2] | random }}" + TURNS, r"writes something else each time \(random\)"),
    "lipsum": ("{{ lipsum() }}" + TURNS, r"writes something else each time \(lipsum\)"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_template_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1)
    monkeypatch.setattr(template_checks, "SECONDS", 1)
    jinja, message = FAULTY[name]
    (tmp_path / "own.jinja").write_text(jinja, "utf-8")
    template = templates.load_template(f"path://{tmp_path / 'own.jinja'}", {}, tokenizer)
    with pytest.raises(UserError, match=rf"data\.prompt_template path://.*own\.jinja {message}"):
        template_checks.check_template(template, {}, tokenizer)


@pytest.mark.parametrize(
    ("jinja", "variables"),
    [
        (TURNS, {}),
        ("{% if tools %}{{ tools }}{% endif %}{{ a or 1 }}{{ b if b is defined }}{{ c | default('d') }}" + TURNS, {}),
        ("{% if day is not defined %}{% set day = strftime_now('%d') %}{% endif %}{{ day }}" + TURNS, {"day": "26"}),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS, {}),
        ("{{ a }}" + TURNS, {"a": 'it\'s "q" %} {{ 7 * 7 }} \\n\n한'}),
        ("\ufeff" + TURNS, {}),
    ],
)
def test_a_sound_template_is_not_refused(tokenizer: Any, tmp_path: Path, jinja: str, variables: dict[str, Any]) -> None:
    (tmp_path / "own.jinja").write_text(jinja, "utf-8")
    template = templates.load_template(f"path://{tmp_path / 'own.jinja'}", variables, tokenizer)
    template_checks.check_template(template, variables, tokenizer)
    text = template.render(tokenizer, [Message("user", "a?")])
    assert text.endswith("user: a?<|im_end|>\nA: ")
    assert text.startswith((*map(str, variables.values()), "1d", "user: "))


@pytest.mark.parametrize("name", ["dolly", "alpaca", "chat"])
def test_our_own_templates_pass_and_have_no_variables(tokenizer: Any, name: str) -> None:
    template_checks.check_template(templates.load_template(name, {}, tokenizer), {}, tokenizer)
    with pytest.raises(UserError, match="has no variable date_string: remove or rename it"):
        template_checks.check_template(
            templates.load_template(name, {"date_string": "x"}, tokenizer), {"date_string": "x"}, tokenizer
        )


def test_a_template_that_does_not_end_for_one_row(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "RENDER_SECONDS", 1)
    (tmp_path / "own.jinja").write_text(
        "{% if 'b' in messages[0].content %}" + ENDLESS + "{% endif %}" + TURNS, "utf-8"
    )
    template = templates.load_template(f"path://{tmp_path / 'own.jinja'}", {}, tokenizer)
    assert template.render(tokenizer, [Message("user", "a")])
    with pytest.raises(UserError, match="does not end within 1 s"):
        template.render(tokenizer, [Message("user", "b")])


def test_a_template_must_be_a_file(tokenizer: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "own.jinja")
    for path in (tmp_path / "own.jinja", tmp_path):
        with pytest.raises(UserError, match=r"data\.prompt_template: .* is not a file"):
            templates.load_template(f"path://{path}", {}, tokenizer)


def test_a_tokenizer_needs_eos(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        templates.end_of_answer(tokenizer)


def test_prompt_tokens_do_not_depend_on_the_response(tokenizer: Any) -> None:
    prompt_ids = tokenizer("1. Un", add_special_tokens=False)["input_ids"]
    joint_ids = tokenizer("1. Unplug it.", add_special_tokens=False)["input_ids"]
    assert joint_ids[: len(prompt_ids)] != prompt_ids  # in one string, both would merge into the token `Unplug`
    segments = [templates.Segment("1. Un", None), templates.Segment("plug it.", tokenizer.eos_token_id)]
    [[prompt, response]] = templates.tokenize(tokenizer, [segments])
    assert prompt == prompt_ids
    assert tokenizer.decode(response) == "plug it.<|im_end|>"
    assert response[-1] == tokenizer.eos_token_id


@pytest.fixture
def renderer(tiny_llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The prompt builder behind vLLM's chat endpoint."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers.hf import HfRenderer

    config = VllmConfig(model_config=ModelConfig(model=str(tiny_llama), dtype="float32", max_model_len=512))
    renderer = HfRenderer(config, tokenizer)
    yield renderer
    renderer.shutdown()


@pytest.mark.slow  # the first import of vllm takes 15 s or more
def test_vllms_chat_endpoint_builds_the_same_prompt(tmp_path: Path, tokenizer: Any, renderer: Any) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers.chat_utils import load_chat_template

    for name in NAMES:
        file = tmp_path / f"{name}.jinja"
        template = templates.load_template(name, {}, tokenizer)
        file.write_text(template.jinja, "utf-8")
        for given in (str(file), template.jinja):  # both forms that `--chat-template` accepts
            for context in ("", "5 lamps for Mia, Oslo.\n\nToday — 한국어, {{ braces }}"):
                first = [Message("user", "Order to JSON.", context), Message("assistant", '{"qty":5}')]
                turns = [*first, Message("user", "Again?"), Message("assistant", "x")]
                chat = templates.chat_messages(name, turns[:-1])
                request = ChatCompletionRequest.model_validate({"model": "adapter", "messages": chat})
                _, [served] = renderer.render_chat(
                    [request.messages],
                    request.build_chat_params(load_chat_template(given), "auto"),
                    request.build_tok_params(renderer.model_config),
                )
                rendered = templates.conversation(template, tokenizer, turns)
                [parts] = templates.tokenize(tokenizer, [rendered.segments])
                assert tokenizer.decode(served["prompt_token_ids"]) == template.render(tokenizer, turns[:-1])
                assert served["prompt_token_ids"] == [id for part in parts[:-1] for id in part]
