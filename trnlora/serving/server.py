"""Running vLLM's server: is its address free, and what it prints until it ends or is stopped."""

import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable

from trnlora.errors import UserError
from trnlora.serving import client
from trnlora.serving.process import ENGINE_DIED, STOP_SECONDS, reason, stop
from trnlora.serving.vllm_args import failure


def check_address(host: str, port: int, has_key: bool, option: str = "PORT=8001") -> None:
    """Raise UserError unless `host`:`port` can be bound and is either on loopback or protected by an API key.

    option: what chooses another port, for the error.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"port {port} is not in 1..65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"host {host} is unknown ({error.strerror}): give an address of this machine") from None
    family, kind, protocol, _, address = found[0]
    if not has_key and not all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found):
        raise UserError(
            f"refusing to serve without an API key on {host}, which other machines can reach: "
            "set VLLM_API_KEY in the environment, or bind 127.0.0.1"
        )
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does, so TIME_WAIT does not block
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            raise UserError(
                f"cannot bind {host} port {port} ({error.strerror}): stop the program that uses it, or choose another "
                f"with {option}"
            ) from None


def supervise(
    command: list[str], env: dict[str, str], url: str, models: list[str], on_ready: Callable[[], None]
) -> None:
    """Run the server in its own process group until it ends or a signal arrives, and leave no process behind.

    on_ready: called when the server answers. What it prints while starting and stopping (warnings of its libraries),
    and all of a traceback but the last line, is shown only if VLLM_LOGGING_LEVEL is set. Raises UserError with the
    reason if the server ends by itself.
    """
    stopping, ready = threading.Event(), threading.Event()
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
        start_new_session=True,  # Ctrl-C reaches only this process, and killpg reaches the server's children
    )
    try:
        kept: deque[str] = deque(maxlen=1000)
        verbose = "VLLM_LOGGING_LEVEL" in os.environ
        reader = threading.Thread(target=relay, args=(server, kept, ready, stopping, verbose), daemon=True)
        reader.start()
        print(f"starting vLLM for {url} …", flush=True)
        while server.poll() is None and not stopping.wait(0.5):
            if not ready.is_set() and is_healthy(url):
                ready.set()
                on_ready()
                print(f"ready: {url}/v1, models {', '.join(models)}; Ctrl-C stops it", flush=True)
        if not stopping.is_set():
            reader.join(timeout=STOP_SECONDS)  # the last lines give the reason
            what = f"vLLM's server ended on its own (exit code {server.returncode})"
            raise UserError(failure(what if ready.is_set() else "vLLM did not start", reason([*kept])))
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
    """Print the server's lines from when it is ready until it stops, or all of them if `verbose`.

    `kept` receives the lines since the last successful request, from which `reason` finds out why the server ended.
    """
    assert server.stdout is not None
    in_traceback = dead = False
    for line in server.stdout:
        text = re.sub(r"^\(\w+ pid=\d+\) (ERROR \S+ \S+ \[[^]]*\] )?", "", line)  # vLLM's prefix: process, time, place
        in_traceback = text.startswith("Traceback (") or (in_traceback and text[:1].isspace())
        dead = dead or ENGINE_DIED in text
        if verbose or (ready.is_set() and not (stopping.is_set() or in_traceback or dead)):
            sys.stdout.write(line)
            sys.stdout.flush()
        kept.append(line)
        if line.endswith(" 200 OK\n"):
            kept.clear()


def is_healthy(url: str) -> bool:
    """Does the server's /health answer 200?"""
    try:
        client.request(url, "/health", timeout=5)
    except UserError:
        return False
    return True
