"""The environment: lock file and Makefile. No test installs a package."""

import ast
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from typing import ClassVar

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from support import ROOT

from trnlora import requirements
from trnlora.profiles import profile_text


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """requirements.* read the files of the working directory."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def make(tmp_path: Path) -> "Make":
    return Make(tmp_path)


class Make:
    """`make` with this Makefile in a separate folder, without the variables of a calling make."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in (
            "Makefile",
            "pyproject.toml",
            "requirements.lock",
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
    locked = requirements.locked()
    for name, specifier in requirements.group("dev").items():
        assert SpecifierSet(specifier).contains(locked[name]), f"{name}{specifier} is locked as {locked[name]}"
    assert not re.search(r"^torch==", lock, re.M)  # installed separately
    for block in re.split(r"^(?=\S)", lock, flags=re.M)[1:]:
        assert "--hash=sha256:" in block, block
    assert not re.search(r"^(nvidia-cu|torchvision|torchaudio|torchcodec)", lock, re.M)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_is_complete_for_every_python(python: str, machine: str) -> None:
    """By what the installed packages say they require there. `make lock` asks the index whether each has a wheel."""
    assert requirements.pythons().contains(python)
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine, "extra": ""
    }  # fmt: skip
    locked = requirements.locked(python, machine)
    for found in distributions():
        name = requirements.normalized(found.name)
        if name in locked:
            if "Requires-Python" in found.metadata:
                assert SpecifierSet(found.metadata["Requires-Python"]).contains(f"{python}.0"), name
            for requirement in map(Requirement, found.requires or []):
                needed = requirements.normalized(requirement.name)
                if (requirement.marker is None or requirement.marker.evaluate(environment)) and (
                    needed not in requirements.left_out()
                ):
                    assert requirement.specifier.contains(locked[needed], prereleases=True), f"{name}: {requirement}"


def test_a_pin_can_be_for_some_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    lines = ("one==1.0 ; python_full_version < '3.12' \\", "one==2.0 ; python_full_version >= '3.12' \\", "two-a==3 \\")
    (tmp_path / "requirements.lock").write_text("".join(f"{line}\n    --hash=sha256:0\n" for line in lines), "utf-8")
    monkeypatch.chdir(tmp_path)
    torch = requirements.group("pipeline")["torch"].lstrip("=")
    assert requirements.locked("3.11") == {"torch": torch, "one": "1.0", "two-a": "3"}
    assert requirements.locked("3.12") == {"torch": torch, "one": "2.0", "two-a": "3"}


