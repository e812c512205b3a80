"""Base and adapters side by side in the browser: one prompt, every answer streaming, until Ctrl-C.

    python tools/ui.py [--params FILE] [--host HOST] [--port PORT] [--ui-port PORT] [--adapters …] [--bundle FILE]

(make ui). HOST and PORT are those of the running server; if none answers there, tools/serve.py is started with the
--adapters and the --bundle. The page is only on 127.0.0.1, because it adds the API key (VLLM_API_KEY) to requests. To
open it from another machine, use `ssh -L 7860:127.0.0.1:7860`.
"""

import sys
from pathlib import Path

from trnlora.cli import add_params, add_server, script_parser, server_address, whole_number
from trnlora.errors import run
from trnlora.params import load_params
from trnlora.serving.client import api_key, base_url
from trnlora.serving.server import check_address


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    add_server(parser)
    parser.add_argument(
        "--ui-port", type=whole_number(1, 65535), default=7860, help="port of the page (default: %(default)s)"
    )
    parser.add_argument(
        "--adapters", nargs="+", action="extend", metavar="NAME=FOLDER", help="for tools/serve.py, if it is started"
    )
    parser.add_argument("--bundle", metavar="FILE", help="the same")
    args = parser.parse_args()
    params = load_params(args.params)
    host, port = server_address(args, params)
    url = base_url(host, port)
    api_key()  # an unusable one ends here
    check_address("127.0.0.1", args.ui_port, has_key=True, option="--ui-port 7861")

    import uvicorn

    from trnlora.serving.page import application, running_server

    command = [sys.executable, str(Path(__file__).with_name("serve.py")), "--params", str(args.params)]
    command += ["--host", host, "--port", str(port), *(["--adapters", *args.adapters] if args.adapters else [])]
    command += ["--bundle", args.bundle] if args.bundle else []
    with running_server(url, command):
        app = application(params, url)
        print(f"open http://127.0.0.1:{args.ui_port} · Ctrl-C stops it", flush=True)
        uvicorn.run(app, host="127.0.0.1", port=args.ui_port, log_level="warning")


if __name__ == "__main__":
    run(main)
