"""Lightning's loggers for TensorBoard, MLflow and W&B, which get the values of DVCLive's curves.

`train.loggers` names them; none is on by default. Their packages are not among the project's requirements. What they
write on this machine is in .scratch/loggers. Where else they write is said by their own environment variables:
MLFLOW_TRACKING_URI, WANDB_MODE, WANDB_PROJECT, …
"""

import contextlib
import importlib.util
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trnlora.errors import UserError
from trnlora.params import Params

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

FOLDER = Path(".scratch/loggers")
PROJECT = "trnlora"  # unless MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT names another
# They report to their makers even if the values stay on this machine. A variable that the user has set keeps its value.
NO_REPORTS = {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}


def check_installed(names: Sequence[str]) -> None:
    """Raise UserError with the command to install the packages that are missing here. Imports none of them."""
    specs = {name: importlib.util.find_spec(name) for name in names}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]  # None: any folder
    if not missing:
        return
    uv = Path(sys.prefix) / "bin/uv"
    # The overrides keep every package of the lock at its version, whatever bounds the new ones have.
    command = f"{uv} pip install --overrides requirements.lock" if uv.exists() else f"{sys.executable} -m pip install"
    raise UserError(
        f"train.loggers names {' and '.join(missing)}, not installed here: run `{command} {' '.join(missing)}`"
    )


@contextlib.contextmanager
def open_loggers(params: Params, runs: Mapping[str, str], step: int) -> Iterator["Loggers"]:
    """The loggers of `train.loggers`, closed at the end, as failed after an error. For the first rank.

    runs, step: `Loggers.runs` and the step of the checkpoint at which an interrupted training resumes.
    Raises UserError if one is not installed or does not start, e.g. because its server does not answer.
    """
    check_installed(params.train.loggers)
    os.environ.update({name: os.environ.get(name, value) for name, value in NO_REPORTS.items()})
    loggers = Loggers()
    try:
        for name in params.train.loggers:
            FOLDER.mkdir(parents=True, exist_ok=True)
            try:
                loggers.add(name, params, runs.get(name), step)
            except Exception as error:  # each library has its own
                raise UserError(f"train.loggers: {name} does not start: {_reason(error)}") from None
        yield loggers
    except BaseException:
        loggers.close("failed")
        raise
    loggers.close("success")


class Loggers:
    """Lightning's loggers by their names in `train.loggers`. One that fails is dropped: the training continues."""

    def __init__(self) -> None:
        self._loggers: dict[str, Logger] = {}
        self._logged: dict[str, dict[str, int]] = {}  # the last step of each value that a resumed run has logged before

    def add(self, name: str, params: Params, run: str | None, step: int) -> None:
        """Start a logger. run: the run of its own to resume at `step`; None: a new one, which gets the params."""
        logger = _OPEN[name](run, step)
        _ = logger.experiment  # type: ignore[attr-defined]  # starts it
        self._loggers[name] = logger
        if run is None:
            logger.log_hyperparams(params.model_dump())
        elif name == "mlflow":
            self._logged[name] = _steps_in_mlflow(logger)

    def runs(self) -> dict[str, str]:
        """The name of each logger's run, with which it can be resumed."""
        return {name: str(logger.version) for name, logger in self._loggers.items()}

    def log(self, values: dict[str, float], step: int) -> None:
        for name, logger in list(self._loggers.items()):
            logged = self._logged.get(name, {})
            new = {key: value for key, value in values.items() if step > logged.get(key, -1)}
            with self._drop_if_it_fails(name):
                if new:
                    logger.log_metrics(new, step)

    def flush(self) -> None:
        """Let the loggers write what they hold back: a checkpoint has been reached, so it will not be logged again."""
        for name, logger in list(self._loggers.items()):
            with self._drop_if_it_fails(name):
                logger.save()

    def close(self, status: str) -> None:
        """status: success or failed, as Lightning's `Logger.finalize` has it."""
        for name, logger in list(self._loggers.items()):
            with self._drop_if_it_fails(name):
                logger.finalize(status)
                if name == "wandb":  # its own hook at the end of a process does not run in a forked one
                    logger.experiment.finish(exit_code=int(status != "success"))  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _drop_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            print(f"{name} failed and gets no more values: {_reason(error)}", flush=True)
            self._loggers.pop(name, None)


def _reason(error: Exception) -> str:
    """The first line of an error, without the password of an address."""
    lines = str(error).splitlines() or [""]
    return re.sub(r"//[^/@\s]+@", "//", f"{type(error).__name__}: {lines[0]}")


def _new_run() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def _tensorboard(run: str | None, step: int) -> "Logger":
    from pytorch_lightning.loggers import TensorBoardLogger

    # What an interrupted run has logged after its checkpoint is hidden.
    purge = None if run is None else step + 1
    return TensorBoardLogger(
        FOLDER, name="tensorboard", version=run or _new_run(), default_hp_metric=False, purge_step=purge
    )


def _mlflow(run: str | None, step: int) -> "Logger":
    from pytorch_lightning.loggers import MLFlowLogger

    local = f"sqlite:///{(FOLDER / 'mlflow.db').absolute()}"
    return MLFlowLogger(
        os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
        run_name=_new_run(),
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local,
        run_id=run,
    )


def _wandb(run: str | None, step: int) -> "Logger":
    from pytorch_lightning.loggers import WandbLogger

    return WandbLogger(
        save_dir=FOLDER, project=os.environ.get("WANDB_PROJECT", PROJECT), version=run or _new_run(), resume="allow"
    )


_OPEN = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}


def _steps_in_mlflow(logger: Any) -> dict[str, int]:
    """The last step of each value in the logger's run. MLflow would keep a value that is logged again twice."""
    run = logger.experiment.get_run(logger.run_id)
    histories = {key: logger.experiment.get_metric_history(logger.run_id, key) for key in run.data.metrics}
    return {key: max(metric.step for metric in history) for key, history in histories.items()}
