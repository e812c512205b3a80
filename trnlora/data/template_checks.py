"""What is wrong with a prompt template, found before any row is rendered.

The template is a program, given to vLLM as it is: what does not end here would not end there. So it is tried first in a
process of its own, with limits on its time and memory.
"""

import contextlib
import multiprocessing
import resource
import signal
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trnlora.data.formats import Role
from trnlora.data.templates import PromptTemplate, TemplateRefusal, probe, template_tokens
from trnlora.errors import UserError

SECONDS = 10  # of the processor, for a few short conversations, which take milliseconds
WAIT = 60  # seconds until the process is given up, however busy the machine is
MEMORY = 1 << 30  # bytes, on top of what this process has

SYSTEM: list[tuple[Role, bool]] = [("system", False)]
USER: list[tuple[Role, bool]] = [("user", False)]
ANSWER: list[tuple[Role, bool]] = [("assistant", False)]


def check_template(template: PromptTemplate, variables: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise UserError for a template that cannot be used, and for variables that it has not.

    That is one that is not valid Jinja, uses variables without a value, loses a question, does not end, fills the
    memory, fails, or writes something else each time or the next day. What depends on the conversations in the data is
    checked with each of them, in `encode`.
    """
    where = f"data.prompt_template {template.name}"
    _try_in_a_process(template, variables, tokenizer, where)
    template_tokens(template, tokenizer, USER + ANSWER)


def _check_names(template: PromptTemplate, variables: Mapping[str, Any], tokenizer: Any, where: str) -> None:
    """Check the template without running it: its syntax and its variables."""
    from jinja2 import TemplateSyntaxError, meta, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(template.jinja).environment
        tree = environment.parse(template.jinja)
    except TemplateSyntaxError as error:
        line = error.lineno - len(variables)
        raise UserError(f"{where} is not valid Jinja: {error.message} in line {line}") from None
    except RecursionError:
        raise UserError(f"{where} is not valid Jinja: nested too deeply") from None
    loaded = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "load"}
    if unknown := sorted(variables.keys() - loaded):
        raise UserError(f"data.template_kwargs: {where} has no variable {unknown[0]}: remove or rename it")
    changing = [f.name for f in tree.find_all(nodes.Filter) if f.name == "random"]
    changing += [name for name in ("lipsum",) if name in loaded]
    if changing:
        raise UserError(
            f"{where} writes something else each time ({changing[0]}): prompts must be the same when served"
        )
    # A name that is asked for may be without a value: {% if tools %}, {{ date or "today" }}, x is defined, x | default.
    tests = [node.test for node in tree.find_all((nodes.If, nodes.CondExpr))]
    tests += tree.find_all((nodes.Test, nodes.Or, nodes.And, nodes.Not, nodes.Compare))
    tests += [node for node in tree.find_all(nodes.Filter) if node.name in ("default", "d")]
    asked = {name.name for node in tests for name in _names(node)}
    given = {"messages", "tools", "documents", "add_generation_prompt", *tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    if missing := sorted(meta.find_undeclared_variables(tree) - given - asked):
        raise UserError(f"{where} uses {missing[0]}, which has no value: set it in data.template_kwargs")


def _names(node: Any) -> list[Any]:
    from jinja2 import nodes

    return [node] if isinstance(node, nodes.Name) else list(node.find_all(nodes.Name))


def _try_in_a_process(template: PromptTemplate, variables: Mapping[str, Any], tokenizer: Any, where: str) -> None:
    """`_try` in a fork of this process. Raises UserError with what it finds, and where it does not end."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(there, template, variables, tokenizer, where), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, whose locks are not used in it
        process.start()
    there.close()
    try:
        if not here.poll(WAIT):
            raise UserError(f"{where} does not end within {WAIT} s: look for loops in it")
        fault = here.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            raise UserError(f"{where} does not end within {SECONDS} s: look for loops in it") from None
        raise UserError(f"{where} ends the process that renders it ({process.exitcode}): simplify it") from None
    finally:
        process.kill()
        process.join()
        here.close()
    if fault:
        raise UserError(fault)


def _try(pipe: Connection, template: PromptTemplate, variables: Mapping[str, Any], tokenizer: Any, where: str) -> None:
    """Check a template's names, then render a few conversations, with limits; send what is wrong or an empty string.

    Compiling is limited too: Jinja computes constants such as 10 ** 10 ** 9 on the way.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _check_names(template, variables, tokenizer, where)
        # Longer conversations only have to end: whether the template takes them matters where the data has them.
        for shape in (SYSTEM + USER, USER + ANSWER + USER, SYSTEM + (USER + ANSWER) * 8 + USER):
            with contextlib.suppress(TemplateRefusal):
                template.render(tokenizer, probe(shape))
        template.render(tokenizer, probe(USER))
        pipe.send("")
    except UserError as error:
        pipe.send(str(error))
