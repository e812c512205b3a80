"""A short conversation with a model of the running server, in the terminal.

    python tools/chat.py [--params FILE] [--host HOST] [--port PORT] [--model NAME]     (make chat MODEL=)

/model NAME switches to another model, /new starts a new conversation, Ctrl-D ends. The server renders the messages with
the template used in training and samples as the evaluation does, greedily. Input may also be piped in, one message per
line; then only the answers are printed.
"""

import sys

from trnlora.cli import add_params, add_server, script_parser, server_address
from trnlora.errors import UserError, run
from trnlora.params import load_params
from trnlora.serving import client
from trnlora.serving.adapters import TUNED


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    add_server(parser)
    parser.add_argument("--model", default=TUNED, help="base or an adapter's name (default: %(default)s)")
    args = parser.parse_args()
    params = load_params(args.params)
    url = client.base_url(*server_address(args, params))
    names = client.served_models(url)
    model = client.check_model(args.model, names)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (gives input() line editing and a history)

        print(f"models: {', '.join(names)}; commands: /model NAME, /new, Ctrl-D")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input(f"{model}> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/new":
            messages.clear()
        elif line.startswith("/model"):
            try:
                model = client.check_model(line.removeprefix("/model").strip(), names)
            except UserError as error:
                print(error)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = client.chat(url, model, messages, params.eval.max_tokens).text
            messages.append({"role": "assistant", "content": answer})
            print(answer, flush=True)


if __name__ == "__main__":
    run(main)
