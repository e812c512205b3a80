"""How far a run's metrics may be from those of another run of the same commit, on another processor.

Two runs on one processor give equal metrics. Another one adds up in another order, so the last digits of every product
differ, and a training carries that on: losses by about 1e-4, some answers.
"""

import re

from trnlora.evaluation.harness import RESULTS as HARNESS
from trnlora.reporting.results import Results, differing

# (pattern of the metric's key, largest absolute difference); the first that matches counts. Others must be equal.
TOLERANCES = (
    (r"logits_max_abs_diff", 1e-4),
    (r"loss_gap", 1e-3),
    (r"loss", 0.02),  # nats per token
    (r"response_(words|tokens)", 1.0),
    (r"exact_match_by_category", 0.15),  # of 28 to 32 rows each
    (r"(base|tuned)\.|changed_fraction", 0.05),  # scores between 0 and 1
)


def tolerance(key: str) -> float:
    """The largest difference of this metric that passes."""
    return next((limit for pattern, limit in TOLERANCES if re.search(pattern, key)), 0.0)


def beyond_tolerance(expected: Results, found: Results) -> list[str]:
    """A line for each metric that is missing, new or too far from what is expected.

    Times are not compared, nor what lm-evaluation-harness measured, which is not of the run.
    """
    lines = []
    for file in dict.fromkeys([*expected.metrics, *found.metrics]):
        if "/timing/" in file or file == str(HARNESS):
            continue
        for key, wanted, value in differing(expected.metrics.get(file, {}), found.metrics.get(file, {})):
            numbers = isinstance(wanted, int | float) and isinstance(value, int | float)
            if not numbers or not abs(value - wanted) <= tolerance(key):  # also when it is NaN
                lines.append(f"{file}: {key} is {value}, expected {wanted} ± {tolerance(key):g}")
    return lines
