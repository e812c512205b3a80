"""Speed and memory of convert_nxd, compared with a plain copy and with a converter that loads the whole model.

    python bench/convert.py [--preset 1b|8b] [--pairs N] [--dir DIR]       (make bench runs the 1b preset)

Makes a checkpoint of random bf16 weights of the preset's shape, in files of 5 GB as on the hub. Converts it for trn2
at tp 32 with kv_size_multiplier 4. Prints the median of N runs for each of these ways, which take turns:

ours       `trnlora.weights.convert.write_shards`, fsync at the end of each file
copy       a copy of the output files with shutil.copyfile and fsync
baseline   what NxD's converter does (scripts/checkpoint_converter.py): load everything; for each rank, rebuild the full
           q, o and repeated k and v, clone the rank's slices, torch.save (and fsync)

Each run is a separate process whose input is not in the page cache. The seconds do not include imports. The memory is
the process's peak resident set. The baseline holds the whole model in memory, so it runs only for the 1b preset.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trnlora.model.config import ModelConfig
from trnlora.model.tensors import hf_shapes
from trnlora.params import Convert

PRESETS = {
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
CONVERT = Convert(hw_backend="trn2", tp_size=32, kv_size_multiplier=4, max_logits_diff=1.0, buffer_mib=32)
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="1b")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each way (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="where the checkpoints are made (default: the temporary folder)")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_one(args.run[0], Path(args.run[1]), ModelConfig.from_hf({"model_type": "llama", **PRESETS[args.preset]}))
        return

    with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench-convert-") as folder:
        root = Path(folder)
        config = ModelConfig.from_hf({"model_type": "llama", **PRESETS[args.preset]})
        print(f"making a {args.preset} checkpoint of random weights", flush=True)
        make_checkpoint(root / "model", config)
        ways = ["ours", "copy"] + (["baseline"] if args.preset == "1b" else [])
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(args.pairs):
            for way in ways:
                command = [sys.executable, __file__, "--preset", args.preset, "--run", way, str(root)]
                result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                runs[way].append(result)
                print(f"run {number + 1}: {way} {result['seconds']:.1f} s", flush=True)
        report(args.preset, runs)


def report(preset: str, runs: dict[str, list[dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{preset}: {runs['ours'][0]['gib']:.1f} GiB written, tp 32 × 4, trn2", title_justify="left")
    for column in ("", "seconds", "GiB/s", "peak RSS GiB", "seconds / ours", "ours / this"):
        table.add_column(column, justify="right" if column else "left")
    ours = statistics.median(run["seconds"] for run in runs["ours"])
    for way, results in runs.items():
        seconds = statistics.median(run["seconds"] for run in results)
        # per run, since a machine's speed drifts
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(runs["ours"], results, strict=True)]
        table.add_row(
            way, f"{seconds:.1f}", f"{results[0]['gib'] / seconds:.2f}", f"{max(r['rss_gib'] for r in results):.2f}",
            f"{seconds / ours:.2f}", f"{statistics.median(ratios):.2f}",
        )  # fmt: skip
    Console().print(table)


def make_checkpoint(folder: Path, config: ModelConfig) -> None:
    """Write an HF folder of random bf16 weights."""
    import numpy as np
    import torch

    from trnlora.weights.reshard import each_block
    from trnlora.weights.storage import StoredTensor, create_hf_folder

    folder.mkdir()
    noise = (torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    noise_bytes = noise.view(torch.uint8).numpy()

    def fill(name: str, tensor: StoredTensor, first: int, block: np.ndarray) -> int:
        shift = hash((len(name), first)) % 2**20 * 2
        tensor.write_rows(first, noise_bytes[shift : shift + block.size])
        return block.size

    specs = {name: (shape, torch.bfloat16) for name, shape in hf_shapes(config).items()}
    with create_hf_folder(folder, specs) as tensors:
        for _ in each_block(tensors, fill, 16 * 2**20):
            pass


def run_one(way: str, root: Path, config: ModelConfig) -> None:
    """One run in this process; prints its figures as JSON."""
    target = root / f"{way}-out"
    shutil.rmtree(target, ignore_errors=True)
    # Drop the input from the page cache: otherwise a copy of files that were just written would not read the disk.
    for file in (root / ("ours-out" if way == "copy" else "model")).rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if way == "ours":
        import trnlora.weights.storage  # noqa: F401  # not measured: the import of torch
        from trnlora.weights.convert import write_shards

        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # progress output
            write_shards(root / "model", target, config, CONVERT)
    elif way == "copy":
        started = time.perf_counter()
        for file in sorted((root / "ours-out").rglob("*.pt")):
            copied = target / file.relative_to(root / "ours-out")
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)
            fsync(copied)
    else:
        import torch
        from safetensors.torch import load_file

        from trnlora.weights.storage import PRETRAINED_TAG, rank_file

        started = time.perf_counter()
        state: dict[str, torch.Tensor] = {}
        for file in sorted((root / "model").glob("*.safetensors")):
            state.update(load_file(file))
        for rank in range(CONVERT.tp_size):
            shard = baseline_shard(state, config, rank)
            path = rank_file(target, PRETRAINED_TAG, rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(shard, path)
            fsync(path)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in target.rglob("*.pt"))
    if way != "ours":  # what `copy` copies
        shutil.rmtree(target)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(json.dumps({"seconds": seconds, "gib": size / GIB, "rss_gib": rss}))


def baseline_shard(state: dict[str, Any], config: ModelConfig, rank: int) -> dict[str, Any]:
    """One rank's tensors, with the copies that NxD's converter makes, but with K/V in the correct order."""
    import torch

    tp_size, repeat = CONVERT.tp_size, CONVERT.kv_size_multiplier
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        size = tensor.shape[dim] // tp_size
        return tensor.narrow(dim, rank * size, size).clone()

    shard: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if "q_proj" in name or "o_proj" in name:
            rows = tensor.T if "o_proj" in name else tensor
            groups = rows.reshape(kv_heads, heads // kv_heads, head_dim, -1)
            whole = torch.cat([groups[index] for index in range(kv_heads)])
            own = whole[rank * heads // tp_size : (rank + 1) * heads // tp_size].reshape(-1, rows.shape[1])
            name = name.replace("q_proj.weight", "qkv_proj.weight_q")
            shard[name] = (own.T if "o_proj" in name else own).clone()
        elif "k_proj" in name or "v_proj" in name:
            whole = tensor.view(kv_heads, head_dim, -1).repeat_interleave(repeat, dim=0).flatten(0, 1)
            letter = "k" if "k_proj" in name else "v"
            shard[name.replace(f"{letter}_proj.weight", f"qkv_proj.weight_{letter}")] = part(whole, 0)
        elif "gate_proj" in name:
            up = part(state[name.replace("gate_proj", "up_proj")], 0)
            shard[name.replace("gate_proj", "gate_up_proj")] = torch.cat([part(tensor, 0), up]).clone()
        elif "up_proj" not in name:
            shard[name] = tensor if "norm" in name else part(tensor, 1 if "down_proj" in name else 0)
    return shard


def fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
