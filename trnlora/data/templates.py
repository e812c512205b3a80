"""The prompt templates: training, evaluation and the server all build their prompts here.

A template is a Jinja chat template, as tokenizers have them. The same string is passed to `vllm serve --chat-template`,
so that a chat request with a row's messages becomes the very prompt that the row had in training.
"""

import contextlib
import itertools
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trnlora.data.formats import Message, Role
from trnlora.data.prompt_template import TemplateText, context_heading
from trnlora.data.special_tokens import MARK, added_token_pattern, special_token_pattern, tokenize_marked
from trnlora.errors import UserError
from trnlora.sources import parse_source

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

# That the tokenizer gets at a time. It returns offsets, masks and texts too: of a whole chunk, more than 100 MB.
BATCH_TEXTS = 1024

RENDER_SECONDS = 3  # of the processor, for one conversation, which takes a millisecond
MAX_PROMPT = 1 << 20  # characters of a prompt, on top of ten for each character of its messages


class PromptTemplate(TemplateText):
    """How messages become the text of a prompt."""

    def render(self, tokenizer: Any, messages: Sequence[Message], **variables: Any) -> str:
        """The text of messages up to where the assistant's answer begins, with the special tokens that it has.

        variables: values of further variables of the template. Raises UserError if the template refuses the messages,
        fails, or does not end within RENDER_SECONDS.
        """
        chat = chat_messages(self.name, messages)
        try:
            with _time_limit(RENDER_SECONDS):
                text: str = tokenizer.apply_chat_template(
                    chat, chat_template=self.jinja, add_generation_prompt=True, tokenize=False, **variables
                )
        except MemoryError:
            raise UserError(f"data.prompt_template {self.name} needs too much memory") from None
        except _TooLong:
            raise UserError(f"data.prompt_template {self.name} does not end within {RENDER_SECONDS} s") from None
        except Exception as error:  # jinja2's, and any that a function of the template raises
            reason = " ".join(str(error).split())[:200]
            raise TemplateRefusal(f"data.prompt_template {self.name} refuses a conversation: {reason}") from None
        if len(text) > MAX_PROMPT + 10 * sum(len(message["content"]) for message in chat):
            raise UserError(f"data.prompt_template {self.name} makes {len(text)} characters of a short conversation")
        return text


class TemplateRefusal(UserError):
    """A template that does not take a conversation, by raise_exception or because it fails."""


