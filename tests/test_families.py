"""Each model family through the real stages, with LoRA on all linear layers: trainer, HF + PEFT and vLLM agree."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.models import FAMILIES
from support.runs import prepare
from support.stages import metrics, run_stage, set_params

pytestmark = pytest.mark.long


@pytest.mark.parametrize("family", FAMILIES)
def test_three_losses_are_equal(family: str, family_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = prepare(tmp_path, family_model(family))
    set_params(
        folder,
        lora={"target_modules": "all-linear"},
        train={"max_steps": 10, "lr": 1.0e-3},
        eval={"max_prompts": 8, "max_tokens": 8, "min_changed_fraction": 0.0},
    )
    for stage in ("convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm"):
        run_stage(stage, folder)
    trained, flat, served = (metrics(folder, name) for name in ("finetune_lora", "flatten_adapter", "eval_vllm"))
    assert trained["validation_loss"] < trained["base_validation_loss"] - 0.01
    print(f"{family}: {trained['validation_loss']:.6f}, gaps {flat['trainer_peft_loss_gap']:.1e}, {served}")
    assert flat["trainer_peft_loss_gap"] < 1e-4
    assert served["loss_gap_trainer"] < 1e-3
