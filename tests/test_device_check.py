"""`make device-check`: the static form agrees with the torch backend, and what differs is found and named."""

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT
from support.stages import set_params

from trnlora.profiles import load_profile
from trnlora.training.device_check import SIDES, TOLERANCES, compare, tiny_params

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("device_check")]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the check's records, of two ranks with copies of a KV head, after it found no fault.

    In float32 only, for time.
    """
    folder = tmp_path_factory.mktemp("device_check")
    set_params(folder, convert={"tp_size": 2, "kv_size_multiplier": 2}, train={"activation_checkpointing": True})
    script = str(ROOT / "tools" / "device_check.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script])
        patch.delitem(TOLERANCES, "bfloat16")
        runpy.run_path(script)["main"]()
    return folder / ".scratch/device-check/float32"


def logit(record: dict[str, Any]) -> None:
    record["logits"][0, 3, 7] += 0.01


def loss(record: dict[str, Any]) -> None:
    record["steps"][6]["loss"] = float("nan")


def gradient(record: dict[str, Any]) -> None:
    next(iter(record["steps"][3]["gradients"].values())).mul_(1.01)


def weight(record: dict[str, Any]) -> None:
    list(record["steps"][9]["weights"].values())[-1].add_(1e-3)


@pytest.mark.parametrize(
    ("fault", "what", "where"),
    [
        (logit, "logits", ""),
        (loss, "losses", "step 7"),
        (gradient, "gradients", "step 4"),
        (weight, "adapter", "step 10"),
    ],
)
def test_a_difference_is_named(
    records: Path, tmp_path: Path, fault: Callable[[dict[str, Any]], None], what: str, where: str
) -> None:
    folder = shutil.copytree(records, tmp_path / "records")
    file = folder / "device" / "1.pt"
    record = torch.load(file, weights_only=True)
    fault(record)
    torch.save(record, file)
    wrong = [difference for difference in compare(folder, "float32") if difference.is_too_large]
    assert [(difference.rank, difference.what) for difference in wrong] == [(1, what)]
    assert wrong[0].where.startswith(where)


def test_nothing_differs_without_a_fault(records: Path) -> None:
    assert not [difference for difference in compare(records, "float32") if difference.is_too_large]


@pytest.mark.long
def test_the_command_trains_in_both_dtypes(tmp_path: Path) -> None:
    set_params(tmp_path, convert={"tp_size": 2, "kv_size_multiplier": 2}, train={"activation_checkpointing": True})
    command = [sys.executable, str(ROOT / "tools" / "device_check.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for dtype in TOLERANCES:
        assert [line.split()[1::2][0] for line in done.stdout.splitlines() if dtype in line and "│" in line]


def test_backend_cuda_is_checked_without_a_gpu() -> None:
    params = load_profile("smollm2-135m-cpu", ROOT / "profiles").model_copy(update={"backend": "cuda"})
    assert {tiny_params(params, side, "float32").backend for side in SIDES} == {"cpu"}
