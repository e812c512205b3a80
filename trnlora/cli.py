"""Command-line arguments that several stages and tools share."""

import argparse
from pathlib import Path

from trnlora import paths
from trnlora.params import Params, load_params
from trnlora.profiles import load_profile


def script_parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose --help prints the script's own docstring as it is written."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def count(text: str) -> int:
    """An argument that is a whole number, 0 or more."""
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of 0 or more")
    return int(text)


def add_params(parser: argparse._ActionsContainer) -> None:
    """Add --params FILE to a parser or a group of one."""
    parser.add_argument(
        "--params", type=Path, default=paths.PARAMS, metavar="FILE", help="params file (default: %(default)s)"
    )


def add_params_or_profile(parser: argparse.ArgumentParser) -> None:
    """Add --params FILE and, in place of it, --profile NAME. `chosen_params` reads the one that was given."""
    group = parser.add_mutually_exclusive_group()
    add_params(group)
    group.add_argument("--profile", metavar="NAME", help="a profile instead of a params file")


def chosen_params(args: argparse.Namespace) -> Params:
    """The params of --params or --profile. Raises UserError where they are not valid."""
    return load_params(args.params) if args.profile is None else load_profile(args.profile)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add --host and --port of vLLM's server. `server_address` reads them."""
    parser.add_argument("--host", help="address of the server (default: serve.host)")
    parser.add_argument("--port", type=int, help="port of the server (default: serve.port)")


def server_address(args: argparse.Namespace, params: Params) -> tuple[str, int]:
    """Host and port of vLLM's server: the arguments, or else serve.host and serve.port."""
    return args.host or params.serve.host, params.serve.port if args.port is None else args.port
