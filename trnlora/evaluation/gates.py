"""The gates that an evaluated adapter must pass."""

from typing import Any

from trnlora.params import Eval
from trnlora.serving.adapters import BASE, TUNED

# Nats. An adapter of zeros gives exactly the base model's loss; one that changes it by less has no effect either.
SAME_LOSS = 1e-6


def gate(metrics: dict[str, Any], limits: Eval) -> list[str]:
    """What is wrong with the evaluation, one line each; empty if it passes. NaN never passes.

    metrics: those of eval_vllm. loss_gap_trainer and loss_gap_peft are missing for an adapter from elsewhere.
    """
    failures = []
    base_loss, tuned_loss = metrics[BASE]["loss"], metrics[TUNED]["loss"]
    changed = metrics["changed_fraction"]
    if not (changed >= limits.min_changed_fraction and abs(tuned_loss - base_loss) > SAME_LOSS):
        failures.append(
            f"the adapter has too little effect in vLLM: {changed:.1%} of the answers changed "
            f"(eval.min_changed_fraction {limits.min_changed_fraction:.1%}), "
            f"loss {base_loss:.6f} without and {tuned_loss:.6f} with the adapter"
        )
    for name, key in (("the trainer", "loss_gap_trainer"), ("PEFT", "loss_gap_peft")):
        gap = metrics.get(key, 0.0)
        if not gap <= limits.max_loss_gap:
            failures.append(
                f"the adapter's loss is {tuned_loss:.6f} in vLLM, {gap:.6f} nats from that of {name} "
                f"(eval.max_loss_gap {limits.max_loss_gap}): adapter and prepared rows may be of different runs, "
                "run `dvc repro`"
            )
    return failures
