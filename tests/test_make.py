"""The Makefile hands the values of its variables on as text: neither make nor a shell ever reads them as code.

A recorder stands in place of .venv's Python, DVC and pytest, so that each test sees the very arguments that arrive.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

RECORDER = """#!/bin/sh
printf '%s\\n' "${0##*/}" >"$RECORD"
printf '%s\\0' "$@" >>"$RECORD"
printf '%s' "${PYTEST_ADDOPTS-}" >"$RECORD.addopts"
"""
# Each would create the file `canary` in the working directory if make or a shell expanded or parsed it.
CODE = [
    "$(shell touch canary)",
    "$(touch canary)",
    "`touch canary`",
    "x; touch canary",
    "x'; touch canary; '",
    'x"; touch canary; "',
    "x\ntouch canary\n",
    "x & touch canary &",
    "x | tee canary",
    "x > canary",
    "${IFS+$(touch canary)}",
    "$$(touch canary)",
    "\\'; touch canary #",
    "$(eval $(shell touch canary))",
]
TEXT = ["한국어 * ~ $HOME $ % ! \\ a:b ' \" #", "--help", "-x=y"]

# The variables that a target reads, and what stands before each in the arguments of its program.
ONE_VALUE = {
    "compare": {"SAMPLES": "--samples=", "A": "", "B": ""},
    "sweep": {"NAME": "--name="},
    "card": {"BASE": "--base="},
    "push": {"BASE": "--base=", "REPO": ""},
    "bundle": {"BASE": "--base="},
    "serve": {"HOST": "--host=", "PORT": "--port=", "BUNDLE": "--bundle=", "REPLICAS": "--replicas="},
    "ui": {"HOST": "--host=", "PORT": "--port=", "BUNDLE": "--bundle="},
    "lm-eval": {"HOST": "--host=", "PORT": "--port=", "LIMIT": "--limit="},
    "smoke": {"HOST": "--host=", "PORT": "--port="},
    "chat": {"HOST": "--host=", "PORT": "--port=", "MODEL": "--model="},
    "plan": {"PROFILE": "--profile="},
    "profile": {"NAME": ""},
    "pull-results": {"REV": ""},
}
SEVERAL_VALUES = {  # separated by blanks
    "report": {"COMPARE": "--compare="},
    "sweep": {"SET": ""},
    "serve": {"ADAPTERS": "--adapters="},
    "ui": {"ADAPTERS": "--adapters="},
    "load": {"ADAPTERS": ""},
    "lm-eval": {"TASKS": ""},
    "plan": {"NODES": "--nodes="},
}
VARIABLES = {
    target: [*ONE_VALUE.get(target, {}), *SEVERAL_VALUES.get(target, {})] for target in (ONE_VALUE | SEVERAL_VALUES)
}


class Recorded:
    """`make` in a folder with a space in its name, with recorders in place of what it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "the project"
        programs = self.folder / ".venv/bin"
        programs.mkdir(parents=True)
        for name in ("Makefile", "requirements.lock", "pyproject.toml"):
            shutil.copyfile(ROOT / name, self.folder / name)
        shutil.copytree(ROOT / "tools", self.folder / "tools")
        for name in ("python", "dvc", "pytest"):
            (programs / name).write_text(RECORDER, "utf-8")
            (programs / name).chmod(0o755)
        self.record = folder / "record"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        self.env |= {"RECORD": str(self.record)}
        self.env.pop("PYTEST_ADDOPTS", None)

    def make(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--old-file=.venv/.ready", *words]
        self.record.unlink(missing_ok=True)
        return subprocess.run(command, cwd=self.folder, env=self.env | env, capture_output=True, text=True, check=False)

    def arguments(self, *words: str, **env: str) -> list[str]:
        """The arguments that a target's program gets, without its own name and `--`."""
        done = self.make(*words, **env)
        assert done.returncode == 0, done.stderr
        assert not (self.folder / "canary").exists()
        _, _, arguments = self.record.read_bytes().decode().partition("\n")
        return [word for word in arguments.split("\0")[:-1] if word != "--"][1:]

    def addopts(self) -> str:
        return self.record.with_name("record.addopts").read_text("utf-8")


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


@pytest.mark.parametrize("target", ONE_VALUE)
def test_a_value_arrives_as_it_was_given(recorded: Recorded, target: str) -> None:
    for value in [*CODE, *TEXT]:
        expected = [before + value for before in ONE_VALUE[target].values()]
        found = recorded.arguments(target, *(f"{name}={value}" for name in ONE_VALUE[target]))
        assert [word for word in found if word] == expected


@pytest.mark.parametrize("target", SEVERAL_VALUES)
def test_a_list_is_cut_at_blanks_only(recorded: Recorded, target: str) -> None:
    ((name, before),) = SEVERAL_VALUES[target].items()
    for value in [*CODE, *TEXT]:
        assert recorded.arguments(target, f"{name}={value}") == [before + word for word in value.split()]


@pytest.mark.parametrize("target", VARIABLES)
def test_without_a_value_the_tools_have_their_defaults(recorded: Recorded, target: str) -> None:
    for given in ([], [f"{name}=" for name in VARIABLES[target]]):
        assert [word for word in recorded.arguments(target, *given) if word] == []


@pytest.mark.parametrize(("target", "default"), [("test-fast", "-m 'not slow and not long'"), ("test", "-n 2")])
def test_options_for_pytest(recorded: Recorded, target: str, default: str) -> None:
    for value in CODE:
        recorded.arguments(target, f"ARGS={value}")
        addopts = recorded.addopts()
        assert default in addopts
        assert addopts.endswith(f" {value}")  # after the default, which it may contradict
    recorded.arguments(target, PYTEST_ADDOPTS="-x")
    assert recorded.addopts().startswith("-x ")


@pytest.mark.parametrize("target", ["help", "test-fast", "serve"])
def test_variables_of_the_makefile_itself_cannot_be_code(recorded: Recorded, target: str) -> None:
    """Those that no one is meant to set, and any that is not there."""
    internal = re.findall(r"^(?:override )?(?:export )?(\.?\w+) [:?]?=", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert {"READY", "SERVED", "SHELL", "BENCHMARKS", "GIVEN"} <= set(internal)
    for name in {*internal, "MAKEFILE_LIST", "MAKE", "CURDIR", "OTHER"}:
        for code in ("x; touch canary; echo", "$(shell touch canary)"):
            recorded.make(target, f"{name}={code}")
            assert not (recorded.folder / "canary").exists(), f"{name}={code}"


def test_the_callers_environment_sets_no_variable(recorded: Recorded) -> None:
    """HOST and NAME are set in many shells."""
    names = {name for names in VARIABLES.values() for name in names} | {"SEARCH", "ARGS"}
    for target in ("serve", "sweep", "plan", "compare"):
        assert [word for word in recorded.arguments(target, **dict.fromkeys(names, "x")) if word] == []
    recorded.arguments("test", ARGS="x")
    assert not recorded.addopts().endswith("x")


def test_a_mistyped_variable_is_named(recorded: Recorded) -> None:
    done = recorded.make("plan", "PROFIL=x", "NODES=1 2")
    assert re.fullmatch(r"Makefile:\d+: PROFIL is not a setting of this Makefile \(mistyped\?\)\n", done.stderr)


def test_search_is_a_switch(recorded: Recorded) -> None:
    for value, given in (("1", ["--search"]), ("0", []), ("", []), ("$(touch canary); echo", ["--search"])):
        assert recorded.arguments("plan", f"SEARCH={value}") == given


def test_a_failed_command_fails_its_target(recorded: Recorded) -> None:
    (declared,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for name in ("python", "dvc", "pytest", "ruff", "mypy"):
        (recorded.folder / ".venv/bin" / name).write_text("#!/bin/sh\nexit 3\n", "utf-8")
        (recorded.folder / ".venv/bin" / name).chmod(0o755)
    shutil.copyfile("/bin/false", recorded.folder / "tools/environment.sh")
    for target in set(declared.split()) - {"help", "setup"}:
        assert recorded.make(target).returncode != 0, target


@pytest.mark.parametrize("code", ["x; touch canary", "$(touch canary)", "`touch canary`", "--help", "a b", "*"])
def test_setup_takes_a_program_and_no_code(tmp_path: Path, code: str) -> None:
    project = Recorded(tmp_path)
    shutil.rmtree(project.folder / ".venv")
    done = subprocess.run(["make", "setup", f"PYTHON={code}"], cwd=project.folder, env=project.env, capture_output=True)
    assert f"is needed and {code} is not that" in done.stderr.decode()
    assert done.returncode != 0
    assert not (project.folder / "canary").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("plan", ["--nodes=-1"], "argument --nodes: '-1' is not a whole number from 1 to 10000"),
        ("plan", ["--nodes=0"], "argument --nodes: '0' is not"),
        ("plan", ["--nodes=1000000000"], "argument --nodes: '1000000000' is not"),
        ("plan", ["--nodes=a"], "argument --nodes: 'a' is not"),
        ("plan", ["--nodes=1.5"], "argument --nodes: '1.5' is not"),
        ("plan", ["--nodes=²"], "argument --nodes: '²' is not"),
        ("plan", ["--profile=../params"], "no profile '../params': use one of"),
        ("plan", ["--profile="], "no profile '': use one of"),
        ("write_profile", ["../../etc/passwd"], "no profile '../../etc/passwd': use NAME= with one of"),
        ("write_profile", ["--", "--help"], "no profile '--help': use NAME= with one of"),
        ("write_profile", [""], "no profile ''"),
        ("compare", ["--samples=-1"], "argument --samples: '-1' is not a whole number from 0"),
        ("smoke", ["--port=70000"], "argument --port: '70000' is not a whole number from 1 to 65535"),
        ("smoke", ["--host=http://x"], "--host: it must be a host name or an address, without http://"),
        ("pull_results", ["../x"], "REV '../x' cannot be the name of a folder"),
        ("pull_results", ["/etc"], "REV '/etc' cannot be"),
        ("pull_results", ["a/../../b"], "REV 'a/../../b' cannot be"),
        ("pull_results", ["adapter"], "REV 'adapter' cannot be"),
        ("pull_results", ["a\nb"], r"REV 'a\nb' cannot be"),
        ("push", [""], "REPO=…: write the repository as org/name"),
        ("push", ["mine"], "REPO=mine: write the repository as org/name"),
        ("push", ["a/b/c"], "'a/b/c' is not a valid model name on the hub"),
        ("lm_eval", [], "name the tasks"),
        ("lm_eval", ["--limit=0", "facts"], "--limit: '0' is not a whole number"),
        ("serve", ["--bundle=none.tar.gz"], "there is no file none.tar.gz: name one that `make bundle` has written"),
        ("serve", ["--bundle=data"], "there is no file data"),
        ("sweep", [], "name the params to change"),
        ("sweep", ["train.lr=oops"], "train.lr=oops: train.lr: Input should be a valid number"),
        ("sweep", ["train.lr=1.0e-3,oops"], "train.lr=oops: train.lr: Input should be a valid number"),
        ("sweep", ["train.lr=1.0e-3", "lora.r=8,0"], "train.lr=0.001 lora.r=0: lora.r: Input should be greater"),
        ("sweep", ["train.learning_rate=1"], "train.learning_rate=1:"),
        ("sweep", ["data.source=path://nowhere.jsonl"], "data.source: there is no nowhere.jsonl"),
        ("sweep", ["train.lr=["], "train.lr=[:"),
        ("sweep", ["--name=../dvc", "train.lr=1.0e-3"], "'../dvc' cannot be the name of an experiment"),
        ("sweep", ["--name=--help", "train.lr=1.0e-3"], "'--help' cannot be the name of an experiment"),
        ("sweep", ["other.yaml:a=1"], "only params of params.yaml can be changed"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_wrong_argument_ends_in_one_line(tmp_path: Path, script: str, arguments: list[str], line: str) -> None:
    for name in ("params.yaml", "profiles", "data", "dvc.yaml"):  # without Git: DVC can queue nothing
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, str(ROOT / f"tools/{script}.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    (printed,) = done.stderr.splitlines()
    assert printed.startswith("error: ")
    assert line in printed
