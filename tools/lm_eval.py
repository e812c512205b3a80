"""Score the running server's base model and adapter with lm-evaluation-harness: what else did the adapter change?

    python tools/lm_eval.py [--params FILE] [--host HOST] [--port PORT] [--limit N] TASK …     (make lm-eval TASKS="…")

TASK is one of the harness's (`.venv-lm-eval/bin/lm_eval ls tasks`), or of lm_eval_tasks: `facts` needs no network.
`make setup-lm-eval` makes the environment. The server must have the pipeline's adapter, as `make serve` starts it.

Reads   dvc.lock, artifacts/model (tokenizer); the server's answers
Writes  metrics/lm_eval.json, which the report shows beside the other scores
"""

import tempfile
from pathlib import Path

from trnlora import paths
from trnlora.cli import add_params, add_server, script_parser, server_address, whole_number
from trnlora.errors import UserError, run
from trnlora.evaluation.harness import PYTHON, RESULTS, HarnessResults, run_harness
from trnlora.files import write_json
from trnlora.params import load_params
from trnlora.readers import read_text
from trnlora.recorded import FIX, LOCK, parse_lock
from trnlora.serving.adapters import TUNED
from trnlora.serving.client import base_url, served_folders


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    add_server(parser)
    parser.add_argument("--limit", type=whole_number(1, 10**9), metavar="N", help="the first N samples of each task")
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    args = parser.parse_args()
    params = load_params(args.params)
    if not args.tasks:
        raise UserError('name the tasks: TASKS="facts" needs no network')
    if not PYTHON.is_file():
        raise UserError("lm-evaluation-harness is not installed: run `make setup-lm-eval`")
    url = base_url(*server_address(args, params))
    served = served_folders(url).get(TUNED)
    if served is None or served.resolve() != paths.ADAPTER.resolve():
        raise UserError(f"the server at {url} does not serve {paths.ADAPTER} as {TUNED}: start it with `make serve`")
    recorded = parse_lock(read_text(Path(LOCK), FIX))["flatten_adapter"].outs[str(paths.ADAPTER)]
    with tempfile.TemporaryDirectory(prefix="lm-eval-") as scratch:
        version, tasks = run_harness(url, args.tasks, params.serve.max_model_len, args.limit, Path(scratch))
    results = HarnessResults(harness=version, adapter=recorded, limit=args.limit, tasks=tasks)
    write_json(RESULTS, results.model_dump())
    for score in results.scores():
        print(f"{score.task} {score.metric}: base {score.base:.4f}, tuned {score.tuned:.4f} ({score.samples} samples)")
    print(f"written to {RESULTS}; `make report` shows it")


if __name__ == "__main__":
    run(main)
