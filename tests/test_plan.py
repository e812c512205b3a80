"""The plan of a run and the Trainium profiles, offline."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.project import Project

from trnlora.backends.nxd_environment import training_environment
from trnlora.files import read_json
from trnlora.model.config import LlamaConfig
from trnlora.preflight.plan import LOSS_CHUNK, make_plan
from trnlora.profiles import load_profile, profile_names
from trnlora.weights.nxd_layout import check_divisible, kv_replica_groups

ROOT = Path(__file__).parents[1]
PROFILES = [name for name in profile_names(ROOT / "profiles") if "trn" in name]


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_fit_their_models(profile: str) -> None:
    params = load_profile(profile, ROOT / "profiles")
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
    from trnlora.model.decoder import Llama
    from trnlora.model.lora import add_lora

    params = load_profile("smollm2-135m-cpu", ROOT / "profiles")
    config = LlamaConfig.from_folder(make_llama(tmp_path / "llama"))
    plan = make_plan(params, config, packed_rows=50)
    backend = thread_backends(kv_replica_groups(config, params.convert))[0]
    model = Llama.empty(config, backend, params.convert.kv_size_multiplier)
    assert plan.shard_bytes == sum(p.numel() for p in model.parameters()) * torch.float32.itemsize
    add_lora(model, params.lora)
    assert plan.trainable_per_rank == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (plan.steps_per_epoch, plan.steps) == (50, 100)


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(make_llama, tmp_path: Path, recompute: bool) -> None:  # type: ignore[no-untyped-def]
    """The plan's bytes against the tensors that a forward pass on the torch backend hands to the way back."""
    from trnlora.backends import torch as torch_backend
    from trnlora.model.decoder import Llama
    from trnlora.model.lora import add_lora, init_lora_a

    params = load_profile("smollm2-135m-cpu", ROOT / "profiles")
    params = params.model_copy(
        update={
            "convert": params.convert.model_copy(update={"tp_size": 1}),
            "train": params.train.model_copy(update={"activation_checkpointing": recompute}),
        }
    )
    config = LlamaConfig.from_folder(make_llama(tmp_path / "llama", num_hidden_layers=6))
    (backend,) = torch_backend.thread_backends(kv_replica_groups(config, params.convert))
    model = Llama.empty(config, backend, 1).to_empty(device="cpu")
    add_lora(model, params.lora)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    init_lora_a(model, seed=0)
    model.recompute_layers = recompute
    tokens = params.data.seq_len
    ids = torch.arange(tokens)[None] % config.vocab_size
    assert torch_backend.LOSS_CHUNK == LOSS_CHUNK  # written twice: a plan needs no torch
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = model(ids, torch.arange(tokens)[None], torch.ones_like(ids))
    planned = make_plan(params, config, None).activation_bytes
    if recompute:  # of the one layer that is whole on the way back, nothing is kept on the way there
        planned = (6 + 1) * tokens * config.hidden_size * 4
    assert hidden.requires_grad
    assert sum(kept.values()) == pytest.approx(planned, rel=0.05)


