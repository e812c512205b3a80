"""lm-evaluation-harness on several models of a server, one after the other. Runs in the harness's own environment.

    .venv-lm-eval/bin/python -P trnlora/evaluation/lm_eval_worker.py ASKED OUT

ASKED: JSON, the arguments of `main`. OUT: gets the results as JSON, or {"error": …, "unknown": …}. The server's key is
OPENAI_API_KEY in the environment. This project is not installed in that environment, so nothing of it is imported here.
"""

import importlib.metadata
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

# Of Ctrl-C, the caller says what there is to say. Before the imports, which take seconds.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


class LastWarning(logging.Handler):
    """Keeps what the harness last said of a request that failed, rather than print it for each request and retry."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self.text = record.getMessage()


def main(models: list[str], tasks: list[str], folder: str, limit: int | None, model_args: dict[str, Any]) -> Any:
    """The harness's version and its results, by model. folder: of tasks beside the harness's own."""
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        return {"unknown": unknown}
    requests = logging.getLogger("lm_eval.models.api_models")
    requests.propagate = False
    requests.addHandler(last := LastWarning())
    version = importlib.metadata.version("lm_eval")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a traceback for each request under way, when one fails
    found: dict[str, Any] = {}
    for model in models:
        print(f"lm-evaluation-harness {version} on {model}", flush=True)
        try:
            found[model] = simple_evaluate(
                "local-completions",
                {**model_args, "model": model},
                manager.match_tasks(tasks),
                limit=limit,
                log_samples=False,
                task_manager=manager,
            )
        except Exception as error:  # of the network, the server, datasets, or of a task's own code
            return {"error": " ".join(f"{model}: {type(error).__name__}: {error} {last.text}".split())}
    kept = ("results", "group_subtasks")
    return {
        "version": version,
        "models": {model: {key: results[key] for key in kept} for model, results in found.items()},
    }


if __name__ == "__main__":
    answer = main(**json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(answer), "utf-8")
