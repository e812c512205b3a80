"""`make lm-eval` for real: lm-evaluation-harness in its own environment, against vLLM's server."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import ROOT
from support.project import Project
from support.server import Server

from trnlora.evaluation.harness import PYTHON, HarnessResults

FACTS = [json.loads(line) for line in (ROOT / "lm_eval_tasks/facts.jsonl").open("rb")]
SOME = 12
# Beside `facts`, which a random model answers at random: a task on the log-likelihoods themselves, and one on answers.
TASK = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "lm_eval_tasks/facts.jsonl"}},
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
ENDINGS = TASK | {
    "task": "endings",
    "output_type": "loglikelihood",
    "doc_to_target": " {{choices[answer]}}",
    # The harness's metric of this name is a sample's log-likelihood. Its mean needs no bootstrap, which takes long.
    "metric_list": [{"metric": "perplexity", "aggregation": "mean", "higher_is_better": True}],
}
ANSWERS = TASK | {
    "task": "answers",
    "dataset_kwargs": {"data_files": {"test": "lm_eval_tasks/answers.jsonl"}},
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["never"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture
def project(run_project: Project, server: Server, tiny_llama: Path, adapter: Path) -> Project:
    """A project whose recorded run has written the adapter that the server has; with the harness's environment."""
    subprocess.run([ROOT / "tools/environment.sh", "setup-lm-eval"], check=True)
    (run_project.root / PYTHON.parts[0]).symlink_to(ROOT / PYTHON.parts[0])
    for name, target in (("adapter", adapter), ("model", tiny_llama)):
        shutil.rmtree(run_project.root / "artifacts" / name)
        (run_project.root / "artifacts" / name).symlink_to(target)
    run_project.dvc("commit", "--force", "--quiet")
    return run_project


def log_likelihood(model: Any, tokenizer: Any, question: str, ending: str) -> float:
    """The log-likelihood in nats of `ending` after `question`, with HF."""
    ids = tokenizer.encode(f"{question} {ending}", add_special_tokens=False)
    begin = len(tokenizer.encode(question, add_special_tokens=False))
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(found[place - 1, ids[place]] for place in range(begin, len(ids))))


@pytest.mark.slow
def test_both_models_get_the_scores_that_transformers_gives_them(
    project: Project, server: Server, tiny_llama: Path, adapter: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for task in (ENDINGS, ANSWERS):
        (project.root / f"lm_eval_tasks/{task['task']}.yaml").write_text(yaml.safe_dump(task))
    questions = [row["question"] for row in FACTS[:SOME]]
    rows = [{"question": question, "answer": server.complete("base", question, 8)} for question in questions]
    (project.root / "lm_eval_tasks/answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    lm_eval = ("make", "--old-file=.venv/.ready", "lm-eval", f"PORT={server.port}", f"LIMIT={SOME}")
    assert "error: no task 'no-such' in lm_eval_tasks or the harness" in project.run(
        *lm_eval, "TASKS=facts no-such", check=False
    )
    assert not (project.root / "metrics/lm_eval.json").exists()
    printed = project.run(*lm_eval, "TASKS=facts endings answers")
    assert "Requesting API: 100%" in printed

    found = HarnessResults.model_validate_json((project.root / "metrics/lm_eval.json").read_bytes())
    assert found.limit == SOME
    assert {task.samples for task in found.tasks.values()} == {SOME}
    scores = {score.task: score for score in found.scores()}
    assert {name: score.metric for name, score in scores.items()} == {
        "facts": "acc",
        "endings": "perplexity",
        "answers": "exact_match",
    }
    assert scores["answers"].base == 1.0
    assert scores["answers"].tuned < 1.0
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    expected = {}
    for name in ("base", "tuned"):
        model = base if name == "base" else PeftModel.from_pretrained(base, adapter)
        right, total = 0, 0.0
        for row in FACTS[:SOME]:
            likelihoods = [
                log_likelihood(model.eval(), tokenizer, row["question"], choice) for choice in row["choices"]
            ]
            right += likelihoods.index(max(likelihoods)) == row["answer"]
            total += likelihoods[row["answer"]]
        expected[name] = right / SOME, total / SOME
    assert abs(expected["base"][1] - expected["tuned"][1]) > 0.01
    for name, (accuracy, likelihood) in expected.items():
        assert getattr(scores["facts"], name) == pytest.approx(accuracy)
        assert getattr(scores["endings"], name) == pytest.approx(likelihood, abs=1e-4)

    differing = project.dvc("metrics", "diff", "HEAD")
    assert "tasks.endings.tuned.perplexity" in differing
    project.run(".venv/bin/python", "tools/report.py")
    [row] = [line for line in (project.root / "reports/summary.md").read_text().splitlines() if "facts acc" in line]
    assert f"| {scores['facts'].base:.3f} | {scores['facts'].tuned:.3f} |" in row


@pytest.mark.slow
def test_another_adapter_than_that_of_the_run_is_refused(project: Project, server: Server) -> None:
    lm_eval = (".venv/bin/python", "tools/lm_eval.py", "--port", str(server.port), "facts")
    adapter = project.root / "artifacts/adapter"
    own = adapter.readlink()
    adapter.unlink()
    shutil.copytree(own, adapter)
    assert "does not serve artifacts/adapter as tuned: start it with `make serve`" in project.run(*lm_eval, check=False)
    (adapter / "trnlora.json").write_text("{}")
    assert "artifacts/adapter is not that of the run in dvc.lock: run `make repro`" in project.run(
        *lm_eval, check=False
    )
    (project.root / PYTHON.parts[0]).unlink()
    assert "not installed: run `make setup-lm-eval`" in project.run(*lm_eval, check=False)
