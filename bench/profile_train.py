"""Where the time of a training step goes: matrix products, attention, element-wise work, communication, data.

    python bench/profile_train.py [--tp-size N] [--steps N]    (make profile-train: one rank)

Reads artifacts/model and artifacts/prepared. Runs finetune_lora on the default profile with a profiler around its
steps, and prints the first rank's seconds by kind. One rank communicates nothing, so the difference to several ranks is
the cost of tensor parallelism on one machine.
"""

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Operators by kind. All other ones of aten are element-wise operations, copies or sums.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise"),
    "attention": (
        "aten::baddbmm",
        "aten::bmm",
        "aten::_softmax",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp-size", type=int, default=1, help="ranks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="training steps (default: %(default)s)")
    args = parser.parse_args()

    import yaml

    from trnlora.training.launch import rank_environment

    with tempfile.TemporaryDirectory(prefix="profile-train-") as name:
        folder = Path(name)
        (folder / "artifacts").mkdir()
        for artifact in ("model", "prepared"):
            (folder / "artifacts" / artifact).symlink_to(ROOT / "artifacts" / artifact)
        params = yaml.safe_load((ROOT / "profiles" / "smollm2-135m-cpu.yaml").read_text("utf-8"))
        params["convert"]["tp_size"] = args.tp_size
        params["train"]["max_steps"] = args.steps
        (folder / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
        subprocess.run([sys.executable, ROOT / "stages" / "convert_nxd.py"], cwd=folder, check=True)
        env = rank_environment(args.tp_size, threads=None)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(args.tp_size)]
        subprocess.run([*launcher, __file__], cwd=folder, env={**os.environ, **env}, check=True)


def rank_main() -> None:
    """Run the stage in this rank, with a profiler from the first training step to the last."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from trnlora.backends import torch as backend
    from trnlora.training import batches, progress

    profiler = profile(activities=[ProfilerActivity.CPU])

    class Profiled(progress.TrainingProgress):
        def on_train_start(self, *args: Any) -> None:
            super().on_train_start(*args)
            profiler.start()

        def on_train_end(self, *args: Any) -> None:
            super().on_train_end(*args)
            profiler.stop()
            if os.environ["RANK"] == "0":
                report(profiler, self.seconds, self.total_steps)

    def named(name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return wrapped

    progress.TrainingProgress = Profiled  # type: ignore[misc]
    backend.ProcessGroup.all_reduce = named("communication", backend.ProcessGroup.all_reduce)  # type: ignore[method-assign]
    batches.MicroBatches.__getitem__ = named("data", batches.MicroBatches.__getitem__)  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "stages" / "finetune_lora.py"), run_name="__main__")


def report(profiler: Any, seconds: float, steps: int) -> None:
    from rich.console import Console
    from rich.table import Table

    found = dict.fromkeys((*KINDS, "communication", "data", "element-wise, copies, sums"), 0.0)
    for event in profiler.key_averages():
        if event.key in ("communication", "data"):
            found[event.key] += event.cpu_time_total  # includes what it calls and waits for
        elif event.key.startswith(("aten::", "mkldnn::")):
            kind = next((kind for kind, keys in KINDS.items() if event.key in keys), "element-wise, copies, sums")
            found[kind] += event.self_cpu_time_total
    found = {kind: microseconds / 1e6 for kind, microseconds in found.items()}
    found["Python, autograd, the loop"] = max(0.0, seconds - sum(found.values()))
    threads = os.environ["OMP_NUM_THREADS"]
    table = Table(title=f"{steps} steps, tp {os.environ['WORLD_SIZE']}, {threads} threads per rank")
    for column in ("", "seconds a step", "share"):
        table.add_column(column, justify="right" if column else "left")
    for kind, spent in found.items():
        table.add_row(kind, f"{spent / steps:.3f}", f"{spent / seconds:.1%}")
    table.add_row("all", f"{seconds / steps:.3f}", "")
    Console().print(table)


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank_main()
    else:
        main()
