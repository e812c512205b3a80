"""Score the running server's base model and adapter with lm-evaluation-harness: what else did the adapter change?

    python tools/lm_eval.py [--params FILE] [--host HOST] [--port PORT] [--limit N] TASK …     (make lm-eval TASKS="…")

TASK is one of the harness's (`.venv-lm-eval/bin/lm_eval ls tasks`), or of lm_eval_tasks: `facts` needs no network.
`make setup-lm-eval` makes the environment. The server must have the pipeline's adapter, as `make serve` starts it.

Reads   dvc.lock, artifacts/model (tokenizer); the server's answers
Writes  metrics/lm_eval.json, which the report shows beside the other scores
"""

from trnlora import paths
from trnlora.cli import add_params, add_server, script_parser, server_address, whole_number
from trnlora.errors import UserError, run
from trnlora.evaluation.harness import PYTHON, RESULTS, HarnessResults, run_harness
from trnlora.files import write_json
from trnlora.params import load_params
from trnlora.recorded import LOCK
from trnlora.reporting.results import load_results
from trnlora.serving.adapters import TUNED
from trnlora.serving.client import base_url, max_model_len, served_folders, started_at


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
    adapter = recorded_adapter()
    url = base_url(*server_address(args, params))
    check_served(url)
    version, tasks = run_harness(url, args.tasks, max_model_len(url), args.limit)
    results = HarnessResults(harness=version, adapter=adapter, limit=args.limit, tasks=tasks)
    write_json(RESULTS, results.model_dump())
    for score in results.scores():
        print(f"{score.task} {score.metric}: base {score.base:.4f}, tuned {score.tuned:.4f} ({score.samples} samples)")
    print(f"written to {RESULTS}; `make report` shows it")


def recorded_adapter() -> str:
    """md5 of artifacts/adapter in dvc.lock. Raises UserError if artifacts/adapter is not what a run wrote."""
    now = load_results()
    if not now.adapter or now.changes.unknown or str(paths.ADAPTER) in now.changes.modified:
        raise UserError(f"{paths.ADAPTER} is not that of the run in {LOCK}: run `make repro`, then start the server")
    return now.adapter


def check_served(url: str) -> None:
    """Raise UserError unless the server's `tuned` is artifacts/adapter as it is now."""
    served = served_folders(url).get(TUNED)
    if served is None or served.resolve() != paths.ADAPTER.resolve():
        raise UserError(f"the server at {url} does not serve {paths.ADAPTER} as {TUNED}: start it with `make serve`")
    written = max(path.stat().st_mtime for path in paths.ADAPTER.iterdir())
    if (started := started_at(url)) and started < written:
        raise UserError(f"{paths.ADAPTER} is newer than the server at {url}: restart it with `make serve`")


if __name__ == "__main__":
    run(main)
