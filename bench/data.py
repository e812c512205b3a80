"""Speed and peak memory of prepare_data on a large file, for each kind of file, and against another commit.

    python bench/data.py [--rows N] [--runs N] [--kinds NAME …] [--against REV] [--dir DIR]

Makes N rows (make bench: 50,000) of about 750 bytes each, with words drawn from data/tasks.jsonl, and writes them to a
file of each kind. Runs the stage on each with the tokenizer of artifacts/model; the ways take turns. Ratios are to the
stage of the commit REV on JSONL, or without it to this stage on JSONL. The seconds are those that the stage reports for
its whole run, and all ratios are also given in processor time, which other work on the machine changes less; both are
medians of the runs. The memory is the peak of the sum over its processes (proportional set size, sampled). The kinds
with the same columns must give the same bytes.
"""

import contextlib
import csv
import gzip
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trnlora import paths
from trnlora.cli import script_parser
from trnlora.errors import UserError, run
from trnlora.files import SUMS, write_sums
from trnlora.metrics import timing_file
from trnlora.readers import read_json

ROOT = Path(__file__).parent.parent
CATEGORIES = ("closed_qa", "classification", "creative_writing", "information_extraction")
KINDS = ("rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet", "messages.jsonl")


class Way(NamedTuple):
    """A run of the stage: the code's folder, the file it reads, the cores it may use."""

    name: str
    code: Path
    file: str
    cores: list[int]


class Measured(NamedTuple):
    seconds: float
    processor: float  # seconds, over all processes
    gib: float  # peak memory


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, default=50_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="of each way (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help="default: all")
    parser.add_argument("--against", metavar="REV", help="a commit whose stage is the baseline")
    parser.add_argument("--dir", type=Path, help="where to make the files (default: the temporary directory)")
    args = parser.parse_args()
    if not (paths.MODEL / "tokenizer_config.json").exists():
        raise UserError(f"{paths.MODEL} has no tokenizer: run `dvc repro fetch_model`")
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench-data-") as folder:
        root = Path(folder)
        write_kinds(root, args.rows, {"rows.jsonl", *args.kinds})
        shutil.copytree(paths.MODEL, root / paths.MODEL, ignore=shutil.ignore_patterns("*.safetensors", SUMS))
        write_sums(root / paths.MODEL)
        ways = [Way(kind, ROOT, kind, cores) for kind in args.kinds]
        if args.against:
            ways.insert(0, Way(f"rows.jsonl at {args.against}", check_out(args.against, root), "rows.jsonl", cores))
        elif len(cores) > 1:
            ways.append(Way("rows.jsonl on one core", ROOT, "rows.jsonl", cores[:1]))
        print(f"{args.rows:,} rows, {(root / 'rows.jsonl').stat().st_size / 1e9:.2f} GB as JSONL", flush=True)
        found: dict[str, list[Measured]] = {way.name: [] for way in ways}
        sums = set()
        for number, way in itertools.product(range(args.runs), ways):
            one = prepare(root, way)
            found[way.name].append(one)
            print(
                f"run {number + 1}: {way.name}: {one.seconds:.1f} s, {one.processor:.1f} s of processors, "
                f"peak {one.gib:.2f} GiB",
                flush=True,
            )
            if way.code == ROOT and way.file.startswith("rows."):
                sums.add((root / paths.PREPARED / SUMS).read_text("utf-8"))
    medians = {name: Measured(*map(statistics.median, zip(*runs, strict=True))) for name, runs in found.items()}
    baseline = medians[ways[0].name]
    print(f"times as fast as {ways[0].name}:")
    for name, median in medians.items():
        ratios = f"{baseline.seconds / median.seconds:.2f}, by processor {baseline.processor / median.processor:.2f}"
        print(f"{name}: {ratios}; {args.rows / median.seconds:,.0f} rows/s, {median.gib:.2f} GiB")
    if len(sums) > 1:
        raise UserError("not all runs wrote the same bytes")


def make_rows(count: int) -> Iterator[dict[str, str]]:
    words = (ROOT / "data" / "tasks.jsonl").read_text("utf-8").replace("\\", " ").replace('"', " ").split()
    draw = random.Random(0)
    for number in range(count):
        yield {
            "instruction": f"Question {number}: {' '.join(draw.choices(words, k=20))}",
            "context": " ".join(draw.choices(words, k=draw.randrange(40, 120))),
            "response": " ".join(draw.choices(words, k=draw.randrange(10, 60))),
            "category": draw.choice(CATEGORIES),
        }


def write_kinds(folder: Path, count: int, kinds: set[str]) -> None:
    """Write the same rows to a file of each kind."""
    with contextlib.ExitStack() as stack:
        write = {kind: stack.enter_context(writer(folder / kind)) for kind in kinds}
        for row in make_rows(count):
            for each in write.values():
                each(row)


@contextlib.contextmanager
def writer(path: Path) -> Iterator[Any]:
    """Yield a function that adds a row to the file."""
    if path.suffix == ".parquet":
        rows: list[dict[str, str]] = []
        with pq.ParquetWriter(path, pa.schema([(name, pa.string()) for name in next(make_rows(1))])) as parquet:

            def add(row: dict[str, str]) -> None:
                rows.append(row)
                if len(rows) == 10_000:
                    flush()

            def flush() -> None:
                parquet.write_table(pa.Table.from_pylist(rows, parquet.schema))
                rows.clear()

            yield add
            flush()
        return
    with gzip.open(path, "wt", 3) if path.suffix == ".gz" else path.open("w", encoding="utf-8", newline="") as out:
        if path.suffix == ".csv":
            table = csv.DictWriter(out, next(make_rows(1)))
            table.writeheader()
            yield table.writerow
        elif path.suffix == ".json":
            before = itertools.chain("[", itertools.repeat(",\n"))
            yield lambda row: out.write(next(before) + json.dumps(row))
            out.write("]")
        elif path.name == "messages.jsonl":
            yield lambda row: out.write(json.dumps(as_messages(row)) + "\n")
        else:
            yield lambda row: out.write(json.dumps(row) + "\n")


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    question = {"role": "user", "content": f"{row['instruction']}\n\n### Context:\n{row['context']}"}
    answer = {"role": "assistant", "content": row["response"]}
    return {"messages": [question, answer], "category": row["category"]}


def check_out(rev: str, folder: Path) -> Path:
    """The files of another commit, in a folder."""
    target = folder / "against"
    target.mkdir()
    tar = subprocess.run(["git", "archive", rev], cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if tar.returncode:
        raise UserError(f"--against: git has no files of {rev}")
    subprocess.run(["tar", "x", "-C", str(target)], input=tar.stdout, check=True)
    return target


def prepare(root: Path, way: Way) -> Measured:
    """Run the stage in `root`."""
    params = yaml.safe_load((way.code / "params.yaml").read_text("utf-8"))
    params["data"] |= {"source": f"path://{root / way.file}", "sha256": None, "categories": None}
    (root / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    stage = psutil.Popen(
        [sys.executable, str(way.code / "stages" / "prepare_data.py")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(way.code), "TMPDIR": str(root)},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, way.cores),
    )
    most = 0
    while stage.poll() is None:
        with contextlib.suppress(psutil.Error):  # a process has just ended
            most = max(most, sum(p.memory_full_info().pss for p in (stage, *stage.children(recursive=True))))
        time.sleep(0.5)
    if stage.returncode:
        raise UserError(f"prepare_data failed with exit code {stage.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(read_json(root / timing_file("prepare_data"))["seconds"], processor, most / 2**30)


if __name__ == "__main__":
    run(main)
