"""Ask the running server the same question as `tuned` and as `base`, and print both answers side by side.

    python tools/smoke.py [--params FILE] [--host HOST] [--port PORT] [--question TEXT]     (make smoke)

The default question is the first test row. Decoding is greedy. If the server has an API key, set VLLM_API_KEY here too.
If one of the models fails, the other's answer is still printed; the last line names the one that failed (exit code 1).
"""

import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trnlora import paths
from trnlora.cli import add_params, add_server, script_parser, server_address
from trnlora.data.examples import read_examples, reference
from trnlora.data.formats import Message
from trnlora.data.templates import chat_messages
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
    chat, answer = [{"role": "user", "content": args.question}], None
    if args.question is None:
        rows = read_examples(paths.PREPARED / "test.jsonl")
        if not rows:
            raise UserError(f"{paths.PREPARED / 'test.jsonl'} has no rows: give a --question")
        messages = [Message(**message) for message in rows[0]["messages"][:-1]]  # type: ignore[arg-type]
        chat = chat_messages(params.data.prompt_template, messages)
        answer = reference(rows[0])

    # tuned first: on Trainium, a request that fails may end the engine.
    models = [TUNED, *([BASE] if BASE in client.served_models(url) else [])]  # a merged model is served alone
    answers, failed = ask(url, models, chat, params.eval.max_tokens)
    if answers:
        table = Table(show_lines=True)
        shown = [model for model in (BASE, TUNED) if model in answers]
        for model in shown:
            table.add_column(f"{model} ({answers[model][1]:.2f} s)", ratio=1, overflow="fold")
        table.add_row(*(Text(answers[model][0]) for model in shown))  # Text: an answer may look like rich's markup
        console = Console()
        console.print(Text("\n\n".join(message["content"] for message in chat)), style="bold")
        console.print(table)
        if answer is not None:
            console.print(Text(f"reference: {answer}"))
    if failed:
        raise UserError("; ".join(failed))


def ask(
    url: str, models: list[str], chat: list[dict[str, str]], max_tokens: int
) -> tuple[dict[str, tuple[str, float]], list[str]]:
    """Ask one model after the other: (answer, seconds) by model, and a line for each that failed.

    Raises Unreachable if no server answers the first one.
    """
    answers: dict[str, tuple[str, float]] = {}
    failed: list[str] = []
    for model in models:
        begun = time.perf_counter()
        try:
            text = client.chat(url, model, chat, max_tokens)
        except client.Unreachable as error:
            if model == models[0]:
                raise
            failed.append(f"{model} failed, and the server with it: {error}")
        except UserError as error:
            failed.append(f"{model} failed: {error}")
        else:
            answers[model] = (text, time.perf_counter() - begun)
    return answers, failed


if __name__ == "__main__":
    run(main)
