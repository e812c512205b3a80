"""Comparing a run's metrics with the committed ones."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from trnlora.reporting.results import Results, load_results
from trnlora.reporting.tolerances import beyond_tolerance


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.chdir(ROOT)
    return load_results()


def changed(results: Results, file: str, key: str, value: Any) -> Results:
    assert key in results.metrics[file], key
    return dataclasses.replace(results, metrics=results.metrics | {file: results.metrics[file] | {key: value}})


def test_the_same_metrics_pass(committed: Results) -> None:
    assert beyond_tolerance(committed, committed) == []


@pytest.mark.parametrize(
    ("stage", "key", "step", "passes"),
    [
        ("finetune_lora", "validation_loss", 0.001, True),
        ("finetune_lora", "validation_loss", 0.1, False),
        ("finetune_lora", "validation_loss", float("nan"), False),
        ("eval_vllm", "tuned.exact_match", -0.02, True),
        ("eval_vllm", "tuned.exact_match", -0.2, False),
        ("eval_vllm", "loss_gap_trainer", 0.01, False),
        ("convert_nxd", "logits_max_abs_diff", 1.0, False),
        ("prepare_data", "train.rows", 1, False),
        ("timing/eval_vllm", "seconds", 1000, True),
    ],
)
def test_a_change_is_compared_with_its_tolerance(
    committed: Results, stage: str, key: str, step: float, passes: bool
) -> None:
    file = str(Path("metrics") / f"{stage}.json")
    found = changed(committed, file, key, committed.metrics[file][key] + step)
    lines = beyond_tolerance(committed, found)
    assert (lines == []) == passes
    assert passes or lines[0].startswith(f"{file}: {key} is ")


def test_another_digest_and_a_missing_metric_are_named(committed: Results) -> None:
    file = "metrics/fetch_model.json"
    digest = "sha256.model.safetensors"
    assert len(beyond_tolerance(committed, changed(committed, file, digest, "0" * 64))) == 1
    without = dataclasses.replace(committed, metrics=committed.metrics | {file: {}})
    assert len(beyond_tolerance(committed, without)) == len(committed.metrics[file])
