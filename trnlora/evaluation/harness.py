"""lm-evaluation-harness on the base model and on the adapter of a running server: what else the adapter has changed.

The harness (github.com/EleutherAI/lm-evaluation-harness) has an environment of its own, .venv-lm-eval. It asks the
server for completions, and for the log-probabilities of prompts.
"""

import json
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pydantic import BaseModel

from trnlora import paths
from trnlora.errors import UserError
from trnlora.readers import StrictModel, read_json_as
from trnlora.serving.adapters import BASE, TUNED
from trnlora.serving.client import api_key

WORKER = Path(__file__).with_name("lm_eval_worker.py")
PYTHON = Path(".venv-lm-eval/bin/python")
TASKS = Path("lm_eval_tasks")  # of this project
RESULTS = paths.METRICS / "lm_eval.json"
CONCURRENT = 8  # requests at a time
STDERR = "_stderr"


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
    limit: int | None = None  # samples of each task; None: all
    tasks: dict[str, TaskResults]

    def scores(self) -> list[HarnessScore]:
        """Every metric that both models have."""
        return [
            HarnessScore(
                name, metric, task.samples, value, task.base.get(metric + STDERR), task.tuned[metric],
                task.tuned.get(metric + STDERR),
            )
            for name, task in self.tasks.items()
            for metric, value in task.base.items()
            if metric in task.tuned and not metric.endswith(STDERR)
        ]  # fmt: skip


class _OfModel(BaseModel):
    results: dict[str, dict[str, Any]]  # by task and by group of tasks
    group_subtasks: dict[str, list[str]]


class _Reply(BaseModel):
    """What lm_eval_worker.py writes."""

    unknown: list[str] = []
    error: str | None = None
    version: str = ""
    models: dict[str, _OfModel] = {}


def run_harness(
    url: str, tasks: Sequence[str], max_length: int, limit: int | None
) -> tuple[str, dict[str, TaskResults]]:
    """The harness's version, and the results of `tasks` for both models of the server at `url`.

    max_length: tokens of a prompt and its answer. limit: samples of each task. Raises UserError if the harness fails,
    and before it asks for anything if it does not know a task.
    """
    asked = {
        "models": [BASE, TUNED],
        "tasks": tasks,
        "folder": str(TASKS),
        "limit": limit,
        "model_args": {
            "base_url": f"{url}/v1/completions",
            "tokenizer": str(paths.MODEL),
            "tokenizer_backend": "huggingface",
            "num_concurrent": CONCURRENT,
            "max_length": max_length,
        },
    }
    env = {
        "OPENAI_API_KEY": api_key() or "none",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # that there is no torch
    }
    with TemporaryDirectory(prefix="lm-eval-") as scratch:
        out = Path(scratch) / "results.json"
        # -P: the worker's folder has modules of this project, which must not hide those of the harness.
        command = [str(PYTHON), "-P", str(WORKER), json.dumps(asked), str(out)]
        code = subprocess.run(command, env=os.environ | env, check=False).returncode
        if code:
            raise UserError(
                f"lm-evaluation-harness ended with exit code {code}: if it is incomplete, run `make setup-lm-eval`"
            )
        reply = read_json_as(out, _Reply)
    if reply.unknown:
        names = ", ".join(map(repr, reply.unknown))
        raise UserError(f"no task {names} in {TASKS} or the harness: `{PYTHON} -m lm_eval ls tasks` lists the latter")
    if reply.error:
        raise UserError(f"lm-evaluation-harness failed on {reply.error}; {RESULTS} is unchanged")
    base, tuned = (reply.models[model] for model in (BASE, TUNED))
    return reply.version, {
        name: TaskResults(
            samples=base.results[name]["sample_len"],
            base=_numbers(base.results[name]),
            tuned=_numbers(tuned.results[name]),
        )
        for name in _shown(base)
    }


def _shown(model: _OfModel) -> list[str]:
    """The names of tasks, and of groups that have metrics: then those stand for their tasks, as mmlu for its 57."""
    measured = {name for name, results in model.results.items() if _numbers(results)}
    within = {task for group, tasks in model.group_subtasks.items() if group in measured for task in tasks}
    return sorted(measured - within)


def _numbers(results: dict[str, Any]) -> dict[str, float]:
    """The harness's keys are `metric,filter` and `metric_stderr,filter`; others are not of metrics.

    The filter's name is left out where it is `none`. Values may be "N/A" or nan.
    """
    found = {}
    for key, value in results.items():
        metric, comma, rest = key.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            name = metric.removesuffix(STDERR) + ("" if rest == "none" else f" {rest}")
            found[name + STDERR * metric.endswith(STDERR)] = float(value)
    return found
