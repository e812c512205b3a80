"""Ask the running server the same question as `tuned` and as `base`, and print both answers side by side.

    python tools/smoke.py [--params FILE] [--host HOST] [--port PORT] [--question TEXT]     (make smoke)

The default question is the first test row, of which the server must make the prompt that eval_vllm gave the models.
Decoding is the server's default: greedy, as in the evaluation. If the server has an API key, set VLLM_API_KEY here too.
If one of the models fails, the other's answer is still printed; the last line names the one that failed (exit code 1).
"""

import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trnlora import paths
from trnlora.cli import add_params, add_server, script_parser, server_address
from trnlora.data.examples import (
    PreparedExample,
    prompt_token_ids,
    read_examples,
    read_prepared_with,
    reference,
)
from trnlora.data.formats import Message
from trnlora.data.special_tokens import has_special_tokens, special_token_pattern
from trnlora.data.templates import chat_messages
from trnlora.data.tokenizer import load_tokenizer
from trnlora.errors import UserError, run
from trnlora.params import load_params
from trnlora.serving import client
from trnlora.serving.adapters import BASE, TUNED


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    add_server(parser)
    parser.add_argument("--question", help="what the user asks (default: the first test row)")
    args = parser.parse_args()

    params = load_params(args.params)
    url = client.base_url(*server_address(args, params))
    chat, row = [{"role": "user", "content": args.question}], None
    if args.question is None:
        rows = read_examples(paths.PREPARED / "test.jsonl")
        if not rows:
            raise UserError(f"{paths.PREPARED / 'test.jsonl'} has no rows: give a --question")
        row = rows[0]
        chat = chat_messages(read_prepared_with(paths.PREPARED).template.name, asked_messages(row))

    # tuned first: on Trainium, a request that fails may end the engine.
    models = [TUNED, *([BASE] if BASE in client.served_models(url) else [])]  # a merged model is served alone
    answers, failed = ask(url, models, chat, params.eval.max_tokens)
    if row and any(prompt_token_ids(row) != reply.prompt_token_ids for reply, _ in answers.values()):
        failed.append(other_prompt(row))
    if answers:
        table = Table(show_lines=True)
        shown = [model for model in (BASE, TUNED) if model in answers]
        for model in shown:
            table.add_column(f"{model} ({answers[model][1]:.2f} s)", ratio=1, overflow="fold")
        table.add_row(*(Text(answers[model][0].text) for model in shown))  # Text: an answer may look like rich's markup
        console = Console()
        console.print(Text("\n\n".join(message["content"] for message in chat)), style="bold")
        console.print(table)
        if row:
            console.print(Text(f"reference: {reference(row)}"))
    if failed:
        raise UserError("; ".join(failed))


def asked_messages(row: PreparedExample) -> list[Message]:
    """The messages of a row that its answer is given to."""
    return [Message(**message) for message in row["messages"][:-1]]  # type: ignore[arg-type]


def other_prompt(row: PreparedExample) -> str:
    """The line about a row of which the server has made another prompt than prepare_data."""
    tokenizer = load_tokenizer(paths.MODEL)
    if has_special_tokens(special_token_pattern(tokenizer), asked_messages(row)):
        why = "it spells a special token, which a chat request turns into the token: give a --question"
    else:
        why = "restart the server with the adapter that was evaluated"
    return f"the server made another prompt of the first test row than eval_vllm gave the models: {why}"


def ask(
    url: str, models: list[str], chat: list[dict[str, str]], max_tokens: int
) -> tuple[dict[str, tuple[client.ChatReply, float]], list[str]]:
    """Ask one model after the other: (reply, seconds) by model, and a line for each that failed.

    Raises Unreachable if no server answers the first one.
    """
    answers: dict[str, tuple[client.ChatReply, float]] = {}
    failed: list[str] = []
    for model in models:
        begun = time.perf_counter()
        try:
            reply = client.chat(url, model, chat, max_tokens)
        except client.Unreachable as error:
            if model == models[0]:
                raise
            failed.append(f"{model} failed, and the server with it: {error}")
        except UserError as error:
            failed.append(f"{model} failed: {error}")
        else:
            answers[model] = (reply, time.perf_counter() - begun)
    return answers, failed


if __name__ == "__main__":
    run(main)
