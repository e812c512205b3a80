"""The training stage on each backend, with stand-ins where the hardware's library cannot run, compared."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support import ROOT
from support.models import write_llama
from support.nxd import REHEARSAL, XLA_PYTHON, stand_in_environment, xla_environment
from support.stages import run_stage
from trnlora.files import write_sums

NATIVE = ROOT / "tests" / "neuron" / "native"  # the stand-in for torch_neuronx
QKV = ["qkv_proj"]
RANKS = {"trn2": 4, "trn1": 8}  # AWS supports four on trn2 only
PLAIN = {"logical_core_size": 1, "sequence_parallel": False, "selective_checkpointing": False}


def run_script(
    script: Path,
    folder: Path,
    env: dict[str, str] | None = None,
    launcher: Sequence[str] = (sys.executable,),
    *arguments: str,
) -> None:
    command = [*launcher, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def write_params(folder: Path, **sections: dict[str, Any] | str) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load((path if path.exists() else ROOT / "params.yaml").read_text("utf-8"))
    for section, values in sections.items():
        params[section] = values if isinstance(values, str) else {**params[section], **values}
    path.write_text(yaml.safe_dump(params), "utf-8")


class Rehearsals:
    """Runs of a few steps from the same shards, each made once.

    steps: optimizer steps of a run. seq_len: tokens of a packed row.
    """

    def __init__(self, tmp_path_factory: pytest.TempPathFactory, steps: int, seq_len: int):
        self.tmp_path_factory = tmp_path_factory
        self.steps = steps
        self.seq_len = seq_len
        self.folders: dict[str, Path] = {}

    def prepared(self, kv_heads: int, dtype: str) -> Path:
        """A folder with rows and a model of 8 heads and this number of KV heads."""
        key = f"prepared-{kv_heads}-{dtype}"
        if key not in self.folders:
            folder = self.folders[key] = self.tmp_path_factory.mktemp(key)
            model = folder / "artifacts" / "model"
            model.parent.mkdir()
            write_llama(model, hidden_size=256, num_attention_heads=8, num_key_value_heads=kv_heads)
            if dtype != "float32":
                _save_as(model, dtype)
            rows = (ROOT / "data" / "tasks.jsonl").read_text("utf-8").splitlines(keepends=True)[:200]
            (folder / "rows.jsonl").write_text("".join(rows), "utf-8")
            data = {"source": "path://rows.jsonl", "sha256": None, "seq_len": self.seq_len}
            write_params(folder, data=data, model={"dtype": dtype})
            run_stage("prepare_data", folder)
        return self.folders[key]

    def converted(
        self, where: str, hw_backend: str, multiplier: int, dp_size: int = 1, *, ranks: int = 0, **sections: Any
    ) -> Path:
        """A new folder with params, rows and shards for a run of `ranks` ranks (default: RANKS).

        where: cpu; neuron, with the stand-in; nxd, with the stand-in; or torch_xla: nxd with the real one.
        """
        folder = self.tmp_path_factory.mktemp(where) / "run"
        tp_size = (ranks or RANKS[hw_backend]) // dp_size
        dtype = sections.get("model", {}).get("dtype", "float32")
        shutil.copytree(self.prepared(tp_size // multiplier, dtype), folder, symlinks=True)
        steps = {"epochs": 9, "max_steps": self.steps, "lr": 2.0e-4}
        batches = {"global_batch_size": 2, "micro_batch_size": 1, "dp_size": dp_size}
        write_params(
            folder,
            backend=where if where in ("cpu", "neuron") else "nxd",
            convert={"hw_backend": hw_backend, "tp_size": tp_size, "kv_size_multiplier": multiplier},
            lora={"lora_dropout": 0.0, **sections.get("lora", {})},
            train={**steps, **batches, **sections.get("train", {})},
            neuron={**PLAIN, **sections.get("neuron", {})},
        )
        run_stage("convert_nxd", folder)
        return folder

    def train(
        self, where: str, hw_backend: str, multiplier: int, dp_size: int = 1, *, ranks: int = 0, **sections: Any
    ) -> Path:
        """A folder after a run. `record` in it has what its ranks computed, see record.py."""
        key = repr((where, hw_backend, multiplier, dp_size, ranks, sections))
        if key not in self.folders:
            folder = self.converted(where, hw_backend, multiplier, dp_size, ranks=ranks, **sections)
            (folder / "record").mkdir()
            (folder / "graphs").mkdir()
            env, launcher = environment(where, hw_backend, ranks or RANKS[hw_backend], folder)
            run_script(REHEARSAL / "record.py", folder, env, launcher)
            self.folders[key] = folder
        return self.folders[key]


def environment(where: str, hw_backend: str, ranks: int, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Environment variables and the command before a script, of a run in `folder`."""
    platform = {"NEURON_PLATFORM_TARGET_OVERRIDE": hw_backend, "RECORD": str(folder / "record")}
    if where == "nxd":
        return stand_in_environment() | platform, [sys.executable]
    if where == "neuron":
        path = os.pathsep.join([str(ROOT), str(NATIVE)])
        return {**os.environ, **platform, "PYTHONPATH": path, "GRAPHS": str(folder / "graphs")}, [sys.executable]
    if where == "torch_xla":
        return xla_environment() | platform | ({"BRIDGE": "gloo"} if ranks > 1 else {}), [str(XLA_PYTHON)]
    # record.py changes modules in its own process, but on cpu the stage would fork its ranks from another process.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    # The same products as those of the others on any processor: MKL's. Packed weights have tests of their own.
    return {**os.environ, **platform, "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"}, torchrun


