"""The answers of the evaluation from a vLLM in another Python environment: on Trainium, that of neuron.vllm_python.

vllm-neuron has no log-probabilities of the prompt (ModelRunnerOutput.prompt_logprobs_dict is always empty: vllm-neuron
0.5.0, worker/neuronx_distributed_model_runner.py), so there is no loss.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.backends import neuron_machine
from trnlora.backends.python_environment import with_own_bin
from trnlora.data.examples import PreparedExample, prompt_token_ids
from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.readers import read_json
from trnlora.serving import vllm_worker
from trnlora.serving.adapters import BASE, TUNED, Adapter
from trnlora.serving.engine import Completion
from trnlora.serving.process import reason, stop
from trnlora.serving.vllm_neuron import (
    NeuronServer,
    check_served,
    find_vllm,
    merged_args,
    merged_environment,
    prepare_plugin,
)
from trnlora.training.adapter_record import GREEDY
from trnlora.weights.peft_folder import CONFIG, WEIGHTS

SCRATCH = Path(".scratch/eval_vllm")
LOG = SCRATCH / "vllm.log"


@dataclass(frozen=True)
class Job:
    """One start of vLLM."""

    python: str
    engine: dict[str, Any]  # keyword arguments of vllm.LLM
    env: dict[str, str]
    # By the model's name, as in vllm_worker.Request: its adapter's folder, or None.
    models: dict[str, Path | None]


@dataclass(frozen=True)
class DeviceAnswers:
    """The answers of all models."""

    start_seconds: float
    models: dict[str, tuple[list[Completion], float]]  # in the order of the rows; the seconds that they took


class DeviceEngine:
    """A vLLM that is started for the answers and stopped after them."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def answer(self, rows: Sequence[PreparedExample], max_tokens: int) -> DeviceAnswers:
        """Greedy answers of every model of every job. Raises UserError with vLLM's reason, in one line."""
        prompts = [prompt_token_ids(row) for row in rows]
        models: dict[str, tuple[list[Completion], float]] = {}
        start_seconds = 0.0
        for job in self._jobs:
            answers = run_job(job, prompts, max_tokens)
            start_seconds += answers["start_seconds"]
            for name, found in answers["models"].items():
                columns = (found["texts"], found["tokens"], found["finish_reasons"])
                models[name] = ([Completion(*answer) for answer in zip(*columns, strict=True)], found["seconds"])
        return DeviceAnswers(start_seconds, models)


def neuron_engine(params: Params, tuned: Adapter) -> DeviceEngine:
    """The engine of neuron.vllm_python, with the server's arguments. Writes its files to SCRATCH.

    With NxDI one engine has the base model, as an adapter of zeros, and `tuned`. Without, base and merged model are
    answered one after another. Raises UserError if neither is possible.
    """
    try:
        found = find_vllm(params)
        check_served(found.server)
        if found.server is NeuronServer.MERGED and params.eval.adapter:
            raise UserError("this vllm-neuron does not load adapters, so eval.adapter cannot be served")
    except UserError as error:
        raise UserError(f"eval.engine: device: {error}; or set eval.engine: host") from None
    neuron_machine.check_free_cores(params.convert.tp_size, params.neuron.logical_core_size)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    if found.server is NeuronServer.MERGED:
        env = merged_environment(params)
        folders = {BASE: paths.MODEL, TUNED: paths.MERGED}
        return DeviceEngine(
            [Job(found.python, merged_args(params, folder), env, {name: None}) for name, folder in folders.items()]
        )
    # NxDI loads the last weight file that it finds in an adapter's folder, and one from elsewhere may have several.
    alone = SCRATCH.absolute() / TUNED
    alone.mkdir()
    for name in (CONFIG, WEIGHTS):
        (alone / name).symlink_to((tuned.folder / name).resolve())
    adapter = replace(tuned, name=TUNED, folder=alone)
    engine = prepare_plugin(params, found.versions, adapter, SCRATCH.absolute())
    print(f"compiled graphs: {engine.compiled}", flush=True)
    models: dict[str, Path | None] = {name: engine.adapters[name] for name in (BASE, TUNED)}
    return DeviceEngine([Job(found.python, engine.args, engine.env, models)])


def run_job(job: Job, prompts: list[list[int]], max_tokens: int) -> vllm_worker.Answers:
    """Start vLLM, let it answer, and leave no process behind. Its own output goes to LOG.

    Raises UserError with vLLM's reason and the log's location if it ends without answers.
    """
    SCRATCH.mkdir(parents=True, exist_ok=True)
    request: vllm_worker.Request = {
        "engine": job.engine,
        "models": {name: str(folder) if folder else None for name, folder in job.models.items()},
        "prompts": prompts,
        "sampling": {**GREEDY.model_dump(), "max_tokens": max_tokens},
    }
    request_file, answers_file = SCRATCH / "request.json", SCRATCH / "answers.json"
    request_file.write_text(json.dumps(request), encoding="utf-8")
    answers_file.unlink(missing_ok=True)
    print(f"starting vLLM of {job.python} for {' and '.join(job.models)} … (its log: {LOG})", flush=True)
    code = _run(job, [str(request_file), str(answers_file)])
    if code or not answers_file.exists():
        lines = LOG.read_text("utf-8", errors="replace").splitlines()
        killed = f" was killed by {signal.Signals(-code).name}" if code < 0 else ""
        raise UserError(f"vLLM{killed or ' failed'} ({' and '.join(job.models)}): {reason(lines)} (its log: {LOG})")
    answers: vllm_worker.Answers = read_json(answers_file)
    return answers


def _run(job: Job, files: list[str]) -> int:
    """Run the worker; return its exit code, negative for a signal."""
    root = str(Path(__file__).parents[2])
    env = {**os.environ, **job.env, "PYTHONPATH": root, "PATH": with_own_bin(job.python, os.environ["PATH"])}
    # SIGTERM as Ctrl-C, so that the worker is stopped too; it has a process group of its own.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.flush()
    progress = os.dup(1)
    try:
        with LOG.open("wb") as log:
            worker = subprocess.Popen(
                [job.python, "-u", "-m", vllm_worker.__name__, *files, str(progress)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                pass_fds=(progress,),
                start_new_session=True,
            )
            try:
                return worker.wait()
            finally:
                stop(worker)
    finally:
        os.close(progress)
        signal.signal(signal.SIGTERM, before)
