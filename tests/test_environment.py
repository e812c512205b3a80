"""The environment and what makes it: lock file and Makefile. Nothing here installs a package."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from importlib.metadata import distributions
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import ROOT


@pytest.fixture
def make(tmp_path: Path) -> "Make":
    return Make(tmp_path)


class Make:
    """`make` on this Makefile in a folder of its own, with nothing of the caller's make in its environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (
            "Makefile",
            "pyproject.toml",
            "requirements.in",
            "requirements.lock",
            "overrides.txt",
            "params.yaml",
        ):
            shutil.copyfile(ROOT / name, root / name)
        for name in ("tools", "profiles"):
            shutil.copytree(ROOT / name, root / name)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *arguments]
        return subprocess.run(command, cwd=self.root, env=self.env | env, capture_output=True, text=True)


def test_the_lock_pins_every_requirement_with_a_hash() -> None:
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    locked = {
        name.lower().replace("_", "-"): version for name, version in re.findall(r"^([\w.-]+)==(\S+) \\$", lock, re.M)
    }
    wanted = re.findall(r"^([\w.-]+)(?:==([\w.+*]+))?", (ROOT / "requirements.in").read_text("utf-8"), re.M)
    assert wanted
    for name, version in wanted:
        if name != "torch":  # installed on its own
            assert locked[name.lower()].startswith(version.removesuffix("*")), name
    assert "torch" not in locked
    for block in re.split(r"^(?=\S)", lock, flags=re.M)[1:]:
        assert "--hash=sha256:" in block, block
    assert not re.search(r"^(nvidia-cu|torchvision|torchaudio|torchcodec)", lock, re.M)


def test_nothing_of_the_cuda_build_is_installed() -> None:
    installed = {found.name.lower(): found.version for found in distributions()}
    assert not {"torchvision", "torchaudio", "torchcodec"} & installed.keys()
    assert not [name for name in installed if name.startswith("nvidia-cu")]
    assert installed["torch"].endswith("+cpu")


def test_help_names_every_target(make: Make) -> None:
    (declared,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for arguments in ((), ("help",)):
        shown = re.findall(r"^  make ([\w-]+) +\S", make.run(*arguments).stdout, re.M)
        assert shown == declared.split()


def test_profile_is_written(make: Make) -> None:
    done = make.run("profile", "NAME=llama3-8b-trn2")
    assert done.returncode == 0, done.stderr
    assert (make.root / "params.yaml").read_text("utf-8") == (ROOT / "profiles/llama3-8b-trn2.yaml").read_text("utf-8")
    for arguments in (("profile",), ("profile", "NAME=no-such")):
        done = make.run(*arguments)
        assert done.returncode != 0
        assert "use NAME= with one of llama3-70b-trn2 llama3-8b-trn1 llama3-8b-trn2" in done.stderr


def test_a_wrong_python_is_named(make: Make) -> None:
    done = make.run("setup", "PYTHON=/bin/false")
    assert done.returncode != 0
    assert "error: Python 3.11 is needed and /bin/false is not that" in done.stderr
    assert not (make.root / ".venv").exists()


@pytest.mark.slow
def test_a_setup_that_fails_is_not_taken_for_done(make: Make) -> None:
    """No torch from an index that is not there: one line says so, and the next call starts over."""
    (make.root / "requirements.in").write_text("uv==0.0.1\ntorch==2.13.0\n", "utf-8")
    for _ in range(2):
        done = make.run("setup", f"PYTHON={sys.executable}", PIP_NO_INDEX="1", PIP_FIND_LINKS="/nowhere")
        assert done.returncode != 0
        assert "uv==0.0.1" in done.stderr
        assert not (make.root / ".venv/.ready").exists()


class Osv(http.server.BaseHTTPRequestHandler):
    """OSV's query, with one vulnerability that it knows."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.asked.append(name)
        affected = [{"package": query["package"], "versions": [query["version"]]}]
        found = {"id": "OSV-2026-1", "summary": "Bad", "affected": affected, "modified": "2026-01-01T00:00:00Z"}
        body = json.dumps({"vulns": [found]} if name == "vllm" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_audit_asks_for_all_that_is_installed_and_names_what_it_finds() -> None:
    command = [sys.executable, str(ROOT / "tools/audit.py"), "--osv-url"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = subprocess.run([*command, url], cwd=ROOT, capture_output=True, text=True)
        server.shutdown()
    assert done.returncode == 1
    assert re.search(r"^vllm +[\d.]+ +OSV-2026-1", done.stdout, re.M), done.stdout + done.stderr
    assert done.stderr.startswith("error: Found 1 known vulnerability in 1 package: raise")
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text("utf-8"), re.M)
    assert sorted(Osv.asked) == sorted([*locked, "torch", "vllm"])

    done = subprocess.run([*command, url], cwd=ROOT, capture_output=True, text=True)  # nobody listens any more
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: no audit without {url}")
