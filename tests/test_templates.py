"""The prompt templates: their exact text, and that the server builds the same prompts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trnlora.data import templates
from trnlora.errors import UserError

NOTE = "Write a response that appropriately completes the request.\n\n"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


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
    assert templates.render_prompt(tokenizer, name, "Name it.", context) == prompt


@pytest.mark.parametrize("name", ["alpaca", "dolly"])
def test_jinja_syntax_in_a_row_is_not_interpreted(tokenizer: Any, name: str) -> None:
    text = "{{ 7 * 7 }} {% if x %} \\n 'quoted' \"twice\" — 한국어"
    assert f"### Instruction:\n{text}\n\n" in templates.render_prompt(tokenizer, name, text, "")


def test_a_conversation(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    text = tokenizer.apply_chat_template(
        messages, chat_template=templates.chat_template("dolly", tokenizer), add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "Be brief.\n\n### Instruction:\nOne?\n\n### Response:\nTwo.<|im_end|>\n\n"
        "### Instruction:\nThree?\n\n### Response:\n"
    )


def test_chat_needs_a_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"data\.prompt_template: chat needs .* use dolly or alpaca"):
        templates.render_prompt(tokenizer, "chat", "Name it.", "")
    assert templates.render_prompt(tokenizer, "dolly", "Name it.", "").startswith("### Instruction")


def test_unknown_template(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="'vicuna' is not known: use one of alpaca, dolly, chat"):
        templates.chat_template("vicuna", tokenizer)


def test_a_tokenizer_needs_eos(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        templates.tokenize_pair(tokenizer, ["a"], ["b"])


def test_prompt_tokens_do_not_depend_on_the_response(tokenizer: Any) -> None:
    prompt_ids = tokenizer("1. Un", add_special_tokens=False)["input_ids"]
    joint_ids = tokenizer("1. Unplug it.", add_special_tokens=False)["input_ids"]
    assert joint_ids[: len(prompt_ids)] != prompt_ids  # in one string, both would merge into the token `Unplug`
    [(prompt, response)] = templates.tokenize_pair(tokenizer, ["1. Un"], ["plug it."])
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

    for name in templates.NAMES:
        file = tmp_path / f"{name}.jinja"
        file.write_text(templates.chat_template(name, tokenizer), "utf-8")
        for given in (str(file), templates.chat_template(name, tokenizer)):  # both forms that `--chat-template` accepts
            for context in ("", "5 lamps for Mia, Oslo.\n\nToday — 한국어, {{ braces }}"):
                message = {"role": "user", "content": templates.user_message(name, "Order to JSON.", context)}
                request = ChatCompletionRequest.model_validate({"model": "adapter", "messages": [message]})
                _, [served] = renderer.render_chat(
                    [request.messages],
                    request.build_chat_params(load_chat_template(given), "auto"),
                    request.build_tok_params(renderer.model_config),
                )
                prompt = templates.render_prompt(tokenizer, name, "Order to JSON.", context)
                [(prompt_ids, _)] = templates.tokenize_pair(tokenizer, [prompt], ["x"])
                assert tokenizer.decode(served["prompt_token_ids"]) == prompt
                assert served["prompt_token_ids"] == prompt_ids