class _TooLong(Exception):
    """A template has used up its time."""


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise _TooLong in the with block when it has taken so many seconds of processor time.

    In other threads than the first, which gets signals, there is no limit: the page and the server get a template that
    prepare_data has tried.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def load_template(name: str, variables: Mapping[str, Any], tokenizer: Any) -> PromptTemplate:
    """The template `name`: one of prompt_template.NAMES, or path:// and a Jinja file.

    variables: values that the template's variables get, e.g. date_string of Llama 3.2's. They are written into it, so
    that they are the same wherever it is used. tokenizer: a Hugging Face tokenizer, needed for `chat` alone, which is
    its own template. Raises UserError for `chat` if it has none, and for a file that cannot be read.
    """
    settings = "".join(f"{{%- set {key} = {_literal(value)} -%}}\n" for key, value in variables.items())
    if name in _CHAT_TEMPLATES:
        return PromptTemplate(name=name, jinja=settings + _CHAT_TEMPLATES[name])
    if name == "chat":
        if not tokenizer.chat_template:
            raise UserError("data.prompt_template: chat needs a tokenizer with a chat template; use dolly or alpaca")
        return PromptTemplate(name=name, jinja=settings + tokenizer.get_chat_template())
    file = parse_source(name).path
    if file.exists() and not file.is_file():
        raise UserError(f"data.prompt_template: {file} is not a file")
    try:
        return PromptTemplate(name=name, jinja=settings + file.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.prompt_template: {file} cannot be read: {error}") from None


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def user_message(name: str, content: str, context: str) -> str:
    """The text of a turn: the content and, if there is one, the context under the heading of the template `name`."""
    return content + context_heading(name) + context if context else content


def chat_messages(name: str, messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as a chat request to the server has them."""
    return [{"role": role, "content": user_message(name, content, context)} for role, content, context in messages]


class Segment(NamedTuple):
    """A part of a conversation's text that is tokenized by itself. `end`: the id of the token that ends an answer."""

    text: str
    end: int | None  # None: not an answer


class Conversation(NamedTuple):
    """A rendered conversation: the text up to the last answer, and all of it in segments, the last answer included."""

    prompt: str
    segments: list[Segment]


def conversation(template: PromptTemplate, tokenizer: Any, messages: Sequence[Message]) -> Conversation:
    """Messages as what the model is given and what it answers, in turn.

    The text up to the last answer is exactly what the server builds for the messages before it; every earlier answer is
    found in it again, with the special token that ends it. Raises UserError for a template that does not separate the
    turns in this way, or that leaves out the text of a message.
    """
    prompt = template.render(tokenizer, messages[:-1])
    _check_whole(template, prompt, messages[:-1])
    found, done = [], 0
    for number, message in enumerate(messages[:-1]):
        if message.role != "assistant":
            continue
        before = template.render(tokenizer, messages[:number])
        answer = before + message.content
        token = _special_token_at(tokenizer, prompt, len(answer)) if prompt.startswith(answer) else None
        if token is None:
            raise UserError(
                "data.prompt_template does not separate the turns: after a further turn, an answer no longer follows "
                "the prompt that it was given to, or no special token ends it"
            )
        text, end = token
        found += [Segment(prompt[done : len(before)], None), Segment(message.content, end)]
        done = len(answer) + len(text)
    found += [Segment(prompt[done:], None), Segment(messages[-1].content, end_of_answer(tokenizer))]
    return Conversation(prompt, found)


def _check_whole(template: PromptTemplate, prompt: str, messages: Sequence[Message]) -> None:
    """Raise UserError unless a prompt has the text of all messages in their order, a system message's anywhere."""
    position = 0
    for role, content, context in messages:
        text = user_message(template.name, content, context)
        found = prompt.find(text, 0 if role == "system" else position)
        if found < 0:
            raise UserError(
                f"data.prompt_template {template.name} leaves out or changes the text of a {role} message, which would "
                f"be lost in silence: {text[:60]!r}"
            )
        if role != "system":
            position = found + len(text)


# Mixed case, spaces and characters that a template could change, and no word that a template has.
PROBE = "Qv7 “Ünï”  <b>{n}</b>\n\tjX, 漢字 & 'y'. zK{n}"


def probe(shape: Sequence[tuple[Role, bool]]) -> list[Message]:
    """A conversation of these roles, with a context where it is so said, whose texts are found nowhere else."""
    texts = (PROBE.format(n=number) for number in itertools.count())
    return [Message(role, next(texts), next(texts) if has_context else "") for role, has_context in shape]


def template_tokens(template: PromptTemplate, tokenizer: Any, shape: Sequence[tuple[Role, bool]]) -> list[int]:
    """The added tokens, special ones and others, that a template writes for a conversation, with the ends of answers.

    Raises UserError for a template that loses text of such a conversation, does not separate its turns, or writes the
    date: its prompts would change from day to day.
    """
    messages = probe(shape)
    found = conversation(template, tokenizer, messages)
    if template.render(tokenizer, messages[:-1], strftime_now=lambda form: f"another day: {form}") != found.prompt:
        raise UserError(
            f"data.prompt_template {template.name} writes the date, so that prompts change from day to day: set its "
            "variable in data.template_kwargs, e.g. {date_string: 26 Jul 2024}, or use a copy with a fixed date"
        )
    pattern = added_token_pattern(tokenizer)
    ids: list[int] = []
    for segment in found.segments:
        texts = pattern.findall(segment.text) if pattern else []
        ids += tokenizer.convert_tokens_to_ids(texts)
        ids += [] if segment.end is None else [segment.end]
    return ids


def end_of_answer(tokenizer: Any) -> int:
    """The token that ends an answer: EOS. Raises UserError if there is none: the model could not learn to stop."""
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise UserError("the model's tokenizer has no EOS token, so a response would never end: set its eos_token")
    return end


def _special_token_at(tokenizer: Any, text: str, position: int) -> tuple[str, int] | None:
    """The text and the id of the special token at a position of a text."""
    pattern = special_token_pattern(tokenizer)
    found = pattern.match(text, position) if pattern else None
    return (found[0], tokenizer.convert_tokens_to_ids(found[0])) if found else None


def tokenize(tokenizer: Any, conversations: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
    """The token ids of each segment of each conversation, to be concatenated; an answer's with its end.

    Segments are tokenized separately. In one string, the last characters of a prompt could merge with the first of the
    answer (`:\\n` + `\\n`), and the model would be trained on a prompt that never occurs when it is served, where the
    prompt is tokenized alone. No special tokens are added: a template that needs them (BOS, `<|im_start|>`) writes them
    itself, and the server's chat endpoint adds none either.
    """
    texts = [segment.text for conversation in conversations for segment in conversation]
    batches = (texts[start : start + BATCH_TEXTS] for start in range(0, len(texts), BATCH_TEXTS))
    ids = (each for batch in batches for each in tokenizer(batch, add_special_tokens=False)["input_ids"])
    pattern = special_token_pattern(tokenizer)

    def of(segment: Segment) -> list[int]:
        plain: list[int] = next(ids)
        return tokenize_marked(tokenizer, pattern, segment.text) if pattern and MARK in segment.text else plain

    return [
        [[*of(segment), *([] if segment.end is None else [segment.end])] for segment in conversation]
        for conversation in conversations
    ]
