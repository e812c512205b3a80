"""Ask the running server the same question as `base` and as `tuned`, and print both answers side by side.

    python tools/smoke.py [--params FILE] [--host HOST] [--port PORT] [--question TEXT]     (make smoke)

The default question is the first test row. Decoding is greedy. If the server has an API key, set VLLM_API_KEY here too.
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

    table = Table(show_lines=True)
    answers = []
    for model in (BASE, TUNED):
        begun = time.perf_counter()
        answers.append(client.chat(url, model, chat, params.eval.max_tokens))
        table.add_column(f"{model} ({time.perf_counter() - begun:.2f} s)", ratio=1, overflow="fold")
    table.add_row(*map(Text, answers))  # Text: an answer may contain what looks like rich's markup
    console = Console()
    console.print(Text("\n\n".join(message["content"] for message in chat)), style="bold")
    console.print(table)
    if answer is not None:
        console.print(Text(f"reference: {answer}"))


if __name__ == "__main__":
    run(main)
