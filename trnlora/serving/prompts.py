"""The prompt template of a server: the one that its adapters were trained with, whatever params.yaml says now.

vLLM has one chat template for all its models. A running server does not say which: it is found by what the server makes
of a conversation, compared with what the templates make of it that it may have.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from trnlora import paths
from trnlora.data.formats import Message
from trnlora.data.prompt_template import TemplateText
from trnlora.data.templates import PromptTemplate, Segment, chat_messages, conversation, load_template, tokenize
from trnlora.data.tokenizer import load_tokenizer
from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.serving import client
from trnlora.serving.adapters import Adapter
from trnlora.training.adapter_record import AdapterRecord, read_record
from trnlora.weights.peft_folder import RECORD

# What templates are told apart by: one question with a context, and a conversation.
_QUESTION = Message("user", "Which city?", "Rosa lives in Nairobi.")
SAMPLES = ([_QUESTION], [_QUESTION, Message("assistant", "Nairobi."), Message("user", "And her brother?")])


def params_template(params: Params) -> PromptTemplate:
    """The template that params.yaml says now. Raises UserError as `load_template` does."""
    tokenizer: Any = None
    if params.data.prompt_template == "chat":  # the tokenizer's own template: only this one needs transformers
        tokenizer = load_tokenizer(paths.MODEL)
    return load_template(params.data.prompt_template, params.data.template_kwargs, tokenizer)


def template_to_serve(adapters: Sequence[Adapter], params: Params) -> TemplateText:
    """The chat template of a server with these adapters: that of their records, or params.yaml's if there are none.

    Prints which template is assumed for adapters without a record, and where params.yaml has another one now. Raises
    UserError for adapters that were trained with different templates.
    """
    recorded = [(adapter.name, adapter.record.template) for adapter in adapters if adapter.record]
    unknown = ", ".join(adapter.name for adapter in adapters if not adapter.record)
    if not recorded:
        template: TemplateText = params_template(params)
        print(f"{unknown}: no {RECORD} says the prompt template of the training; {template} of params.yaml is assumed")
        return template
    first, template = recorded[0]
    for name, other in recorded[1:]:
        if not other.gives_prompts_of(template):
            raise UserError(
                f"the adapters {first} and {name} were trained with different prompt templates ({template}; {other}), "
                "and vLLM has one for all its models: start a server for each"
            )
    if unknown:
        print(f"{unknown}: no {RECORD} says the prompt template of the training; {template} of {first} is assumed")
    if line := differing_template(params, template, first):
        check_template_works(template, first)
        print(line)
    return template


def check_template_works(template: TemplateText, name: str) -> None:
    """Raise UserError unless the template that the adapter `name` records renders the messages that it is given.

    prepare_data has checked those of this project; a record from elsewhere may hold any text.
    """
    try:
        conversation(PromptTemplate(**template.model_dump()), load_tokenizer(paths.MODEL), [*SAMPLES[0], SAMPLES[1][1]])
    except UserError as error:
        raise UserError(f"the prompt template in the {RECORD} of {name} cannot be used: {error}") from None


def differing_template(params: Params, template: TemplateText, name: str) -> str | None:
    """A line if params.yaml now has another template than the one that the adapter `name` was trained with."""
    try:
        now = params_template(params)
    except UserError as error:
        return f"prompts are rendered with {template}, as {name} was trained; params.yaml's cannot be loaded ({error})"
    if now.gives_prompts_of(template):
        return None
    return f"params.yaml has the prompt template {now}, but {name} was trained with {template}, which is used"


def served_records(url: str) -> dict[str, AdapterRecord]:
    """The records of the running server's adapters whose folders are on this machine, by name.

    Raises UserError as `client.request` does, and for a damaged record.
    """
    folders = client.served_folders(url).items()
    return {name: record for name, folder in folders if (record := read_record(folder))}


def served_template(url: str, params: Params, tokenizer: Any) -> PromptTemplate:
    """The template with which the running server renders chat requests.

    One of those that its adapters record, that artifacts/adapter records or that params.yaml has: the first that makes
    the server's prompts. Raises UserError if none does, and as `client.request` does.
    """
    known = [record.template for record in served_records(url).values()]
    if (own := read_record(paths.ADAPTER)) is not None:
        known.append(own.template)
    with contextlib.suppress(UserError):  # a file that is gone matters only if the server has that template
        known.append(params_template(params))
    tried: list[TemplateText] = []
    for text in known:
        template = PromptTemplate(**text.model_dump())
        if any(text.gives_prompts_of(other) for other in tried) or not works(template, tokenizer):
            continue
        if renders_as(url, template, tokenizer):
            return template
        tried.append(text)
    raise UserError(
        f"the server at {url} renders prompts with none of the templates {'; '.join(map(str, tried))}: restart it with "
        "`make serve`"
    )


def works(template: PromptTemplate, tokenizer: Any) -> bool:
    """Does a template render a question?"""
    try:
        template.render(tokenizer, SAMPLES[0])
    except UserError:
        return False
    return True


def renders_as(url: str, template: PromptTemplate, tokenizer: Any) -> bool:
    """Does the running server make the prompts of `template`?

    Raises UserError as `client.request` does, and if the template does not render a question.
    """
    model = client.served_models(url)[0]
    for messages in SAMPLES:
        try:
            text = template.render(tokenizer, messages)
        except UserError:
            if messages is SAMPLES[0]:
                raise
            continue  # it refuses conversations: rows of one turn were all that it was used for
        [[expected]] = tokenize(tokenizer, [[Segment(text, None)]])
        if client.chat(url, model, chat_messages(template.name, messages), 1).prompt_token_ids != expected:
            return False
    return True


def check_template_of_server(adapter: Adapter, url: str, params: Params) -> None:
    """Raise UserError unless the running server has the template and sampling defaults that an adapter records.

    Prints a line for an adapter without a record.
    """
    if adapter.record is None:
        print(f"{adapter.name}: no {RECORD} says the prompt template of its training; it gets that of the server")
        return
    for name, record in served_records(url).items():
        if record.generation != adapter.record.generation:
            raise UserError(
                f"{adapter.folder} was evaluated with {adapter.record.generation}, and the running server samples with "
                f"{record.generation}, as {name} was: start another server for it"
            )
    tokenizer = load_tokenizer(paths.MODEL)
    template = PromptTemplate(**adapter.record.template.model_dump())
    if not renders_as(url, template, tokenizer):
        try:
            other = str(served_template(url, params, tokenizer))
        except UserError:
            other = "another one"
        raise UserError(
            f"{adapter.folder} was trained with the prompt template {template}, and the running server has {other}: "
            "start another server for it"
        )
