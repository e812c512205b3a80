"""Evaluation on the device: its worker with the CPU build of vLLM, and the arguments that the device gets."""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support import ROOT
from support.evaluation import EvalWorker

from trnlora import paths
from trnlora.errors import UserError
from trnlora.evaluation.run import evaluate
from trnlora.params import Params, load_params
from trnlora.profiles import load_profile
from trnlora.serving import device_engine, vllm_neuron
from trnlora.serving.adapters import Adapter, check_own_adapter
from trnlora.serving.device_engine import LOG, SCRATCH, DeviceEngine, Job, neuron_engine, run_job
from trnlora.serving.neuron_lora import write_zero_adapter
from trnlora.serving.vllm_args import engine_args, environment, sampling_args
from trnlora.serving.vllm_neuron import merged_args
from trnlora.training.adapter_record import GREEDY

NXDI = {"vllm": "0.16.0", "vllm-neuron": "0.5.0", "neuronx-distributed-inference": "0.10.18399", "neuronx-cc": "2.26"}
TORCH_NEURON: dict[str, str | None] = {
    "vllm": "0.24.0",
    "vllm-neuron": "0.24.0.1.1.0",
    "neuronx-distributed-inference": None,
}


@pytest.fixture
def project(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `evaluated`, as the working directory."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "project", symlinks=True))
    for written in ("artifacts/answers.jsonl", "metrics/eval_vllm.json"):
        (folder / written).unlink(missing_ok=True)
    monkeypatch.chdir(folder)
    return folder


def neuron_params(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str | None], **sections: Any) -> Params:
    """The Trainium profile with this project's adapter, where neuron.vllm_python has these packages."""
    monkeypatch.setattr(vllm_neuron, "installed", lambda python, packages: versions)
    params = load_profile("llama3-8b-trn2-nxd", ROOT / "profiles")
    sections = {"lora": {"r": 16, "target_modules": ["qkv_proj"]}} | sections
    changed = {section: getattr(params, section).model_copy(update=values) for section, values in sections.items()}
    return params.model_copy(update=changed)


def own_adapter(params: Params) -> Adapter:
    return check_own_adapter(paths.ADAPTER, paths.MODEL, params.lora, "tuned")


# What the device is given


def jobs(params: Params) -> list[Job]:
    return list(neuron_engine(params, own_adapter(params))._jobs)


