"""Command-line arguments that several stages and tools share."""

import argparse
from pathlib import Path

from trnlora import paths
from trnlora.params import Params


def script_parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose --help prints the script's own docstring as it is written."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_params(parser: argparse.ArgumentParser) -> None:
    """Add --params FILE."""
    parser.add_argument(
        "--params", type=Path, default=paths.PARAMS, metavar="FILE", help="params file (default: %(default)s)"
    )


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add --host and --port of vLLM's server. `server_address` reads them."""
    parser.add_argument("--host", help="address of the server (default: serve.host)")
    parser.add_argument("--port", type=int, help="port of the server (default: serve.port)")


def server_address(args: argparse.Namespace, params: Params) -> tuple[str, int]:
    """Host and port of vLLM's server: the arguments, or else serve.host and serve.port."""
    return args.host or params.serve.host, params.serve.port if args.port is None else args.port
