"""The prompt templates: training, evaluation and the server all build their prompts here.

A template is a Jinja chat template, as tokenizers have them. A row becomes one user message, which the template turns
into the prompt. The same string is passed to `vllm serve --chat-template`, so that a chat request whose user message is
`user_message(...)` becomes the very prompt that a training row had.
"""

from typing import Any

from trnlora.errors import UserError

# From one user message to `…### Response:\n`. System and assistant messages are rendered too, because chat clients send
# them to the server; rows have none. An assistant's turn ends with EOS, as the responses in training do.
# Everything is written as expressions, not as text between tags, so how Jinja trims white space does not matter.
_TURNS = """\
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- PREAMBLE'### Instruction:\\n' + message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '### Response:\\n' + message['content'] + eos_token + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}
"""

# Both forms of Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca): with and without an input.
# The newline after `### Response:` is as in torchtune and LitGPT; Stanford's own code has none.
_ALPACA_PREAMBLE = (
    "('Below is an instruction that describes a task, paired with an input that provides further context. '"
    " if '\\n\\n### Input:\\n' in message['content'] else 'Below is an instruction that describes a task. ')"
    " + 'Write a response that appropriately completes the request.\\n\\n' + "
)

_CHAT_TEMPLATES = {
    "alpaca": _TURNS.replace("PREAMBLE", _ALPACA_PREAMBLE),
    "dolly": _TURNS.replace("PREAMBLE", ""),
}
_CONTEXT_HEADINGS = {"alpaca": "\n\n### Input:\n", "dolly": "\n\n### Context:\n", "chat": "\n\n"}

NAMES = tuple(_CONTEXT_HEADINGS)


def chat_template(name: str, tokenizer: Any) -> str:
    """The Jinja chat template called `name`, as `vllm serve --chat-template` takes it.

    tokenizer: a Hugging Face tokenizer, needed for the name `chat` alone, which is the tokenizer's own template.
    Raises UserError for `chat` if the tokenizer has none, and for an unknown name.
    """
    if name in _CHAT_TEMPLATES:
        return _CHAT_TEMPLATES[name]
    if name != "chat":
        raise UserError(f"prompt template {name!r} is not known: use one of {', '.join(NAMES)}")
    if not tokenizer.chat_template:
        raise UserError("data.prompt_template: chat needs a tokenizer with a chat template; use dolly or alpaca")
    template: str = tokenizer.get_chat_template()
    return template


def user_message(name: str, instruction: str, context: str) -> str:
    """The user message of a row: the instruction and, if there is one, the context under the template's heading."""
    return instruction + _CONTEXT_HEADINGS[name] + context if context else instruction


def render_prompt(tokenizer: Any, name: str, instruction: str, context: str) -> str:
    """The prompt of a row, up to where the response begins, with the special tokens that the template writes."""
    messages = [{"role": "user", "content": user_message(name, instruction, context)}]
    prompt: str = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(name, tokenizer), add_generation_prompt=True, tokenize=False
    )
    return prompt


def tokenize_pair(tokenizer: Any, prompts: list[str], responses: list[str]) -> list[tuple[list[int], list[int]]]:
    """The token ids of each prompt and of its response with EOS, to be concatenated.

    Prompt and response are tokenized separately. In one string, the last characters of the prompt could merge with the
    first of the response (`:\\n` + `\\n`), and the model would be trained on a prompt that never occurs when it is
    served, where the prompt is tokenized alone. No special tokens are added: a template that needs them (BOS,
    `<|im_start|>`) writes them itself, and the server's chat endpoint adds none either.

    Raises UserError for a tokenizer without EOS: the model could not learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no EOS token, so a response would never end: set its eos_token")
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(responses, add_special_tokens=False)["input_ids"]
    return [
        (prompt, [*response, tokenizer.eos_token_id]) for prompt, response in zip(prompt_ids, response_ids, strict=True)
    ]
