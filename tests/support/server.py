"""The tools as a user runs them, and vLLM's server behind `tools/serve.py`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from support import ROOT
from support.forked import run_forked


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def script(name: str, *arguments: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the project, e.g. tools/smoke.py, in the folder `cwd`."""
    clean = {key: value for key, value in os.environ.items() if key not in ("VLLM_API_KEY", "VLLM_LOGGING_LEVEL")}
    return run_forked(ROOT / name, *map(str, arguments), cwd=cwd, env=clean | env)


def assert_one_line(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    """Check that it failed with one line that contains these fragments."""
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(fragment in line for fragment in fragments), line


class Server:
    """`tools/serve.py` in the background, ready to answer. Its temporary files and its log are in `tmp`."""

    def __init__(self, workdir: Path, tmp: Path, *arguments: str, **secrets: str) -> None:
        self.port = free_port()
        self.log = tmp / "serve.log"
        env = {key: value for key, value in os.environ.items() if key not in ("VLLM_API_KEY", "VLLM_LOGGING_LEVEL")}
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                [sys.executable, str(ROOT / "tools" / "serve.py"), "--port", str(self.port), *arguments],
                cwd=workdir,
                env=env | {"TMPDIR": str(tmp)} | secrets,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        while "ready: " not in self.log.read_text("utf-8"):
            assert self.process.poll() is None, self.log.read_text("utf-8")
            time.sleep(0.2)

    def request(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as reply:
            return json.load(reply)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as reply:
            return str(reply.read().decode())

    def complete(self, model: str, prompt: str, max_tokens: int = 16) -> str:
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        return str(self.request("/v1/completions", **body)["choices"][0]["text"])

    def chat(self, model: str, question: str) -> Any:
        messages = [{"role": "user", "content": question}]
        return self.request("/v1/chat/completions", model=model, messages=messages, max_tokens=16, temperature=0)

    def unload(self, adapter: str) -> None:
        data = json.dumps({"lora_name": adapter}).encode()
        url = f"http://127.0.0.1:{self.port}/v1/unload_lora_adapter"
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})):
            pass

    def stop(self) -> None:
        """SIGTERM, if it is running, which leaves neither a process nor a file but the log."""
        if not self.process.is_running():
            return
        family = self.process.children(recursive=True)
        self.process.terminate()
        assert self.process.wait(timeout=60) == 0
        assert not [process for process in family if process.is_running()]
        assert list(self.log.parent.iterdir()) == [self.log]  # the folder of the chat template is gone
        assert self.log.read_text("utf-8").endswith("stopped\n")
