"""docs/experiments.md on the tiny Llama: queued experiments, their table, a comparison, the model card."""

import json
import re

import pytest
from support import ROOT
from support.project import Project
from support.repro import check_cache, ran

DOC = (ROOT / "docs/experiments.md").read_text("utf-8")


def make(project: Project, *arguments: str, check: bool = True) -> str:
    """make, without updating the environment."""
    return project.run("make", "--old-file=.venv/.ready", *arguments, check=check)


def documented(command: str) -> list[str]:
    """The output that the document shows below a command, as lines."""
    (output,) = re.findall(rf"^\$ {re.escape(command)}\n(.*?)^```$", DOC, re.MULTILINE | re.DOTALL)
    return forms(output)


def forms(output: str) -> list[str]:
    """The lines without the parts that differ between processors and commits: numbers, hashes, rules, cell widths."""
    lines = [re.sub(r"\b[0-9a-f]{7}\b|[+-]?\d[\d.]*(e[+-]\d+)?|[─━]+", " ", line) for line in output.splitlines()]
    return [" ".join(line.split()) for line in lines if line.split()]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_document_matches_what_is_printed(finished_copy: Project) -> None:
    project = finished_copy
    sweep = make(project, "sweep", "SET=train.lr=1.0e-2,3.0e-3", "NAME=lr")
    # lr-1 has the commit's rate, so its results are cached. No experiment fetches, prepares or converts again.
    assert re.findall(r"Reproducing experiment '(.*)'", sweep) == ["lr-1", "lr-2"]
    assert ran(sweep) == ["check_params", "finetune_lora", "flatten_adapter", "eval_vllm"]
    shown = documented('make sweep SET="train.lr=1.0e-2,3.0e-3" NAME=lr')
    assert [line for line in shown if line not in forms(sweep)] == []
    assert project.run("git", "status", "--porcelain") == ""

    table = make(project, "experiments")
    assert re.findall(r"\[(lr-\d)\]", table) == ["lr-1", "lr-2"]  # lowest loss first
    for header in (forms(table)[0], documented("make experiments")[0]):
        assert {"Experiment", "State", "validation_loss", "tuned.loss", "train.lr"} <= set(header.split())
        assert not {"…", "base.loss", "seconds", "parameters"} & set(header.split())

    comparison = make(project, "compare", "A=lr-1", "B=lr-2", "SAMPLES=1")
    printed = forms(comparison)
    documented_lines = documented("make compare A=lr-1 B=lr-2 SAMPLES=1")
    # Without the scores of a random model's answers, which differ between processors.
    kept = [
        line for line in documented_lines if re.search(r"train\.lr|_loss |tuned\.loss|^Answers|Params|Metrics", line)
    ]
    assert len(kept) > 6
    assert [line for line in kept if line not in printed] == []
    losses = [
        json.loads(project.run("git", "show", f"{revision}:metrics/finetune_lora.json"))["validation_loss"]
        for revision in re.findall(r"(\w{7}) \[lr-[12]\]", table)
    ]
    assert re.search(rf"finetune_lora validation_loss +│ +{losses[0]:.5g} │ +{losses[1]:.5g} │", comparison)

    assert forms(make(project, "card", "BASE=org/tiny")) == documented("make card BASE=org/tiny")
    check_card(project)
    project.set_params(train={"lr": 2.0e-2})
    refused = make(project, "card", check=False)
    assert "stale: the results of finetune_lora, flatten_adapter, eval_vllm are older than what" in refused
    project.run("git", "checkout", "-q", "params.yaml")
    check_kept(project)


def check_kept(project: Project) -> None:
    """An experiment that is kept: DVC's comparisons of commits, and the way back, for which nothing is computed."""
    project.dvc("exp", "apply", "lr-2")
    project.commit("A lower learning rate")
    assert re.search(r"train\.lr +0\.01 +0\.003", project.dvc("params", "diff", "HEAD~1"))
    difference = project.dvc("metrics", "diff", "HEAD~1")
    assert re.search(r"metrics/finetune_lora\.json +validation_loss +\d+\.\d+ +\d+\.\d+ +-?\d+", difference)
    project.dvc("plots", "diff", "HEAD~1", "-o", ".plots")
    page = (project.root / ".plots/index.html").read_text("utf-8")
    for title in ("Loss", "Exact match by category", "plots/training/plots/metrics/train/lr.tsv"):
        assert f'"text": "{title}"' in page, title

    project.run("git", "checkout", "-q", "HEAD~1", "--", "params.yaml")
    assert ran(project.dvc("repro")) == ["check_params"]
    assert project.run("git", "diff", "HEAD~1", "--", "metrics/finetune_lora.json", "metrics/eval_vllm.json") == ""
    check_cache(project)


def check_card(project: Project) -> None:
    """The folder has the pipeline's weights, a config that PEFT can read, and a card that the hub can read."""
    from huggingface_hub import ModelCard
    from peft import PeftConfig

    folder, trained = project.root / "reports/adapter", project.root / "artifacts/adapter"
    assert {path.name for path in folder.iterdir()} == {"README.md", *(path.name for path in trained.iterdir())}
    weights = "adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (trained / weights).read_bytes()
    assert PeftConfig.from_pretrained(str(folder)).base_model_name_or_path == "org/tiny"
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["base_model"] == "org/tiny"
    assert "| train.lr | 0.01 |" in card.text
    assert str(project.root.parent.parent) not in card.content
