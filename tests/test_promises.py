"""docs/promises.md names tests that exist. Also the promises that can be checked by reading the source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support import ROOT


def test_every_promise_names_a_test() -> None:
    rows = re.findall(r"^\| (?!promise )([^-].*) \| (.*) \|$", (ROOT / "docs/promises.md").read_text("utf-8"), re.M)
    assert len(rows) > 15
    for promise, held_by in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", held_by)
        assert named, promise
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text("utf-8"), (file, test)


def calls() -> Iterator[tuple[Path, str, dict[str, ast.expr]]]:
    """Every call in the project's code: its file, the text of the called function, and its keyword arguments."""
    for folder in ("trnlora", "stages", "tools", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    yield file, ast.unparse(node.func), {word.arg or "": word.value for word in node.keywords}


def test_nothing_that_is_read_can_run() -> None:
    loads = 0
    for file, function, words in calls():
        assert ast.unparse(words.get("trust_remote_code", ast.Constant(False))) == "False", file
        assert not re.search(r"pickle\.loads?$|yaml\.(unsafe_|full_)?load$|extractall$|unpack_archive$", function), file
        if function == "torch.load":
            loads += 1
            assert ast.unparse(words["weights_only"]) == "True", file
    assert loads