def test_the_lock_is_compiled_with_what_torch_requires() -> None:
    """pyproject.toml has a copy, so that `make lock` needs no index with torch's CPU build."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["uv"]
    copies = {copy["name"]: copy for copy in tool["dependency-metadata"]}
    for found in distributions():
        copy = copies.pop(requirements.normalized(found.name), None)
        if copy:
            required = [Requirement(text) for text in found.requires or []]
            without_extras = {str(each) for each in required if each.marker is None}
            assert copy["version"] == found.version.removesuffix("+cpu")
            assert {str(Requirement(text)) for text in copy["requires-dist"]} == without_extras
    assert not copies


def test_what_the_code_imports_is_required() -> None:
    """In the groups themselves, not only as a dependency of another package."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.split() if not name.startswith("tests/neuron/")]
    imported = set()
    for name in files:
        for node in ast.walk(ast.parse((ROOT / name).read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    providers = packages_distributions()
    required = requirements.group("dev").keys() | {"trnlora"}
    found = {name: {requirements.normalized(provider) for provider in providers.get(name, [])} for name in imported}
    assert found["yaml"] == {"pyyaml"}
    assert not {name: by for name, by in found.items() if by and not by & required}


def test_the_neuron_environment_gets_the_locked_versions() -> None:
    """`uv pip install --group neuron` in AWS's environment installs the versions that this project is tested with."""
    locked = requirements.locked()
    neuron = requirements.group("neuron")
    assert neuron == {name: f"=={locked[name]}" for name in neuron}
    assert not {"torch", *requirements.left_out()} & neuron.keys()


def test_no_package_of_the_cuda_build_is_installed() -> None:
    installed = {found.name.lower(): found.version for found in distributions()}
    assert requirements.left_out() == ["torchvision", "torchaudio", "torchcodec"]
    assert not set(requirements.left_out()) & installed.keys()
    assert not [name for name in installed if name.startswith("nvidia-cu")]
    assert installed["torch"].endswith("+cpu")


def test_tests_that_share_a_fixture_run_in_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist goes by the group at the end of a test's id. If it adds none, it says nothing about it."""
    marks = [(item.nodeid, item.get_closest_marker("xdist_group")) for item in request.session.items]
    grouped = [(nodeid, mark.args[0]) for nodeid, mark in marks if mark]
    if not request.config.getoption("loadgroup", default=False) or not grouped:
        pytest.skip("needs --dist loadgroup, as in `make test`, and tests that share a fixture")
    assert not [nodeid for nodeid, group in grouped if not nodeid.endswith(f"@{group}")]


def test_help_names_every_target(make: Make) -> None:
    (declared,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for arguments in ((), ("help",)):
        shown = re.findall(r"^  make ([\w-]+) +\S", make.run(*arguments).stdout, re.M)
        assert shown == declared.split()


def test_profile_is_written(make: Make) -> None:
    (make.root / ".venv").symlink_to(sys.prefix)
    made = "--old-file=.venv/.ready"  # do not make it again, although the copies of its prerequisites are newer
    done = make.run(made, "profile", "NAME=llama3-8b-trn2-nxd")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("params.yaml is now profiles/llama3-8b-trn2-nxd.yaml; 'git diff params.yaml' shows")
    written = (make.root / "params.yaml").read_text("utf-8")
    assert written == profile_text("llama3-8b-trn2-nxd", ROOT / "profiles")
    for arguments in (("profile",), ("profile", "NAME=no-such"), ("profile", "NAME=../params")):
        done = make.run(made, *arguments)
        assert done.returncode != 0
        assert "use NAME= with one of llama3-70b-trn2 llama3-8b-trn1 llama3-8b-trn2 " in done.stderr
    assert (make.root / "params.yaml").read_text("utf-8") == written


def test_a_wrong_python_is_named(make: Make) -> None:
    done = make.run("setup", "PYTHON=/bin/false")
    assert done.returncode != 0
    assert "error: Python 3.11 to 3.14 is needed and /bin/false is not that" in done.stderr
    assert not (make.root / ".venv").exists()


def test_the_pythons_are_those_of_pyproject(make: Make) -> None:
    text = (make.root / "pyproject.toml").read_text("utf-8")
    (make.root / "pyproject.toml").write_text(text.replace('">=3.11,<3.15"', '">=3.8,<3.10"'), "utf-8")
    done = make.run("setup", f"PYTHON={sys.executable}")
    assert f"error: Python 3.8 to 3.9 is needed and {sys.executable} is not that" in done.stderr


def test_setup_neuron_refuses_a_python_without_wheels(make: Make) -> None:
    python = make.root / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 3.11\n", "utf-8")
    python.chmod(0o755)
    done = make.run("--old-file=.venv/.ready", "setup-neuron")
    assert done.returncode != 0
    assert "error: torch-neuronx needs Python 3.12 or newer and .venv has 3.11: remove .venv" in done.stderr


@pytest.mark.slow
def test_a_failed_setup_starts_over_next_time(make: Make) -> None:
    """The installer cannot be downloaded: one line reports it, and the next call starts over."""
    (make.root / "requirements.lock").write_text(f"uv==0.0.1 \\\n    --hash=sha256:{'0' * 64}\n", "utf-8")
    for _ in range(2):
        done = make.run("setup", f"PYTHON={sys.executable}", PIP_NO_INDEX="1", PIP_FIND_LINKS="/nowhere")
        assert done.returncode != 0
        assert "uv==0.0.1" in done.stderr
        assert not (make.root / ".venv/.ready").exists()


class Osv(http.server.BaseHTTPRequestHandler):
    """OSV's query API, with one known vulnerability."""

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


@pytest.mark.slow
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
    assert sorted(Osv.asked) == sorted([*requirements.locked(), "vllm"])

    done = subprocess.run([*command, url], cwd=ROOT, capture_output=True, text=True)  # the server is closed now
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: no audit without {url}")
