"""lm-evaluation-harness on the base model and on the adapter of a running server: what else the adapter has changed.

The harness (github.com/EleutherAI/lm-evaluation-harness) has an environment of its own, .venv-lm-eval. It asks the
server for completions, with the log-probabilities of prompts.
"""

import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from trnlora import paths
from trnlora.errors import UserError
from trnlora.readers import StrictModel, checked, read_json
from trnlora.serving.adapters import BASE, TUNED
from trnlora.serving.client import api_key

PYTHON = Path(".venv-lm-eval/bin/python")
TASKS = Path("lm_eval_tasks")  # of this project
RESULTS = paths.METRICS / "lm_eval.json"
CONCURRENT = 8  # requests at a time


class TaskResults(StrictModel):
    """A task's results for both models, by name of the metric, e.g. acc; with …_stderr where the harness has one."""

    samples: int
    base: dict[str, float]
    tuned: dict[str, float]


class HarnessScore(NamedTuple):
    """A metric of a task. The errors are standard errors; None where the harness estimates none."""

    task: str
    metric: str
    samples: int
    base: float
    base_error: float | None
    tuned: float
    tuned_error: float | None


class HarnessResults(StrictModel):
    """metrics/lm_eval.json."""

    harness: str  # its version
    adapter: str  # md5 of artifacts/adapter in dvc.lock
    limit: int | None = Field(default=None)  # samples of each task; None: all
    tasks: dict[str, TaskResults]

    def scores(self) -> list[HarnessScore]:
        """Every metric that both models have."""
        return [
            HarnessScore(
                name, metric, task.samples, value, task.base.get(f"{metric}_stderr"), task.tuned[metric],
                task.tuned.get(f"{metric}_stderr"),
            )
            for name, task in self.tasks.items()
            for metric, value in task.base.items()
            if metric in task.tuned and not metric.endswith("_stderr")
        ]  # fmt: skip


def run_harness(
    url: str, tasks: Sequence[str], max_length: int, limit: int | None, scratch: Path
) -> tuple[str, dict[str, TaskResults]]:
    """The harness's version, and the results of `tasks` for both models of the server at `url`.

    max_length: tokens of a prompt and its answer. Raises UserError if the harness fails; it has printed why.
    """
    found = {model: _run(url, model, tasks, max_length, limit, scratch / model) for model in (BASE, TUNED)}
    versions = {reply["lm_eval_version"] for reply in found.values()}
    results = {
        task: TaskResults(
            samples=found[BASE]["n-samples"][task]["effective"],
            base=_numbers(found[BASE]["results"][task]),
            tuned=_numbers(found[TUNED]["results"][task]),
        )
        for task in found[BASE]["results"]
        if task in found[BASE]["n-samples"]  # not the groups of several tasks
    }
    return versions.pop(), results


def _run(url: str, model: str, tasks: Sequence[str], max_length: int, limit: int | None, out: Path) -> dict[str, Any]:
    arguments = [
        f"model={model}",
        f"base_url={url}/v1/completions",
        f"tokenizer={paths.MODEL}",
        "tokenizer_backend=huggingface",
        f"num_concurrent={CONCURRENT}",
        f"max_length={max_length}",
    ]
    command = [
        str(PYTHON), "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", ",".join(arguments),
        "--tasks", ",".join(tasks), "--include_path", str(TASKS), "--output_path", str(out),
    ]  # fmt: skip
    command += ["--limit", str(limit)] if limit else []
    if subprocess.run(command, env=os.environ | {"OPENAI_API_KEY": api_key() or "none"}, check=False).returncode:
        raise UserError(f"lm-evaluation-harness failed on {model}: see the lines above")
    (file,) = out.rglob("results_*.json")
    return checked(read_json(file), dict[str, Any], str(file))


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """The harness's keys are `metric,filter`; the filter's name is left out where it is `none`."""
    return {
        key.removesuffix(",none").replace(",", " "): float(value)
        for key, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