def test_one_engine_has_base_and_adapter(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in "Offline inference example" of trn2-llama3.1-8b-multi-lora-tutorial.ipynb, with the server's arguments."""
    (job,) = jobs(neuron_params(monkeypatch, NXDI))
    scratch = project / SCRATCH
    assert job.python == "/opt/aws_neuronx_venv_pytorch_inference_vllm_0_16/bin/python"
    assert job.engine == {
        "model": "artifacts/model",
        "dtype": "bfloat16",
        "max_num_seqs": 16,
        "max_model_len": 8192,
        "tensor_parallel_size": 32,
        **sampling_args(GREEDY),
        "num_gpu_blocks_override": 16,
        "additional_config": {
            "max_prompt_length": 8192,
            "override_neuron_config": {"lora_ckpt_json": f"{scratch}/lora.json"},
        },
        "enable_lora": True,
        "max_loras": 2,
        "max_cpu_loras": 2,
        "max_lora_rank": 16,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
    }
    assert job.models == {"base": scratch / "base", "tuned": scratch / "tuned"}
    assert job.env["NEURON_COMPILED_ARTIFACTS"].startswith("/var/tmp/neuron-compile-cache/served/")
    named = json.loads((scratch / "lora.json").read_text("utf-8"))["lora-ckpt-paths"]
    assert {name: Path("/", folder) for name, folder in named.items()} == job.models
    # Only the two files, whatever else an adapter's folder holds: NxDI loads the last weights that it finds.
    assert {path.name for path in (scratch / "tuned").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_without_nxdi_base_and_merged_model_answer_one_after_another(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments: those of the server."""
    params = neuron_params(monkeypatch, TORCH_NEURON)
    with pytest.raises(UserError, match=r"flatten\.merged_model: true .*; or set eval\.engine: host"):
        jobs(params)
    paths.MERGED.mkdir()
    (paths.MERGED / "config.json").write_text("{}")
    base, merged = jobs(params)
    assert base.engine == merged_args(params, paths.MODEL)
    assert merged.engine == merged_args(params, paths.MERGED)
    assert (base.models, merged.models) == ({"base": None}, {"tuned": None})


@pytest.mark.parametrize(
    ("versions", "sections", "message"),
    [
        (NXDI, {"convert": {"hw_backend": "trn1"}}, "supports trn2 and newer, not trn1"),
        (TORCH_NEURON, {"eval": {"adapter": "path:///adapter"}}, r"eval\.adapter cannot be served"),
        ({}, {}, "has no vllm-neuron"),
    ],
)
def test_a_device_that_cannot_answer_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, versions: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    paths.MERGED.mkdir()
    (paths.MERGED / "config.json").write_text("{}")
    params = neuron_params(monkeypatch, versions, **sections)
    with pytest.raises(UserError, match=rf"^eval\.engine: device: .*{message}.*; or set eval\.engine: host$"):
        neuron_engine(params, own_adapter(params))
    assert not SCRATCH.exists()


def test_the_device_is_for_nxd_only(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8"))
    values["eval"]["engine"] = "device"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    with pytest.raises(UserError, match=r"eval\.engine: device is for backend nxd; with backend cpu, write host"):
        load_params(tmp_path / "params.yaml")


def test_the_worker_needs_nothing_but_vllm() -> None:
    """neuron.vllm_python has none of this project's packages; tqdm comes with vLLM."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "trnlora/serving/vllm_worker.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])
    assert imported - sys.stdlib_module_names == {"vllm", "tqdm"}


# How it ends when vLLM does not answer


def fake_python(folder: Path, script: str) -> str:
    """An executable in place of a Python that has vLLM."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'ValueError: no cores left' >&2; exit 1", r"vLLM failed \(base and tuned\): no cores left"),
        ("echo compiling; kill -KILL $$", r"vLLM was killed by SIGKILL \(base and tuned\): compiling"),
        ("exit 0", r"vLLM failed \(base and tuned\): it printed nothing"),
    ],
)
def test_a_failure_is_one_line_with_the_location_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    job = Job(fake_python(tmp_path, script), {}, {}, {"base": None, "tuned": None})
    with pytest.raises(UserError, match=rf"^{message} \(its log: \.scratch/eval_vllm/vllm\.log\)$"):
        run_job(job, [[1]], 4)
    assert LOG.exists()
    assert not (SCRATCH / "answers.json").exists()


def test_the_worker_runs_with_its_own_bin_first_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libneuronpjrt-path and neuronx-cc are looked up on PATH; PYTHONPATH leads to the worker's module."""
    monkeypatch.chdir(tmp_path)
    python = fake_python(tmp_path, 'echo "ValueError: $PATH $PYTHONPATH $EXTRA" >&2; exit 1')
    with pytest.raises(UserError, match=rf"failed \(\): {tmp_path}:\S+ {ROOT} of the job \(its log"):
        run_job(Job(python, {}, {"EXTRA": "of the job"}, {}), [[1]], 4)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_stage_ends_the_worker(tmp_path: Path, sent: signal.Signals) -> None:
    python = fake_python(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from trnlora.errors import run\n"
        "from trnlora.serving.device_engine import Job, run_job\n"
        f"run(lambda: run_job(Job({python!r}, {{}}, {{}}, {{}}), [[1]], 4))"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text("utf-8").strip():
        assert stage.poll() is None
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text("utf-8"))
    stage.send_signal(sent)
    assert stage.wait(60) == 130
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(worker).wait(10)  # killed, it is there until its new parent has taken note


# The worker with the CPU build of vLLM


def cpu_job(params: Params, models: dict[str, Path | None], **engine: Any) -> Job:
    """The host engine's arguments for a worker that this project's own Python runs."""
    adapter = own_adapter(params)
    room = [Adapter(name, folder, adapter.r, adapter.modules) for name, folder in models.items() if folder]
    return Job(sys.executable, engine_args(params, room) | engine, environment(params), models)


@pytest.mark.slow
def test_the_answers_are_those_of_the_host_engine(
    project: Path, eval_worker: EvalWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    """Base as an adapter of zeros and without adapter, and the adapter, in one engine of the worker."""
    host = eval_worker.evaluate(project)
    assert host.returncode == 0, host.stderr
    outputs = (paths.ANSWERS, Path("metrics/eval_vllm.json"), Path("plots/exact_match_by_category.json"))
    answers, metrics, plot = (path.read_text("utf-8") for path in outputs)
    for path in outputs:
        path.unlink()

    params = load_params()
    write_zero_adapter(paths.ADAPTER, project / "zero")
    models = {"base": project / "zero", "tuned": paths.ADAPTER.absolute(), "without adapter": None}
    capfd.readouterr()
    evaluate(params, DeviceEngine([cpu_job(params, models)]))

    assert paths.ANSWERS.read_text("utf-8") == answers
    assert outputs[2].read_text("utf-8") == plot
    expected = json.loads(metrics)
    for name in ("loss_gap_trainer", "loss_gap_peft"):
        del expected[name]
    for name in ("base", "tuned"):
        del expected[name]["loss"]
    assert json.loads(outputs[1].read_text("utf-8")) == expected | {"loss_gap_trainer_peft": 0.0}
    of_worker = json.loads((SCRATCH / "answers.json").read_text("utf-8"))["models"]
    of_zeros, of_none = of_worker["base"], of_worker["without adapter"]
    assert [of_zeros[key] for key in ("texts", "tokens")] == [of_none[key] for key in ("texts", "tokens")]
    assert of_zeros["texts"] != of_worker["tuned"]["texts"]

    shown = capfd.readouterr().out
    assert f"for base and tuned and without adapter … (its log: {LOG})" in shown
    assert "vLLM engine started in" in shown
    assert "tuned: 10 answers, " in shown
    assert json.loads(Path("metrics/timing/eval_vllm.json").read_text("utf-8"))["tuned"]["output_tokens_per_s"] > 0


@pytest.mark.slow
def test_what_vllm_refuses_is_one_line(project: Path) -> None:
    params = load_params()
    engine = DeviceEngine([cpu_job(params, {"tuned": paths.ADAPTER.absolute()}, kv_cache_memory_bytes=99999 << 30)])
    with pytest.raises(UserError, match=r"^vLLM failed \(tuned\): Available memory .* \(its log: \S+\)$"):
        evaluate(params, engine)
    assert not paths.ANSWERS.exists()
    assert not device_engine.SCRATCH.joinpath("answers.json").exists()
