"""Serve the base model as `base` and adapters by name with vLLM's OpenAI-compatible server, until Ctrl-C.

On Trainium, a vllm-neuron that does not load adapters serves the merged model alone, as `tuned`.

    python tools/serve.py [--params FILE] [--host HOST] [--port PORT] [--adapters NAME=FOLDER …] [--dry-run]
    python tools/serve.py --bundle FILE       the adapter of another machine's `make bundle`, as `tuned`
    python tools/serve.py --replicas N …      several engines behind one address, which share the requests
    python tools/serve.py --container IMAGE … on Trainium: the same server in a container

(make serve HOST= PORT= ADAPTERS= BUNDLE= REPLICAS=). The default adapter is the pipeline's, as `tuned`.

Chat requests are rendered with the template that the adapters were trained with, and sampled as the adapters were
evaluated (greedily) unless a request says otherwise: as trnlora.json in their folders has it, whatever params.yaml and
the model's generation_config.json say. Adapters that contradict each other, or the model, are refused.

The API key is read only from the environment (VLLM_API_KEY); without a key the server binds only to loopback addresses.
With it, every request but GET /health must have it: Authorization: Bearer KEY. trnlora/serving/access.py lists the
routes that are served.
"""

import argparse
import contextlib
import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

from trnlora import paths
from trnlora.backends import neuron_machine
from trnlora.backends.python_environment import with_own_bin
from trnlora.cli import add_params, add_server, script_parser, server_address, whole_number
from trnlora.errors import UserError, run
from trnlora.files import locked
from trnlora.params import Params, load_params
from trnlora.serving.adapters import BASE, TUNED, Adapter, check_adapters
from trnlora.serving.client import api_key, base_url
from trnlora.serving.prompts import template_to_serve
from trnlora.serving.server import check_address, supervise
from trnlora.serving.vllm_args import ROOT, environment, serve_command, server_environment
from trnlora.serving.vllm_neuron import LORA_JSON, container_command, neuron_launch


def main() -> None:
    args = parse_arguments()
    params = load_params(args.params)
    host, port = server_address(args, params)
    check_address(host, port, has_key=api_key() is not None)
    with contextlib.ExitStack() as reading:  # no stage replaces what vLLM is still loading
        for source in (paths.MODEL, paths.ADAPTER, paths.MERGED):
            reading.enter_context(locked(source, shared=True))
        serve(args, params, host, port, reading.close)


def serve(args: argparse.Namespace, params: Params, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Check the adapters, and run the server until it ends. on_ready: called when vLLM has loaded everything."""
    adapters = check_adapters(args.adapters, params)
    # vLLM leaves sockets in its temporary folder; here they are deleted with it. Linux limits a socket's path to 107
    # characters, which a long TMPDIR would exceed.
    short = None if len(tempfile.gettempdir()) <= 50 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="vllm-serve-", dir=short) as folder:
        scratch = Path(folder)
        template = scratch / "chat_template.jinja"
        template.write_text(template_to_serve(adapters, params).jinja, encoding="utf-8")
        launch = launch_on_neuron if params.on_trainium else launch_vllm
        env, command, names = launch(args, params, host, port, adapters, template)
        if args.dry_run:
            print_launch(env, command, scratch)
            return
        if params.on_trainium:
            neuron_machine.check_free_cores(params.convert.tp_size, params.neuron.logical_core_size)
        supervise(command, env | {"TMPDIR": folder}, base_url(host, port), names, on_ready)


def parse_arguments() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_params(parser)
    add_server(parser)
    parser.add_argument(
        "--adapters",
        nargs="+",
        action="extend",
        metavar="NAME=FOLDER",
        help="PEFT folders, or bundles (default: tuned=artifacts/adapter)",
    )
    parser.add_argument("--bundle", metavar="FILE", help="short for --adapters tuned=FILE")
    parser.add_argument(
        "--replicas",
        type=whole_number(1, 1000),
        default=1,
        metavar="N",
        help="engines behind this address (vLLM's data parallelism)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and its environment, start nothing")
    parser.add_argument("--container", metavar="IMAGE", help="on Trainium: run the server in this image of AWS")
    args = parser.parse_args()
    if args.bundle:
        if not Path(args.bundle).is_file():
            raise UserError(f"there is no file {args.bundle}: name one that `make bundle` has written")
        args.adapters = [*(args.adapters or []), f"{TUNED}={args.bundle}"]
    return args


def launch_vllm(
    args: argparse.Namespace, params: Params, host: str, port: int, adapters: list[Adapter], template: Path
) -> tuple[dict[str, str], list[str], list[str]]:
    """Environment and command of the server on a CPU or on GPUs, and the names of its models."""
    command = serve_command(params, host, port, template, adapters)
    if args.replicas > 1:
        command += ["--data-parallel-size", str(args.replicas)]
    env = environment(params) | server_environment(params.serve.runtime_adapters)
    return env, command, [BASE, *(adapter.name for adapter in adapters)]


def launch_on_neuron(
    args: argparse.Namespace, params: Params, host: str, port: int, adapters: list[Adapter], template: Path
) -> tuple[dict[str, str], list[str], list[str]]:
    """The same of the server on Trainium. Raises UserError for what it does not support there."""
    if args.replicas > 1:
        raise UserError("on Trainium there is one replica per address: start several, behind launch/nginx.conf")
    if args.adapters:
        raise UserError("on Trainium only the pipeline's adapter is served: omit ADAPTERS= and BUNDLE=")
    server = neuron_launch(params, adapters[0], host, port, template, in_container=args.container is not None)
    env = server.env | server_environment(runtime_adapters=False)
    if args.container:
        folders = list(dict.fromkeys([Path.cwd(), ROOT, template.parent, server.compiled]))
        env["PYTHONPATH"] = str(ROOT)  # not this machine's own
        return {}, container_command(env, server.command, args.container, folders), server.models
    own_bin = {"PATH": with_own_bin(server.command[0], os.environ["PATH"])}
    return env | own_bin, server.command, server.models


def print_launch(env: dict[str, str], command: list[str], scratch: Path) -> None:
    """Print what would be started, without the API key."""
    print(" ".join(f"{name}={shlex.quote(value)}" for name, value in env.items()))
    print(shlex.join(command))
    lora_json = scratch / LORA_JSON
    if lora_json.exists():
        print(f"{lora_json.name}: {lora_json.read_text('utf-8')}")
    key = "set" if api_key() else "not set"
    print(f"(VLLM_API_KEY: {key}; the command's files are written to a temporary folder)")


if __name__ == "__main__":
    run(main)
