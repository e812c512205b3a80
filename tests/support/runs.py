"""Folders in which stages have run, for tests that continue from there."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from support import ROOT
from support.records import write_fetched
from support.stages import run_stage, set_params

# Two epochs. Tests that need no other run share this one.
TRAIN = {"epochs": 2, "checkpoint_every_steps": 3}

# The learning rate rises until the training diverges. Of the validations after steps 2, 4, 6, 8 and 10, that after step
# 6 has the lowest loss, on every sharding. Step 10, in the same epoch, is the last one of the 36 that are planned.
STOPS_EARLY: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.0},
    "train": {
        "epochs": 3, "lr": 0.25, "warmup_ratio": 1.0, "validate_every_steps": 2, "keep": "best",
        "early_stopping_patience": 2, "checkpoint_every_steps": 3, "checkpoints_kept": 100,
    },
}  # fmt: skip


def prepare(folder: Path, model: Path) -> Path:
    """Prepare rows for `model` in `folder`, which gets a link to it. Copy it before writing to it."""
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "model").symlink_to(model)
    rows = [json.loads(line) for line in (ROOT / "data" / "tasks.jsonl").read_text("utf-8").splitlines()]
    # 23 packed rows: few, and an odd number, so that the last optimizer step of an epoch has fewer rows.
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:135]), "utf-8")
    set_params(
        folder,
        data={"source": "path://rows.jsonl", "sha256": None, "seq_len": 256},
        lora={"target_modules": "all-linear", "lora_dropout": 0.05},
        train={"epochs": 1, "lr": 1.0e-2, "global_batch_size": 2},
    )
    write_fetched(folder)
    run_stage("prepare_data", folder)
    return folder


class Runs:
    """Folders in which stages have run: made once per session for each set of params, copied for each test."""

    def __init__(self, prepared: Path, cache: Path) -> None:
        self._prepared = prepared
        self._cache = cache

    def converted(self, folder: Path, **sections: dict[str, Any]) -> Path:
        """A copy of `prepared` in `folder` with these params, converted."""
        convert = self._cached("convert_nxd", self._prepared, {"convert": sections.get("convert", {})})
        shutil.copytree(convert, folder, symlinks=True)
        set_params(folder, **sections)
        return folder

    def trained(self, folder: Path, **sections: dict[str, Any]) -> Path:
        """The same, trained."""
        convert = self._cached("convert_nxd", self._prepared, {"convert": sections.get("convert", {})})
        shutil.copytree(self._cached("finetune_lora", convert, sections), folder, symlinks=True)
        return folder

    def _cached(self, stage: str, before: Path, sections: dict[str, dict[str, Any]]) -> Path:
        """A copy of the folder `before`, after running `stage` in it with these params."""
        folder = self._cache / stage / hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()
        if not folder.exists():
            partial = self._cache / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(before, partial, symlinks=True)
            set_params(partial, **sections)
            run_stage(stage, partial)
            folder.parent.mkdir(exist_ok=True)
            partial.rename(folder)
        return folder
