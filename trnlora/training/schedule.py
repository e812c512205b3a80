"""The learning rate's schedule: linear warm-up, then what `train.schedule` names."""

import math

from trnlora.params import Train


def learning_rate_factor(train: Train, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate `train.lr` at a step counted from 0, of `total_steps` that are planned.

    After the warm-up: linear and cosine fall to 0 at step `total_steps`; constant stays at 1; wsd (warm-up, stable,
    decay) stays at 1 and falls linearly to 0 over the last `train.decay_ratio` of the steps.
    """
    warmup_steps = math.ceil(train.warmup_ratio * total_steps)
    decay_steps = math.ceil(train.decay_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = (total_steps - step) / max(1, total_steps - warmup_steps)  # 1 after the warm-up, 0 after the last step
    match train.schedule:
        case "linear":
            return left
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        case "constant":
            return 1.0
        case "wsd":
            return min(1.0, (total_steps - step) / decay_steps)
