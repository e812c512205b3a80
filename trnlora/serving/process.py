"""A process with vLLM in it: how it is stopped, and why it ended, from what it printed."""

import contextlib
import os
import re
import signal
import subprocess
import time

STOP_SECONDS = 20  # from SIGTERM to SIGKILL
# vllm/v1/engine/exceptions.py: the only thing the server logs when its engine process dies.
ENGINE_DIED = "EngineDeadError"


def reason(lines: list[str]) -> str:
    """The first exception in the server's output: later ones only say that the engine did not start."""
    for number, line in enumerate(lines):
        if ENGINE_DIED in line:
            return "its engine was killed, by the OOM killer if not by you: see dmesg"
        if match := re.search(r"\b[\w.]*(?:Error|Exception): +(\S.*)", line):
            # pydantic's first line only counts the errors; the next lines describe them, each with its [type=…].
            details = [text.split(" [type=")[0] for text in lines[number + 1 : number + 3] if " [type=" in text]
            return [match[1], *details][-1]
    return lines[-1].strip() if lines else "it printed nothing"


def stop(server: "subprocess.Popen[str]") -> None:
    """Send SIGTERM to the server, which stops its engine; after STOP_SECONDS, kill the rest of its process group."""
    with contextlib.suppress(ProcessLookupError):
        server.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while group_alive(server.pid) and time.monotonic() < deadline:
        server.poll()  # reaps the process, which would count as alive otherwise
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def group_alive(group: int) -> bool:
    """Does the process group have any process?"""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
