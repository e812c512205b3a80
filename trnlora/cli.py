"""Command-line arguments that several stages and tools share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from trnlora import paths
from trnlora.params import Host, Params, load_params
from trnlora.profiles import load_profile
from trnlora.readers import checked


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong with the arguments in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (--help lists the arguments)\n")


def script_parser(docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose --help prints the script's own docstring as it is written."""
    return Parser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """For `type=` of an argument: a whole number from `least` to `most`, both included."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


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
    parser.add_argument("--port", type=whole_number(1, 65535), help="port of the server (default: serve.port)")


def server_address(args: argparse.Namespace, params: Params) -> tuple[str, int]:
    """Host and port of vLLM's server: the arguments, or else serve.host and serve.port.

    Raises UserError for a host that cannot be one.
    """
    host = checked(args.host, Host, "--host") if args.host else params.serve.host
    return host, params.serve.port if args.port is None else args.port
