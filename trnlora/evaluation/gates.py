"""The gates that an evaluated adapter must pass."""

from typing import Any

from trnlora.params import Eval
from trnlora.serving.adapters import BASE, TUNED

# Nats. An adapter of zeros gives exactly the base model's loss; one that changes it by less has no effect either.
SAME_LOSS = 1e-6
_GAPS = {"loss_gap_trainer": "the trainer", "loss_gap_peft": "PEFT", "loss_gap_trainer_peft": "PEFT"}


def gate(metrics: dict[str, Any], limits: Eval) -> list[str]:
    """What is wrong with the evaluation, one line each; empty if it passes. NaN never passes.

    metrics: those of eval_vllm. The gaps are missing for an adapter from elsewhere. With eval.engine: device, vLLM's
    losses are missing, and the only gap is that of trainer and PEFT.
    """
    failures = []
    changed, tuned_loss = metrics["changed_fraction"], metrics[TUNED].get("loss")
    effect = f"{changed:.1%} of the answers changed (eval.min_changed_fraction {limits.min_changed_fraction:.1%})"
    has_effect = changed >= limits.min_changed_fraction
    where = "in training is"
    if tuned_loss is not None:
        base_loss = metrics[BASE]["loss"]
        effect += f", loss {base_loss:.6f} without and {tuned_loss:.6f} with the adapter"
        has_effect = has_effect and abs(tuned_loss - base_loss) > SAME_LOSS
        where = f"is {tuned_loss:.6f} in vLLM,"
    if not has_effect:
        failures.append(f"the adapter has too little effect in vLLM: {effect}")
    for key, name in _GAPS.items():
        gap = metrics.get(key, 0.0)
        if not gap <= limits.max_loss_gap:
            failures.append(
                f"the adapter's loss {where} {gap:.6f} nats from that of {name} (eval.max_loss_gap "
                f"{limits.max_loss_gap}): adapter and prepared rows may be of different runs, run `dvc repro`"
            )
    return failures
