"""A quick conversation with a model of the running server, in the terminal.

    python tools/chat.py [--params FILE] [--host HOST] [--port PORT] [--model NAME]     (make chat MODEL=)

/model NAME asks another, /new forgets the conversation, Ctrl-D ends it. The server renders the turns with the template
of training. Lines can be piped in; then only the answers are printed.
"""

import argparse
import sys
from pathlib import Path

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.params import load_params
from trnlora.serving import client
from trnlora.serving import vllm_args as serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, help="params file (default: %(default)s)")
    parser.add_argument("--host", help="address of the server (default: serve.host)")
    parser.add_argument("--port", type=int, help="port of the server (default: serve.port)")
    parser.add_argument("--model", default=serving.TUNED, help="base or an adapter's name (default: %(default)s)")
    args = parser.parse_args()
    params = load_params(args.params)
    url = serving.base_url(args.host or params.serve.host, args.port or params.serve.port)
    names = [model["id"] for model in client.request(url, "/v1/models")["data"]]
    model = known(args.model, names)
    talk = sys.stdin.isatty()
    if talk:
        import readline  # noqa: F401 (input() then edits its line and has a history)

        print(f"models {', '.join(names)}; /model NAME, /new, Ctrl-D")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input(f"{model}> " if talk else "").strip()
        except EOFError:
            return
        if line == "/new":
            messages.clear()
        elif line.startswith("/model"):
            try:
                model = known(line.removeprefix("/model").strip(), names)
            except UserError as error:
                print(error)
        elif line:
            messages.append({"role": "user", "content": line})
            body = {"model": model, "messages": messages, "max_tokens": params.eval.max_tokens, "temperature": 0}
            reply = client.request(url, "/v1/chat/completions", body)["choices"][0]["message"]["content"] or ""
            messages.append({"role": "assistant", "content": reply})
            print(reply, flush=True)


def known(name: str, names: list[str]) -> str:
    if name not in names:
        raise UserError(f"the server has no model {name!r}: it has {', '.join(names)}")
    return name


if __name__ == "__main__":
    run(main)
