"""make compare and make card: what they print about a run, and what they refuse."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.project import Project
from support.results import answer, write_answers

from trnlora.reporting.card import card
from trnlora.reporting.results import load_results

pytestmark = pytest.mark.slow  # each test has its own DVC project; some use a browser


def tool(project: Project, name: str, *arguments: str, check: bool = True) -> str:
    return project.run(".venv/bin/python", f"tools/{name}.py", *arguments, check=check)


def set_metric(project: Project, stage: str, **values: Any) -> None:
    path = project.root / f"metrics/{stage}.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def test_only_differences_are_printed(run_project: Project) -> None:
    run_project.run("git", "tag", "before")
    output = tool(run_project, "compare")
    assert output.splitlines()[:2] == ["Params: no difference", "Metrics: no difference"]

    run_project.set_params(train={"lr": 5.0e-3}, data={"categories": ["[red]", "closed_qa"]})
    loss = json.loads((run_project.root / "metrics/finetune_lora.json").read_text("utf-8"))["validation_loss"]
    set_metric(run_project, "finetune_lora", validation_loss=loss + 0.5)
    set_metric(run_project, "timing/eval_vllm", seconds=1.0, engine_start_seconds=1.0)
    set_metric(run_project, "timing/finetune_lora", seconds=1.0)
    run_project.dvc("commit", "--force", "--quiet")
    shutil.rmtree(run_project.root / ".dvc/cache")
    output = tool(run_project, "compare", "before")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert rows == [
        ["data.categories", "–", "['[red]', 'closed_qa']", ""],
        ["train.lr", "0.01", "0.005", "-0.005"],
        ["finetune_lora validation_loss", f"{loss:.5g}", f"{loss + 0.5:.5g}", "+0.5"],
    ]
    assert "Answers: those of before are not in DVC's cache here" in output
    done = tool(run_project, "compare", "before", "nosuch", check=False)
    assert done == "error: unknown Git revision 'nosuch': name a commit, branch, tag or experiment\n"


def test_changed_answers_are_counted_and_flips_come_first(run_project: Project) -> None:
    """Both commits' answers are in DVC's cache, as eval_vllm's are."""
    project = run_project
    project.run("git", "rm", "-q", "--cached", "dvc.yaml")
    (project.root / "dvc.yaml").unlink()  # it lists answers.jsonl as the output of a stage
    (project.root / ".gitignore").write_text("", "utf-8")

    def commit(tag: str, texts: list[str]) -> None:
        write_answers(project.root, [answer(n, "Nairobi", "In Paris.", text) for n, text in enumerate(texts)])
        project.dvc("add", "-q", "artifacts/answers.jsonl")
        project.commit(tag)
        project.run("git", "tag", tag)

    commit("a", ["Oslo", "Nairobi", "Lima [b]", "Nairobi"])
    commit("b", ["Lima", "Nairobi\n", "Nairobi", "Rome"])
    output = tool(project, "compare", "a", "b", "--samples", "2")
    assert "Answers: 3 of 4 changed, 1 from wrong to right, 1 from right to wrong" in output
    assert re.findall(r"^row (\d), \w+: (.*?)\s*$", output, re.M) == [("2", "wrong → right"), ("3", "right → wrong")]
    assert re.search(r"^│ a +│ Lima \[b\]", output, re.M)
    assert re.search(r"^│ b +│ Rome", output, re.M)


def test_card_is_refused_without_an_evaluated_adapter(project: Project) -> None:
    def refused() -> str:
        return tool(project, "card", check=False)

    (project.root / "metrics").mkdir()
    (project.root / "metrics/prepare_data.json").write_text('{"rows_read": 3}', "utf-8")
    assert refused() == "error: the adapter has not been evaluated yet: run `make repro`\n"
    project.set_params(eval={"adapter": "path:///elsewhere"})
    assert "the scores are not those of artifacts/adapter" in refused()
    assert not (project.root / "reports").exists()


@pytest.mark.parametrize("base", ["HuggingFaceTB/SmolLM2-135M-Instruct", None])
def test_card_has_the_runs_numbers(base: str | None, run_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the text. tests/test_experiments.py writes the folder after a real run."""
    from huggingface_hub import ModelCard

    monkeypatch.chdir(run_project.root)
    text = card(load_results(), base)
    data: Any = ModelCard(text).data  # parses the metadata as the hub does
    assert data.base_model == base
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    metrics = json.loads(Path("metrics/eval_vllm.json").read_text("utf-8"))
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    keys = {"exact_match": "exact_match", "rouge": "rougeL", "bleu": "bleu", "chrf": "chrf"}
    assert values == {kind: metrics["tuned"][key] for kind, key in keys.items()}
    assert f"| exact match | {metrics['base']['exact_match']:.1%} | {metrics['tuned']['exact_match']:.1%} |" in text
    by_category = [metrics[model]["exact_match_by_category"]["closed_qa"] for model in ("base", "tuned")]
    assert f"| · closed_qa | {by_category[0]:.1%} | {by_category[1]:.1%} |" in text
    assert "| train.lr | 0.01 |" in text
    assert "### Instruction:\nQuestion 0?\n\n### Response:\n```" in text
    assert str(Path(load_results().params["model.source"]).parent).removeprefix("path:/") not in text  # a path here
    assert "{{" not in text
    assert "Undefined" not in text
