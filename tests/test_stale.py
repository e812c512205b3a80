"""What the tools say when params, data, code or files are not those that dvc.lock recorded; and nothing otherwise."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.project import Project

from trnlora.errors import UserError
from trnlora.params import load_params
from trnlora.preflight.packed_rows import packed_rows
from trnlora.recorded import Changes, workspace_changes
from trnlora.reporting.results import load_results

pytestmark = pytest.mark.slow  # each test copies a DVC project

DATA = ["prepare_data", "finetune_lora", "flatten_adapter", "eval_vllm"]  # what depends on the data
ALL = ["fetch_model", "prepare_data", "convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm"]
OLD = "older than what they depend on: "


@pytest.fixture
def here(run_project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(run_project.root)
    return run_project


def append(path: str, text: str = "\n") -> None:
    with Path(path).open("a") as file:
        file.write(text)


def edit_metric(stage: str = "eval_vllm") -> None:
    path = Path(f"metrics/{stage}.json")
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"edited": 1}), "utf-8")


def edit_lock(old: str, new: str) -> None:
    text = Path("dvc.lock").read_text("utf-8")
    assert re.search(old, text), old
    Path("dvc.lock").write_text(re.sub(old, new, text, count=1), "utf-8")


def test_an_unchanged_project_has_no_notes(here: Project) -> None:
    assert workspace_changes() == Changes()
    assert load_results("HEAD").notes == []
    assert here.dvc("status").strip() == "Data and pipelines are up to date."
    # A key that no stage reads is not of the run; comments and the order of keys are not values.
    here.set_params(serve={"port": 9000, "host": "localhost"})
    append("params.yaml", "# a comment\n")
    append("trnlora/params.py", "# code that cannot change an output\n")
    append("data/notes.md")  # in .dvcignore
    assert load_results().notes == []


def test_outputs_that_were_never_pulled_are_not_changes(here: Project) -> None:
    """A fresh clone has metrics and plots, and no artifacts."""
    shutil.rmtree("artifacts")
    shutil.rmtree(".dvc/cache")
    assert workspace_changes() == Changes()
    assert load_results().answers is None
    assert load_results("HEAD").notes == []


@pytest.mark.parametrize(
    ("change", "stages", "said"),
    [
        (lambda p: p.set_params(lora={"r": 64}), ALL[3:], "lora.r 16 → 64"),
        (lambda p: p.set_params(eval={"max_prompts": None}), ALL[5:], "eval.max_prompts 8 → null"),
        (lambda p: p.set_params(data={"columns": {"a": "b"}}), DATA, "data.columns {} → {\"a\": \"b\"}"),
        (lambda p: p.set_params(model={"source": "hf://a/b@c"}), ALL, "model.source path:"),
        (lambda p: append("data/tasks.jsonl"), DATA, "changed: data"),
        (lambda p: append("data/new.csv"), DATA, "changed: data"),
        (lambda p: shutil.rmtree("data"), DATA, "changed: data"),
        (lambda p: append("trnlora/evaluation/scoring.py"), ALL[5:], "changed: trnlora/evaluation/scoring.py"),
        (lambda p: append("trnlora/files.py"), ALL, "changed: trnlora/files.py"),
        (lambda p: Path("stages/eval_vllm.py").unlink(), ALL[5:], "changed: stages/eval_vllm.py"),
        (lambda p: edit_lock("lora.use_rslora: .*", ""), ALL[3:], "lora.use_rslora not recorded → false"),
        (lambda p: edit_lock("cmd: (.*)eval_vllm.py", r"cmd: \1other.py"), ALL[5:], "changed: its command in dvc.yaml"),
    ],
)  # fmt: skip
def test_what_changed_since_the_run_is_named(
    here: Project, change: Callable[[Project], None], stages: list[str], said: str
) -> None:
    change(here)
    notes = load_results().notes
    assert len(notes) == 1
    assert notes[0].startswith(f"stale: the results of {', '.join(stages)} are {OLD}{said}")


def test_a_long_list_is_shortened(here: Project) -> None:
    here.set_params(train={"lr": 1.0, "epochs": 9, "seed": 3, "weight_decay": 0.5, "warmup_ratio": 0.5})
    (note,) = load_results().notes
    assert "train.lr 0.01 → 1.0" in note
    assert " and 1 more; `make repro` updates them" in note
    assert len(load_results().changes.params) == 5


def test_params_are_those_of_the_run(here: Project) -> None:
    before = load_results().params
    here.set_params(lora={"r": 64})
    assert load_results().params == before
    assert before["lora.r"] == 16
    assert "serve.port" not in before
    Path("params.yaml").write_text("lora: [", "utf-8")
    results = load_results()
    assert results.params == before
    assert results.notes[0].startswith("unknown whether the results are of these params, code and data: params.yaml")


@pytest.mark.parametrize(
    "file",
    ["metrics/eval_vllm.json", "metrics/timing/finetune_lora.json", "artifacts/answers.jsonl", "artifacts/adapter/x",
     "artifacts/model/config.json",
     "plots/training/plots/metrics/train/loss.tsv", "plots/exact_match_by_category.json"],
)  # fmt: skip
def test_a_file_that_no_run_wrote_is_named(here: Project, file: str) -> None:
    text = Path(file).read_text("utf-8")
    append(
        file, "200\t0.5\n" if file.endswith("tsv") else text.splitlines()[-1] + "\n" if file.endswith("jsonl") else "\n"
    )
    (note,) = load_results().notes
    out = re.sub(r"^(artifacts/(adapter|model)|plots/training)/.*", r"\1", file)
    assert note == f"modified since the run: {out}; `make repro` updates them"


def test_a_partial_run_is_seen(here: Project) -> None:
    """finetune_lora ran again with r 64, flatten_adapter and eval_vllm did not: the scores are of the old adapter."""
    here.set_params(lora={"r": 64})
    append("artifacts/lora_adapter/x")
    here.dvc("commit", "--force", "--quiet", "finetune_lora")
    (note,) = load_results().notes
    assert note == (
        f"stale: the results of flatten_adapter, eval_vllm are {OLD}lora.r 16 → 64; "
        "flatten_adapter ran before the last finetune_lora (artifacts/lora_adapter); `make repro` updates them"
    )
    assert load_results().params["lora.r"] == 16  # those of the scores
    here.commit("A partial run")
    assert load_results("HEAD").notes[0].startswith("stale (HEAD): the results of flatten_adapter, eval_vllm are ")
    # The same without artifacts on disk
    shutil.rmtree("artifacts")
    assert load_results().notes == [note]


def test_missing_metrics_and_metrics_without_a_run(here: Project) -> None:
    """As an interrupted `dvc repro` leaves them, and a stage that was run by hand."""
    Path("metrics/finetune_lora.json").unlink()
    edit_lock(r"(?s)\n  eval_vllm:.*", "\n")
    (note,) = load_results().notes
    assert "metrics/finetune_lora.json (missing)" in note
    assert "metrics/eval_vllm.json (no run of eval_vllm is recorded)" in note


@pytest.mark.parametrize("damage", ["", "<<<<<<< HEAD\n", "stages: [1]\n", "- 1\n", "stages: {a: {deps: 3}}\n", "\x00"])
def test_a_damaged_lock_ends_in_one_line(here: Project, damage: str) -> None:
    Path("dvc.lock").write_text(damage + (Path("dvc.lock").read_text("utf-8") if "<" in damage else ""), "utf-8")
    if not damage:
        assert load_results().notes[0].startswith("unknown whether")
        return
    with pytest.raises(UserError, match=r"^dvc\.lock.*git checkout dvc\.lock"):
        load_results()


def test_revisions_have_their_own_record(here: Project) -> None:
    """The results of a commit are not stale because the working tree has changed; a commit's own files can be."""
    here.set_params(lora={"r": 64})
    assert load_results("HEAD").notes == []
    here.commit("Other params, no run")
    assert load_results("HEAD~1").notes == []
    assert load_results("HEAD").params["lora.r"] == 16
    assert load_results("HEAD").notes == [f"stale (HEAD): the results of {', '.join(ALL[3:])} are {OLD}lora.r 16 → 64"]
    here.run("git", "checkout", "-q", "HEAD~1", "params.yaml")
    edit_metric()
    lock = Path("dvc.lock").rename("../dvc.lock")
    here.commit("An edited metric, no lock")
    assert load_results("HEAD").notes == [
        "unknown (HEAD) whether the results are of these params, code and data: it has no dvc.lock"
    ]
    lock.rename("dvc.lock")
    here.commit("The lock")
    assert load_results("HEAD").notes == ["modified since the run (HEAD): metrics/eval_vllm.json"]


