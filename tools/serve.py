"""Serve the base model as `base` and adapters by name behind vLLM's OpenAI-compatible server, until Ctrl-C.

    python tools/serve.py [--params FILE] [--host HOST] [--port PORT] [--adapters NAME=FOLDER …] [--dry-run]
    python tools/serve.py --replicas N …      several engines behind the one address, which share the load
    python tools/serve.py --container IMAGE … on Trainium: the same server in a container

(make serve HOST= PORT= ADAPTERS= REPLICAS=). The default adapter is the pipeline's, as `tuned`.

Chat requests are rendered with the template that training used (data.prompt_template). The API key comes from the
environment alone, VLLM_API_KEY; without one the server binds to loopback addresses only.
"""

import argparse
import contextlib
import ipaddress
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.backends import nxd_environment as trainium
from trnlora.data import templates
from trnlora.errors import UserError, run
from trnlora.params import Params, load_params
from trnlora.serving import adapters as peft_folder
from trnlora.serving import vllm_args as serving

STOP_SECONDS = 20  # from SIGTERM to SIGKILL
ENGINE_DIED = "EngineDeadError"  # vllm/v1/engine/exceptions.py: all that its server says of an engine's end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, help="params file (default: %(default)s)")
    parser.add_argument("--host", help="address to bind (default: serve.host)")
    parser.add_argument("--port", type=int, help="port to bind (default: serve.port)")
    parser.add_argument(
        "--adapters", nargs="+", metavar="NAME=FOLDER", help="PEFT folders (default: tuned=artifacts/adapter)"
    )
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="engines behind this one address (vLLM's data parallelism)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and its environment, start nothing")
    parser.add_argument("--container", metavar="IMAGE", help="backend nxd: run the server in this image of AWS's")
    args = parser.parse_args()

    if args.replicas < 1:
        raise UserError(f"--replicas {args.replicas}: give 1 or more")
    params = load_params(args.params)
    host = args.host or params.serve.host
    port = args.port if args.port is not None else params.serve.port
    check_address(host, port, has_key=bool(os.environ.get("VLLM_API_KEY")))
    adapters = checked_adapters(args.adapters, params)
    env = serving.environment(params)
    # vLLM then takes any folder that a client names, unchecked: see tools/load_adapter.py.
    env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1" if params.serve.runtime_adapters else "0"

    # vLLM's sockets go there, whose paths Linux limits to 107 characters: too few below a long TMPDIR.
    short = None if len(tempfile.gettempdir()) <= 50 else "/tmp"
    with tempfile.TemporaryDirectory(prefix="vllm-serve-", dir=short) as scratch:
        template = Path(scratch) / "chat_template.jinja"
        template.write_text(chat_template(params), encoding="utf-8")
        if params.backend == "nxd":
            if args.replicas > 1:
                raise UserError("backend nxd serves one replica an address: start several, behind launch/nginx.conf")
            if args.adapters:
                raise UserError("backend nxd serves the pipeline's adapter alone: leave ADAPTERS= out")
            python = params.neuron.vllm_python or sys.executable
            line = serving.neuron_line(trainium.installed(python, ("vllm", "vllm-neuron")) or {})
            lora_json = Path(scratch) / "lora.json"
            lora_json.write_text(json.dumps(serving.lora_json()), encoding="utf-8")
            env, command = serving.neuron_command(params, line, host, port, template, lora_json)
            if args.container:
                env, command = {}, serving.neuron_container(env, command, args.container, [Path.cwd(), Path(scratch)])
        else:
            command = serving.serve_command(params, host, port, template, adapters)
            if args.replicas > 1:
                command += ["--data-parallel-size", str(args.replicas)]
        if args.dry_run:
            key = "VLLM_API_KEY: set" if os.environ.get("VLLM_API_KEY") else "VLLM_API_KEY: not set"
            print(" ".join(f"{name}={shlex.quote(value)}" for name, value in env.items()))
            print(shlex.join(command))
            if params.backend == "nxd":
                print(f"{lora_json.name}: {lora_json.read_text('utf-8')}")
            print(f"({key}; the files of the command are written to a temporary folder)")
            return
        # vLLM leaves sockets in its temporary folder; in ours they go with it.
        names = [serving.BASE, *(adapter.name for adapter in adapters)]
        supervise(command, env | {"TMPDIR": scratch}, serving.base_url(host, port), names)


def checked_adapters(pairs: list[str] | None, params: Params) -> list[peft_folder.Adapter]:
    """The pipeline's adapter, or those of `pairs` (name=folder). Raises UserError for one that would not be applied."""
    if pairs is None:
        return [peft_folder.check_own_adapter(paths.ADAPTER, paths.MODEL, params.lora.r, serving.TUNED)]
    folders = peft_folder.parse_adapters(pairs)
    return [peft_folder.check_adapter(folder, paths.MODEL, name) for name, folder in folders.items()]


