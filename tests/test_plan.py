"""The plan of a run and the Trainium profiles, offline."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Project

from trnlora.architecture import LlamaConfig
from trnlora.files import read_json
from trnlora.layout import check_divisible, kv_replica_groups
from trnlora.params import load_params
from trnlora.plan import make_plan
from trnlora.trainium import training_environment

ROOT = Path(__file__).parents[1]
PROFILES = sorted(ROOT.glob("profiles/*trn*.yaml"))


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profiles_fit_their_models(profile: Path) -> None:
    params = load_params(profile)
    name = params.model.source.partition("@")[0].rpartition("/")[2]
    config = LlamaConfig.from_hf(read_json(ROOT / "profiles/configs" / f"{name}.json"))
    check_divisible(config, params.convert)
    groups = kv_replica_groups(config, params.convert)
    assert sorted(rank for group in groups for rank in group) == list(range(params.convert.tp_size))
    cores = {"trn2": 64, "trn1": 32}[params.convert.hw_backend]  # of a 48xlarge with joined cores, and of a 32xlarge
    assert params.train.dp_size * params.convert.tp_size == cores


def test_the_plan_of_the_default_profile_is_what_the_run_is(make_llama, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Bytes of a shard and trainable parameters against a model that torch has built."""
    from trnlora.backends.torch import thread_backends
    from trnlora.llama import Llama
    from trnlora.lora import add_lora

    params = load_params(ROOT / "params.yaml")
    config = LlamaConfig.from_folder(make_llama(tmp_path / "llama"))
    plan = make_plan(params, config, packed_rows=50)
    backend = thread_backends(kv_replica_groups(config, params.convert))[0]
    model = Llama.empty(config, backend, params.convert.kv_size_multiplier)
    assert plan.shard_bytes == sum(p.numel() for p in model.parameters()) * torch.float32.itemsize
    add_lora(model, params.lora)
    assert plan.trainable_per_rank == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (plan.steps_per_epoch, plan.steps) == (50, 100)


def test_llama3_8b_on_trn2_is_planned_offline(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/doctor.py"), "--plan", "--params", "profiles/llama3-8b-trn2.yaml"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "8.030 B parameters" in said
    assert "64 = dp 2 × tp 32" in said
    assert "32 of 0.515 GiB" in said
    assert "5,242,880 parameters (0.065%), 2,293,760 on a rank" in said
    assert "estimated from the size of data.source" in said
    assert "65,536 a step" in said


def test_a_new_clone_shows_the_stages_of_the_trn2_run(project: Project) -> None:
    project.run("make", "profile", "NAME=llama3-8b-trn2")
    said = project.dvc("repro", "--dry", "--force")
    stages = [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]
    assert stages == [
        "fetch_model", "prepare_data", "convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm",
    ]  # fmt: skip


def test_training_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_ROOT_COMM_ID", "10.0.0.1:48620")
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    env = training_environment(load_params(ROOT / "profiles/llama3-8b-trn2.yaml"))
    assert env["NEURON_CC_FLAGS"] == "--model-type=transformer -O1"
    assert {env[name] for name in ("NEURON_RT_NUM_CORES", "NUM_NEURONCORES", "TPU_NUM_DEVICES")} == {"64"}
    assert env["NEURON_LOGICAL_NC_CONFIG"] == "2"
    assert env["NEURON_RT_ROOT_COMM_ID"] == "10.0.0.1:48620"  # the user's own stays
    assert "XLA_USE_BF16" not in env


def test_precompilation_takes_the_real_runs_options() -> None:
    command = [sys.executable, str(ROOT / "tools/precompile.py"), "--dry-run", "--params"]
    said = subprocess.run(
        [*command, "profiles/llama3-8b-trn2.yaml"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    venv = "/opt/aws_neuronx_venv_pytorch_2_9/bin"
    assert f"{venv}/neuron_parallel_compile {venv}/python -u {ROOT}/stages/finetune_lora.py" in said
    assert "NEURON_CC_FLAGS='--model-type=transformer -O1 --retry_failed_compilation'" in said
    assert "NEURON_COMPILE_CACHE_URL=/var/tmp/neuron-compile-cache" in said
    refused = subprocess.run([*command, "params.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "backend cpu compiles nothing" in refused.stderr