def planned(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tools/plan.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_llama3_8b_on_trn2_is_planned_offline() -> None:
    said = planned("--profile", "llama3-8b-trn2", "--nodes", "1", "2", "4")
    assert "8.030 B parameters" in said
    assert "64 = dp 2 × tp 32" in said
    assert "32 of 0.515 GiB" in said
    assert "5,242,880 parameters (0.065%), 2,293,760 on a rank" in said
    assert "estimated from the size of data.source" in said
    assert "65,536 a step" in said
    # By hand. A layer keeps of 4096 tokens: two residuals (4096/32 × 4096 × 2 bytes each), q of one head and k and v of
    # one KV head (3 × 128 × 2), gate and up (2 × 14336/32 × 2), lora_A's input and mask (4096/32 × 4096 × 5), 16 × 4.
    # The last norm keeps one residual more.
    activations = 32 * 4096 * (2 * 128 * 2 + 3 * 128 * 2 + 2 * 448 * 2 + 128 * 5 + 16 * 4) + 128 * 4096 * 2
    assert f"activations {activations / 2**30:.3f} GiB" in said
    # 4 all-reduces a layer, one for the embedding, one for the loss, of 4096 × 4096 × 2 bytes; LoRA's of 4096 × 16 × 4.
    collectives = 8 * ((4 * 32 + 2) * 4096 * 4096 * 2 + 32 * 4096 * 16 * 4)
    assert f"{collectives / 2**30:.2f} GiB inside the replica, 8.8 MiB between replicas" in said
    assert "smallest fit trn2.48xlarge, from tp 2 × kv_size_multiplier 1 on" in said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert rows == [
        ["1", "2", "8", "1.13", "32.56", "8.8", "0.00", "0.184", "138"],
        ["2", "4", "4", "1.13", "16.28", "8.8", "0.73", "0.092", "138"],
        ["4", "8", "2", "1.13", "8.14", "8.8", "1.10", "0.046", "138"],
    ]


def test_llama3_70b_and_1b_are_planned_offline() -> None:
    said = planned("--profile", "llama3-70b-trn2", "--nodes", "4")
    assert "70.554 B parameters" in said
    assert "32 of 4.344 GiB" in said
    assert "bytes a core 6.76 GiB" in said
    assert "smallest fit trn2.48xlarge, from tp 16 × kv_size_multiplier 2 on" in said
    assert "smallest fit trn1.32xlarge" in planned("--profile", "llama3.2-1b-trn1")


def test_a_batch_that_does_not_spread_is_one_line() -> None:
    command = [sys.executable, "tools/plan.py", "--profile", "llama3-8b-trn2", "--nodes", "16"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr == "error: train.global_batch_size 16 does not spread over 32 replicas on 16 nodes\n"


def test_a_new_clone_shows_the_stages_of_the_trn2_run(project: Project) -> None:
    project.run("make", "--old-file=.venv/.ready", "profile", "NAME=llama3-8b-trn2")
    said = project.dvc("repro", "--dry", "--force")
    stages = [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage")]
    assert stages == [
        "fetch_model", "prepare_data", "convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm",
    ]  # fmt: skip


def test_training_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_ROOT_COMM_ID", "10.0.0.1:48620")
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    env = training_environment(load_profile("llama3-8b-trn2", ROOT / "profiles"), ranks_per_node=64)
    assert env["NEURON_CC_FLAGS"] == "--model-type=transformer -O1"
    assert {env[name] for name in ("NEURON_RT_NUM_CORES", "NUM_NEURONCORES", "TPU_NUM_DEVICES")} == {"64"}
    assert env["NEURON_LOGICAL_NC_CONFIG"] == "2"
    assert env["NEURON_RT_ROOT_COMM_ID"] == "10.0.0.1:48620"  # the user's own stays
    assert "XLA_USE_BF16" not in env
    assert "FI_PROVIDER" not in env  # one machine has no need of EFA


def test_training_variables_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURON_RT_ROOT_COMM_ID", raising=False)
    env = training_environment(load_profile("llama3-8b-trn2", ROOT / "profiles"), 32, 2, "trn05")
    assert env["NEURON_RT_NUM_CORES"] == "32"
    assert env["NEURON_RT_ROOT_COMM_ID"] == "trn05:48620"
    assert env["FI_PROVIDER"] == "efa"


def test_precompilation_takes_the_real_runs_options() -> None:
    command = [sys.executable, str(ROOT / "tools/precompile.py"), "--dry-run"]
    said = subprocess.run(
        [*command, "--profile", "llama3-8b-trn2"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    venv = "/opt/aws_neuronx_venv_pytorch_2_9/bin"
    assert f"{venv}/neuron_parallel_compile {venv}/python -u {ROOT}/stages/finetune_lora.py" in said
    assert "NEURON_CC_FLAGS='--model-type=transformer -O1 --retry_failed_compilation'" in said
    assert "NEURON_COMPILE_CACHE_URL=/var/tmp/neuron-compile-cache" in said
    refused = subprocess.run([*command, "--profile", "smollm2-135m-cpu"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "backend cpu compiles nothing" in refused.stderr