def test_every_tool_shows_the_notes(here: Project) -> None:
    """In the terminal, at the top of the page and of the summary; the card is refused."""

    def tool(name: str, *arguments: str, check: bool = True) -> str:
        return here.run(".venv/bin/python", f"tools/{name}.py", *arguments, check=check)

    here.set_params(lora={"r": 64})
    edit_metric()
    stale, modified = load_results().notes
    for name in ("report", "compare", "show_metrics"):
        assert f"{stale}\n{modified}\n" in tool(name), name
    refused = tool("check_metrics", check=False)
    assert f"{stale}\n{modified}\n" in refused
    assert "error: the metrics here are not those that a run wrote: see above\n" in refused
    assert tool("card", check=False) == f"error: the card would not describe what was trained: {stale}; {modified}\n"
    assert not Path("reports/adapter").exists()
    page, summary = (Path(f"reports/{name}").read_text("utf-8") for name in ("report.html", "summary.md"))
    assert page.index("stale: the results of") < page.index("exact match")
    assert f"> {stale}\n" in summary[: summary.index("| exact match |")]
    assert "lora.r</code></td><td>16</td>" in page
    assert "lora.r</code></td><td>64</td>" not in page


@pytest.mark.parametrize(
    ("change", "origin"),
    [
        (lambda p: None, "as prepared"),
        (lambda p: p.set_params(lora={"r": 64}, serve={"port": 9000}), "as prepared"),
        (lambda p: append("trnlora/data/packing.py"), "as prepared, by code that has changed since"),
        (lambda p: p.set_params(data={"seq_len": 128}), "estimated"),
        (lambda p: p.set_params(model={"source": "path:///other"}), "estimated"),
        (lambda p: append("data/tasks.jsonl", "{}\n"), "estimated"),
        (lambda p: append("artifacts/prepared/train.parquet"), "estimated"),
        (lambda p: edit_lock(r"(?s)(path: artifacts/model\n      hash: md5\n      md5: )\w+", r"\g<1>0"), "estimated"),
    ],
)  # fmt: skip
def test_the_plan_uses_prepared_rows_of_its_own_params_model_and_data(
    here: Project, change: Callable[[Project], None], origin: str
) -> None:
    change(here)
    rows, found = packed_rows(load_params())
    assert found.startswith(origin)
    assert found == origin or origin == "estimated"
    assert (rows == 77) == origin.startswith("as prepared")
