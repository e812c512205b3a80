"""DVC's experiments: checked before they are queued, run, and shown as a table."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trnlora import paths
from trnlora.errors import UserError
from trnlora.params import load_params
from trnlora.preflight.whole_params import check_whole

# Of the table. Experiment and State are not named, but always there.
COLUMNS = (
    r"^(?!Experiment$|State$|(model|data|convert|lora|train)\."
    r"|tuned\.(exact_match|rougeL|chrf|loss)$|validation_loss$)"
)


def show_experiments() -> None:
    """Print the table. Raises UserError if DVC cannot."""
    width = {} if sys.stdout.isatty() else {"COLUMNS": "120"}
    options = ["--no-pager", "--only-changed", "--hide-workspace", "--sort-by", "validation_loss", "--drop", COLUMNS]
    _dvc("exp", "show", *options, **width)


def check_changes(changes: Sequence[str]) -> None:
    """Check the params of every experiment that `changes` make, as `KEY=VALUE,VALUE` in the grammar of --set-param.

    Raises UserError for a change that DVC does not understand, and for params that no stage could run with.
    """
    from dvc.exceptions import DvcException
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import apply_overrides, get_hydra_sweeps

    try:
        sweeps = get_hydra_sweeps(to_path_overrides(changes))
    except Exception as error:  # DVC's, and those of the library that parses a change
        raise UserError(f"{' '.join(changes)}: {' '.join(str(error).split())[:300]}") from None
    for overrides in sweeps:
        if overrides.keys() != {str(paths.PARAMS)}:
            raise UserError(f"{' '.join(changes)}: only params of {paths.PARAMS} can be changed")
        changed = overrides[str(paths.PARAMS)]
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, paths.PARAMS)
            copy.write_bytes(paths.PARAMS.read_bytes())
            try:
                apply_overrides(copy, changed)
                check_whole(load_params(copy))
            except (UserError, DvcException) as error:
                reason = str(error.__cause__ or error).removeprefix(f"{copy}: ")
                raise UserError(f"{' '.join(changed)}: {' '.join(reason.split())}") from None


def queue(changes: Sequence[str], name: str | None) -> None:
    """Queue an experiment for each combination of the changes' values. Raises UserError if DVC refuses them."""
    if name is not None and not re.fullmatch(r"\w[\w-]*", name):
        raise UserError(f"{name!r} cannot be the name of an experiment: use letters, digits, - and _")
    named = [] if name is None else [f"--name={name}"]
    _dvc("exp", "run", "--queue", *named, *(f"--set-param={change}" for change in changes))


def run_queued() -> None:
    """Run all queued experiments one after the other. Raises UserError naming those that did not end well.

    `dvc exp run --run-all` itself ends with 0 whatever becomes of them.
    """
    waiting = {entry["rev"] for entry in _tasks() if entry["status"] in ("Queued", "Running")}
    _dvc("exp", "run", "--run-all", "--jobs", "1")
    left = {
        entry["name"] or entry["rev"][:7]: entry["status"].lower()
        for entry in _tasks()
        if entry["rev"] in waiting and entry["status"] != "Success"
    }
    if left:
        states = ", ".join(f"{name} ({status})" for name, status in left.items())
        show = f"`dvc queue logs {next(iter(left))}`"
        raise UserError(f"without a result: {states}; {show} shows why, the others are kept")


def _tasks() -> list[dict[str, str]]:
    """What `dvc queue status` lists."""
    from dvc.repo import Repo

    with Repo() as repo:
        return list(repo.experiments.celery_queue.status())


def _dvc(*arguments: str, **env: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], env=os.environ | env, check=False)
    if done.returncode:
        raise UserError(f"`dvc {arguments[0]} {arguments[1]}` ended with exit code {done.returncode}: see above")