def _save_as(model: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).save_pretrained(model)
    write_sums(model)


def curve(folder: Path, name: str) -> list[float]:
    with (folder / f"plots/training/plots/metrics/train/{name}.tsv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file, delimiter="\t")]


def adapter(folder: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted((folder / "artifacts/lora_adapter/lora/model").iterdir())
    return [torch.load(file, weights_only=True) for file in files]


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics/finetune_lora.json").read_text("utf-8"))


def records(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "record").iterdir(), key=lambda file: int(file.stem))
    return [torch.load(file, weights_only=True) for file in files]


def assert_bfloat16_run(
    found: Path, in_bfloat16: Path, in_float32: Path, *, bounds: tuple[float, float] = (0.06, 0.12)
) -> None:
    """The losses of a run with bfloat16 base weights are near those of two runs on cpu; its adapter is float32.

    The losses are about 12. docs/trainium.md has the differences that were seen.
    """
    print()
    for expected, bound in zip((in_bfloat16, in_float32), bounds, strict=True):
        losses = zip(curve(found, "loss"), curve(expected, "loss"), strict=True)
        worst = max(abs(a - b) for a, b in losses)
        validation = abs(metrics(found)["validation_loss"] - metrics(expected)["validation_loss"])
        print(f"training losses differ by {worst:.3f}, validation losses by {validation:.3f} (bound {bound})")
        assert max(worst, validation) < bound
    assert {str(tensor.dtype) for shard in adapter(found) for tensor in shard.values()} == {"torch.float32"}


def assert_same_run(found: Path, expected: Path, steps: int, tolerance: float = 1e-4) -> None:
    """Both runs have the same logits, adapter and, for every step, loss, gradients, gradient norm and learning rate.

    tolerance: of logits, which reach 15, and of gradients relative to the largest in their tensor.
    """
    print()
    worst = {"logits": 0.0, "weights": 0.0, "lora_A": 0.0, "lora_B": 0.0}
    for one, other in zip(records(found), records(expected), strict=True):
        worst["logits"] = max(worst["logits"], (one["logits"] - other["logits"]).abs().max().item())
        assert len(one["steps"]) == steps
        for step, other_step in zip(one["steps"], other["steps"], strict=True):
            for name, gradient in other_step["gradients"].items():
                weight = other_step["weights"][name]
                worst["weights"] = max(worst["weights"], (step["weights"][name] - weight).abs().max().item())
                difference = (step["gradients"][name] - gradient).abs().max().item()
                if largest := gradient.abs().max().item():
                    kind = "lora_A" if ".lora_A." in name else "lora_B"
                    worst[kind] = max(worst[kind], difference / largest)
                else:
                    assert difference == 0, f"{name} has no gradient while lora_B is 0"
    print(f"logits differ by {worst['logits']:.1e}")
    print(f"gradients differ by {worst['lora_A']:.1e} (A), {worst['lora_B']:.1e} (B) of the largest in their tensor")
    print(f"adapters during the run differ by {worst['weights']:.1e}")
    assert max(worst[name] for name in ("logits", "lora_A", "lora_B")) < tolerance
    assert worst["weights"] < 1e-5

    for name in ("loss", "grad_norm", "lr"):
        a, b = curve(found, name), curve(expected, name)
        print(f"{name} differs by {max(abs(x - y) for x, y in zip(a, b, strict=True)):.1e}")
        assert len(a) == steps
        assert a == pytest.approx(b, abs=2e-5, rel=1e-5), name
    shards = adapter(expected)
    assert [sorted(shard) for shard in adapter(found)] == [sorted(shard) for shard in shards]
    worst_value = 0.0
    for one, other in zip(adapter(found), shards, strict=True):
        for key, tensor in one.items():
            assert (tensor.dtype, tensor.shape) == (torch.float32, other[key].shape)
            assert tensor.any()
            worst_value = max(worst_value, (tensor - other[key]).abs().max().item())
    print(f"saved adapters differ by {worst_value:.1e}")
    assert worst_value < 1e-5
    losses = ("base_validation_loss", "validation_loss", "train_loss")
    one_run, other_run = metrics(found), metrics(expected)
    for name in losses:
        assert one_run.pop(name) == pytest.approx(other_run.pop(name), abs=1e-5)
    assert one_run == other_run