def check_address(host: str, port: int, has_key: bool) -> None:
    """Raise UserError unless `host`:`port` can be bound, and is on loopback or behind an API key."""
    if not 1 <= port <= 65535:
        raise UserError(f"port {port} is not in 1..65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"host {host} is not known ({error.strerror}): give an address of this machine") from None
    family, kind, protocol, _, address = found[0]
    if not has_key and not all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found):
        raise UserError(
            f"refusing to serve on {host}, which other machines can reach, without an API key: "
            "set VLLM_API_KEY in the environment, or bind 127.0.0.1"
        )
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is no obstacle
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            raise UserError(
                f"cannot bind {host} port {port} ({error.strerror}): stop what uses it, or take another with PORT=8001"
            ) from None


def chat_template(params: Params) -> str:
    """The Jinja source of data.prompt_template."""
    tokenizer: Any = None
    if params.data.prompt_template == "chat":  # the tokenizer's own: the only one that needs transformers' import
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(paths.MODEL)
    return templates.chat_template(params.data.prompt_template, tokenizer)


def supervise(command: list[str], env: dict[str, str], url: str, models: list[str]) -> None:
    """Run the server in a process group of its own until it ends or a signal comes, and leave nothing of it behind.

    What it prints while it starts and stops (warnings of its libraries), and more than the last line of tracebacks, is
    shown only when VLLM_LOGGING_LEVEL is set.
    Raises UserError with the reason when it ends on its own.
    """
    verbose = "VLLM_LOGGING_LEVEL" in os.environ
    stopping = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: stopping.set())
    server = subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches us alone, and killpg reaches its children
    )
    try:
        kept: deque[str] = deque(maxlen=1000)
        ready = threading.Event()
        reader = threading.Thread(target=relay, args=(server, kept, ready, stopping, verbose), daemon=True)
        reader.start()
        print(f"starting vLLM for {url} …", flush=True)
        while server.poll() is None and not stopping.wait(0.5):
            if not ready.is_set() and is_healthy(url):
                ready.set()
                print(f"ready: {url}/v1, models {', '.join(models)}; Ctrl-C stops it", flush=True)
        if not stopping.is_set():
            reader.join(timeout=STOP_SECONDS)  # the last lines say why
            what = f"vLLM's server ended on its own (exit code {server.returncode})"
            raise UserError(serving.failure(what if ready.is_set() else "vLLM did not start", reason([*kept])))
    finally:
        stop(server)
    print("stopped", flush=True)


def relay(
    server: "subprocess.Popen[str]",
    kept: deque[str],
    ready: threading.Event,
    stopping: threading.Event,
    verbose: bool,
) -> None:
    """Print the server's lines between ready and its end, or all if `verbose`.

    In `kept` are the lines since the last request that was answered: they tell why it ended.
    """
    assert server.stdout is not None
    in_traceback = dead = False
    for line in server.stdout:
        text = re.sub(r"^\(\w+ pid=\d+\) (ERROR \S+ \S+ \[[^]]*\] )?", "", line)  # vLLM's mark of process and place
        in_traceback = text.startswith("Traceback (") or (in_traceback and text[:1].isspace())
        dead = dead or ENGINE_DIED in text
        if verbose or (ready.is_set() and not (stopping.is_set() or in_traceback or dead)):
            sys.stdout.write(line)
            sys.stdout.flush()
        kept.append(line)
        if line.endswith(" 200 OK\n"):
            kept.clear()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def reason(lines: list[str]) -> str:
    """The first exception that the server's output names: those after it only say that the engine did not live."""
    for number, line in enumerate(lines):
        if ENGINE_DIED in line:
            return "its engine was killed; where nobody did it, the memory was full: see dmesg"
        if match := re.search(r"\b[\w.]*(?:Error|Exception): +(\S.*)", line):
            # pydantic counts the errors in its first line and tells them in the next ones, each with its [type=…]
            told = [text.split(" [type=")[0] for text in lines[number + 1 : number + 3] if " [type=" in text]
            return [match[1], *told][-1]
    return lines[-1].strip() if lines else "it printed nothing"


def stop(server: "subprocess.Popen[str]") -> None:
    """SIGTERM to the server, which ends its engine; whatever is left of its process group after a while is killed."""
    with contextlib.suppress(ProcessLookupError):
        server.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while group_alive(server.pid) and time.monotonic() < deadline:
        server.poll()  # reaps it, or it would count as alive
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    run(main)
