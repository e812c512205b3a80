"""The learning rate's schedules: their values, and those of transformers where the definitions agree."""

import math
from typing import Any

import pytest
import torch
import transformers
from support import ROOT

from trnlora.params import Train, load_params
from trnlora.training.schedule import learning_rate_factor

STEPS = 20
HF_NAMES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"
}  # fmt: skip


def factors(**changes: Any) -> list[float]:
    """At each of STEPS steps, and after the last one."""
    default = load_params(ROOT / "profiles/smollm2-135m-cpu.yaml").train.model_dump()
    train = Train.model_validate({**default, **changes})
    return [learning_rate_factor(train, step, STEPS) for step in range(STEPS + 1)]


@pytest.mark.parametrize("schedule", HF_NAMES)
def test_warm_up_is_linear_and_the_learning_rate_is_never_zero_while_training(schedule: str) -> None:
    """The schedule of the usual recipe, over −1 steps, is 0 as soon as warm-up ends."""
    found = factors(schedule=schedule, warmup_ratio=0.2)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(0 < factor <= 1 for factor in found[:STEPS])
    assert found[STEPS] == (1.0 if schedule == "constant" else 0.0)


def test_linear_is_what_it_was_to_the_last_digit() -> None:
    """Another rounding would change the adapter's bytes."""
    assert factors(schedule="linear", warmup_ratio=0.05)[1:] == [(STEPS - step) / 19 for step in range(1, STEPS + 1)]


def test_wsd_is_constant_until_the_last_steps() -> None:
    found = factors(schedule="wsd", warmup_ratio=0.1, decay_ratio=0.25)
    assert found[2:16] == [1.0] * 14
    assert found[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.mark.parametrize("schedule", HF_NAMES)
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.15])
def test_after_the_warm_up_it_is_that_of_transformers(schedule: str, warmup_ratio: float) -> None:
    """During the warm-up it is not: there, transformers begins with a learning rate of 0."""
    warmup = math.ceil(warmup_ratio * STEPS)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    kwargs = {"num_decay_steps": 6, "decay_type": "linear"} if schedule == "wsd" else {}
    theirs = transformers.get_scheduler(HF_NAMES[schedule], optimizer, warmup, STEPS, scheduler_specific_kwargs=kwargs)
    expected = []
    for _ in range(STEPS):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    found = factors(schedule=schedule, warmup_ratio=warmup_ratio, decay_ratio=0.3)
    assert found[warmup:STEPS] == pytest.approx(expected[warmup:])
