"""The default profile with the real SmolLM2-135M, one epoch and a part of the test rows (about 8 minutes)."""

import json
import shutil

import pytest
from support import ROOT
from support.project import Project


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_default_profile_learns(project: Project) -> None:
    shutil.copyfile(ROOT / "profiles" / "smollm2-135m-cpu.yaml", project.root / "params.yaml")
    project.set_params(train={"epochs": 1}, eval={"max_prompts": 60, "min_changed_fraction": 0.9})
    project.dvc("repro")

    def metrics(stage: str) -> dict:
        return json.loads((project.root / "metrics" / f"{stage}.json").read_text())

    assert metrics("convert_nxd")["logits_max_abs_diff"] < 1e-4
    assert metrics("flatten_adapter")["trainer_peft_loss_gap"] < 1e-3
    evaluation = metrics("eval_vllm")
    assert evaluation["loss_gap_trainer"] < 1e-3
    assert evaluation["tuned"]["exact_match"] > evaluation["base"]["exact_match"] + 0.4
    assert evaluation["tuned"]["rougeL"] > evaluation["base"]["rougeL"]
