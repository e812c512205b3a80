"""Evaluate several folders, one after another, with one vLLM engine. conftest.py starts this as a separate process.

    python tests/support/eval_worker.py      in a folder with params.yaml and artifacts/model

Each line of stdin is JSON: [folder, name of its params file]. After each evaluation, prints a line of JSON: the error
line with which stages/eval_vllm.py would have ended, or null. For {"flags": […]}, it asks every route of a server with
these flags (routes.py), because this process has already imported vLLM, which takes long.
"""

import functools
import json
import os
import sys
from pathlib import Path

from support.routes import ask_every_route
from trnlora.errors import run
from trnlora.evaluation.run import evaluate
from trnlora.model.config import ModelConfig
from trnlora.model.tensors import linear_sizes
from trnlora.params import load_params
from trnlora.serving.adapters import Adapter
from trnlora.serving.engine import Engine, start_engine


def main() -> None:
    every_module = frozenset(linear_sizes(ModelConfig.from_folder(Path("artifacts/model"))))
    engine = start_engine(load_params(), [Adapter("room for any adapter", Path(), 32, every_module)])
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, dict):
            print(json.dumps({"error": None} | ask_every_route(request["flags"])), flush=True)
            continue
        folder, params = request
        os.chdir(folder)
        error = None
        try:
            run(functools.partial(evaluate_file, Path(params), engine))
        except SystemExit as end:
            error = end.code
        print(json.dumps({"error": error}), flush=True)


def evaluate_file(params: Path, engine: Engine) -> None:
    evaluate(load_params(params), engine)


if __name__ == "__main__":
    main()
