"""Speed and peak memory of prepare_data on a large file, on all cores and on one.

    python bench/data.py [--rows N] [--dir DIR]       (make bench: 50,000 rows; 1,000,000 are 1 GB, minutes)

Makes a JSONL file of N rows of about 1 kB each, with words drawn from data/tasks.jsonl. Runs the stage on it with the
tokenizer of artifacts/model, once on all cores and once on one core. The seconds are those that the stage reports for
its whole run. The memory is the peak of the sum over its processes (proportional set size, sampled). Both runs must
write the same bytes.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from trnlora import paths
from trnlora.cli import script_parser
from trnlora.errors import UserError, run
from trnlora.files import SUMS, read_json, write_sums
from trnlora.metrics import timing_file

ROOT = Path(__file__).parent.parent
CATEGORIES = ("closed_qa", "classification", "creative_writing", "information_extraction")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, default=50_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--dir", type=Path, help="where to make the files (default: the temporary directory)")
    args = parser.parse_args()
    if not (paths.MODEL / "tokenizer_config.json").exists():
        raise UserError(f"{paths.MODEL} has no tokenizer: run `dvc repro fetch_model`")
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench-data-") as folder:
        root = Path(folder)
        make_rows(root / "rows.jsonl", args.rows)
        params = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
        params["data"] |= {"source": "path://rows.jsonl", "sha256": None, "categories": None}
        (root / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
        shutil.copytree(paths.MODEL, root / paths.MODEL, ignore=shutil.ignore_patterns("*.safetensors", SUMS))
        write_sums(root / paths.MODEL)
        gigabytes = (root / "rows.jsonl").stat().st_size / 1e9
        print(f"{args.rows:,} rows, {gigabytes:.2f} GB", flush=True)
        found = {}
        for used in (cores, cores[:1]):
            seconds, gib = prepare(root, used)
            found[len(used)] = (seconds, (root / paths.PREPARED / "SHA256SUMS").read_text("utf-8"))
            print(
                f"{len(used)} cores: {seconds:.1f} s, {args.rows / seconds:,.0f} rows/s, peak {gib:.2f} GiB",
                flush=True,
            )
    if len({sums for _, sums in found.values()}) != 1:
        raise UserError("the two runs wrote different bytes")
    if len(found) > 1:
        ratio = found[1][0] / found[len(cores)][0]
        print(f"{len(cores)} cores are {ratio:.2f} times as fast as one; both wrote the same bytes")


def make_rows(path: Path, rows: int) -> None:
    words = (ROOT / "data" / "tasks.jsonl").read_text("utf-8").replace("\\", " ").replace('"', " ").split()
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            row = {
                "instruction": f"Question {number}: {' '.join(draw.choices(words, k=20))}",
                "context": " ".join(draw.choices(words, k=draw.randrange(40, 120))),
                "response": " ".join(draw.choices(words, k=draw.randrange(10, 60))),
                "category": draw.choice(CATEGORIES),
            }
            out.write(json.dumps(row) + "\n")


def prepare(root: Path, cores: list[int]) -> tuple[float, float]:
    """Run the stage on these cores. Returns its seconds and the peak memory of all its processes in GiB."""
    stage = psutil.Popen(
        [sys.executable, str(ROOT / "stages" / "prepare_data.py")],
        cwd=root,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    most = 0
    while stage.poll() is None:
        with contextlib.suppress(psutil.Error):  # a process has just ended
            most = max(most, sum(p.memory_full_info().pss for p in (stage, *stage.children(recursive=True))))
        time.sleep(0.5)
    if stage.returncode:
        raise UserError(f"prepare_data failed with exit code {stage.returncode}")
    return float(read_json(root / timing_file("prepare_data"))["seconds"]), most / 2**30


if __name__ == "__main__":
    run(main)
