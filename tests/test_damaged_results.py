"""Files of a run that were damaged or written by hand, and odd revisions: the tools end in one clear line."""

import contextlib
import html
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.project import Project, copy_project
from support.results import answer

from trnlora.errors import UserError
from trnlora.reporting.page import write_report
from trnlora.reporting.results import load_results

pytestmark = pytest.mark.slow  # a DVC project

ANSWERS = "artifacts/answers.jsonl"
EVAL = "metrics/eval_vllm.json"
DATA = "metrics/prepare_data.json"
LOSS = "plots/training/plots/metrics/train/loss.tsv"


@pytest.fixture(scope="module")
def recorded(recorded_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copy_project(recorded_project, tmp_path_factory.mktemp("damaged") / "project")


@pytest.fixture
def here(recorded: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(recorded.root)
    return recorded


@contextlib.contextmanager
def overwritten(path: str, content: bytes) -> Iterator[None]:
    before = Path(path).read_bytes()
    Path(path).write_bytes(content)
    try:
        yield
    finally:
        Path(path).write_bytes(before)


def shortened(value: str | bytes) -> str:
    """The name of a test's case: whole files would be long."""
    return value if isinstance(value, str) else repr(value[:20])[2:-1]


def row(**values: Any) -> bytes:
    return json.dumps(answer(1, "a", "b", "c") | values).encode()


def metrics(file: str, key: str, value: Any) -> bytes:
    """A metrics file of this repository with one value replaced."""
    found = json.loads((ROOT / file).read_text("utf-8"))
    *parents, last = key.split("/")
    inner = found
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (ANSWERS, b"\xff\x00", "is not valid UTF-8"),
        (ANSWERS, b"1\n", "line 1 is not a JSON object"),
        (ANSWERS, b"\n\n", "line 1 is not valid JSON"),
        (ANSWERS, b"[" * 100_000, "nested too deeply"),
        (ANSWERS, row() + b'\n{"id": 2}', "line 2: category is missing; prompt is missing"),
        (ANSWERS, row(id=[1]), "line 1: id: Input should be a valid integer"),
        (ANSWERS, row(base=None), "line 1: base: Input should be a valid string (it is None)"),
        (ANSWERS, row(tuned_exact="maybe"), "line 1: tuned_exact: Input should be a valid boolean"),
        (ANSWERS, row(tuned="\ud800"), "line 1 contains half of a surrogate pair"),
        (EVAL, b"", "is not valid JSON"),
        (EVAL, b"[]", "it must hold keys and values"),
        (EVAL, b"\xff", "is not valid UTF-8"),
        (EVAL, b'{"a":' * 100_000, "nested too deeply"),
        (EVAL, metrics(EVAL, "base/\ud800", 1), "contains half of a surrogate pair"),
        (EVAL, metrics(EVAL, "tuned/exact_match", "0.9"), "tuned.exact_match is '0.9', which is not a finite number"),
        (EVAL, metrics(EVAL, "tuned/rouge1", [1]), "tuned.rouge1 is '[1]', which is not a finite number"),
        (EVAL, metrics(EVAL, "tuned/bleu", float("nan")), "tuned.bleu is 'nan', which is not a finite number"),
        (EVAL, metrics(EVAL, "prompts", True), "prompts is 'True', which is not a finite number"),
        (EVAL, metrics(EVAL, "prompts", 10**400), "which is not a finite number"),
        (DATA, metrics(DATA, "rows_by_category/closed_qa", "x"), "rows_by_category.closed_qa is 'x', which is not"),
        (LOSS, b"step\tloss\n1\t0.5\nx\t1\n", "line 3 is not a step and a finite number"),
        (LOSS, b"step\tloss\n1\n", "line 2 is not a step and a finite number"),
        (LOSS, b"step\tloss\n1\tnan\n", "line 2 is not a step and a finite number"),
        (LOSS, b"step\tloss\n-1\t1\n", "line 2 is not a step and a finite number"),
        (LOSS, b"\xff\xfe", "is not valid UTF-8"),
        ("dvc.lock", b"- 1\n", "it must hold keys and values"),
        ("dvc.lock", b"\x00", "is not valid YAML"),
        ("dvc.lock", b"\xff", "`git checkout dvc.lock`"),
        ("dvc.lock", b"stages: {fetch_model: {deps: 3}}\n", "stages.fetch_model.deps: Input should be a valid list"),
        ("dvc.lock", b"stages: {prepare_data: {cmd: x, params: {params.yaml: {data.source: 5}}}}\n", "data.source"),
    ],
    ids=shortened,
)
def test_a_damaged_file_ends_in_one_line(here: Project, file: str, content: bytes, message: str) -> None:
    with overwritten(file, content), pytest.raises(UserError) as error:
        write_report(Path("reports"), load_results())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert file in str(error.value) or "data.source" in message
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (ANSWERS, row(category="[/red] | <b>$x$", base="\x00\x1b[31m")),
        (ANSWERS, row(id=10**400)),
        (EVAL, metrics(EVAL, "base/[%x]", "[/y]")),
        (EVAL, metrics(EVAL, "tuned/exact_match", None)),
        (DATA, metrics(DATA, "rows_by_category", {"a": 0})),
        (LOSS, b"step\tloss\n1\t-1\n2\t0\n"),
        ("params.yaml", b"lora: ["),
        ("params.yaml", b"- 1"),
        ("params.yaml", b"x: 2026-01-01"),
        ("params.yaml", b"\xff"),
    ],
    ids=shortened,
)
def test_what_is_odd_but_readable_is_shown(here: Project, file: str, content: bytes, tmp_path: Path) -> None:
    """With a line that says what is not of the run."""
    with overwritten(file, content):
        now = load_results()
        page, _ = write_report(tmp_path, now)
        assert now.notes
        assert now.notes[0] in html.unescape(page.read_text("utf-8"))


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("README.md", "unknown Git revision 'README.md'"),
        ("HEAD:README.md", "'HEAD:README.md' is not a commit but a file or folder of one"),
        ("HEAD^{tree}", "is not a commit but a file or folder of one"),
        ("a b", "unknown Git revision 'a b'"),
        ("workspace", "unknown Git revision 'workspace'"),
        ("-1", "unknown Git revision '-1'"),
        ("HEAD~99", "unknown Git revision 'HEAD~99'"),
        ("HEAD@{99}", "unknown Git revision"),
        ("x" * 300, "unknown Git revision 'xxx"),
    ],
)
def test_an_odd_revision_ends_in_one_line(here: Project, revision: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_results(revision)
    assert message in str(error.value)
    assert str(error.value).endswith(("name a commit, branch, tag or experiment", "name the commit"))


def test_names_of_a_commit_that_are_odd_but_right(here: Project, tmp_path: Path) -> None:
    """rich's markup, TeX in a chart's legend and HTML in the name of a revision; the same revision twice."""
    here.run("git", "tag", "-a", "-f", "-m", "annotated", "$x2(red]<b>")
    name = "$x2(red]<b>"
    now = load_results(name)
    assert now.notes == []
    page, _ = write_report(tmp_path, now, [load_results(name)])
    assert "<b>(red" not in page.read_text("utf-8")
    printed = here.run(".venv/bin/python", "tools/compare.py", name, "HEAD^{/Results}", "--samples", "0")
    assert printed.splitlines()[:2] == ["Params: no difference", "Metrics: no difference"]


def test_a_shallow_clone_and_a_folder_without_git(
    here: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    here.run("git", "clone", "-q", "--depth", "1", f"file://{here.root}", str(clone))
    monkeypatch.chdir(clone)
    assert load_results().notes == load_results("HEAD").notes == []
    with pytest.raises(UserError, match="unknown Git revision 'HEAD~1'"):
        load_results("HEAD~1")
    (clone / ".git").rename(tmp_path / "git")
    (note,) = load_results().notes
    assert note.startswith("unknown whether the results are of these params, code and data: ")
    assert write_report(tmp_path / "reports", load_results())
    with pytest.raises(UserError, match="name a commit"):
        load_results("HEAD")


@pytest.mark.parametrize("samples", ["-1", "x"])
def test_a_number_of_samples(here: Project, samples: str) -> None:
    printed = here.run(".venv/bin/python", "tools/compare.py", f"--samples={samples}", check=False)
    assert f"error: argument --samples: {samples!r} is not a whole number from 0 to 1000000" in printed


def test_terminals_without_unicode_and_closed_pipes(here: Project) -> None:
    tool = [sys.executable, "tools/show_metrics.py"]
    env = here.env | {"PYTHONIOENCODING": "ascii", "LC_ALL": "POSIX"}
    with overwritten(EVAL, metrics(EVAL, "base/→", 1)):
        done = subprocess.run(tool, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"modified since the run: metrics/eval_vllm.json" in done.stdout
    piped = subprocess.run(
        ["bash", "-c", f"{' '.join(tool)} | true"],
        env=here.env | {"PYTHONUNBUFFERED": "1"},
        capture_output=True,
        check=False,
    )
    assert piped.stderr == b""
