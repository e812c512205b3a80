"""Ask the running server the same question as `base` and as `tuned`, and print both answers side by side.

    python tools/smoke.py [--params FILE] [--host HOST] [--port PORT] [--question TEXT]     (make smoke)

The default question is the first test row. Decoding is greedy. A server with an API key wants VLLM_API_KEY here too.
"""

import argparse
import time
from pathlib import Path

from trnlora import paths
from trnlora.data import templates
from trnlora.errors import UserError, run
from trnlora.files import read_jsonl
from trnlora.params import load_params
from trnlora.serving import client
from trnlora.serving import vllm_args as serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, help="params file (default: %(default)s)")
    parser.add_argument("--host", help="address of the server (default: serve.host)")
    parser.add_argument("--port", type=int, help="port of the server (default: serve.port)")
    parser.add_argument("--question", help="what the user asks (default: the first test row)")
    args = parser.parse_args()

    params = load_params(args.params)
    url = serving.base_url(args.host or params.serve.host, args.port or params.serve.port)
    question, reference = args.question, None
    if question is None:
        rows = read_jsonl(paths.PREPARED / "test.jsonl")
        if not rows:
            raise UserError(f"{paths.PREPARED / 'test.jsonl'} has no rows: give a --question")
        row = rows[0]
        question = templates.user_message(params.data.prompt_template, row["instruction"], row["context"])
        reference = row["response"]
    answers = {name: ask(url, name, question, params.eval.max_tokens) for name in (serving.BASE, serving.TUNED)}

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for name, (_, seconds) in answers.items():
        table.add_column(f"{name} ({seconds:.2f} s)", ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text, _ in answers.values()))  # Text: answers may hold what looks like markup
    console = Console()
    console.print(Text(question), style="bold")
    console.print(table)
    if reference is not None:
        console.print(Text(f"reference: {reference}"))


def ask(url: str, model: str, question: str, max_tokens: int) -> tuple[str, float]:
    """The greedy answer of `model` to one user message through /v1/chat/completions, and the seconds it took.

    Raises UserError when there is no server, or when it refuses.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    begun = time.perf_counter()
    reply = client.request(url, "/v1/chat/completions", body)
    try:
        return reply["choices"][0]["message"]["content"] or "", time.perf_counter() - begun
    except (KeyError, IndexError, TypeError):
        raise UserError(f"what listens at {url} is not vLLM's server: name another --port") from None


if __name__ == "__main__":
    run(main)
