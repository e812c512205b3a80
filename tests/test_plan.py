"""The plan of a run, and the Trainium profiles, offline."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import write_model
from support.project import Project

from trnlora.backends.nxd_environment import training_environment
from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Params, instance_name, load_params
from trnlora.preflight.collectives import micro_batch_collectives
from trnlora.preflight.instances import USABLE, core_memory, instance_of, on_nodes, smallest_fit
from trnlora.preflight.plan import make_plan
from trnlora.profiles import load_profile
from trnlora.readers import read_json
from trnlora.weights.nxd_layout import check_divisible, kv_replica_groups

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.stem for path in ROOT.glob("profiles/*trn*.yaml"))


def profile(name: str) -> tuple[Params, ModelConfig]:
    """A profile's params and the config of its model."""
    params = load_profile(name, ROOT / "profiles")
    model = params.model.source.partition("@")[0].rpartition("/")[2]
    return params, ModelConfig.from_hf(read_json(ROOT / "profiles/configs" / f"{model}.json"))


def chosen(name: str) -> tuple[str, ...]:
    """The arguments with which a tool selects a profile."""
    return "--profile", name


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_fit_their_models(name: str) -> None:
    params, config = profile(name)
    check_divisible(config, params.convert)
    groups = kv_replica_groups(config, params.convert)
    assert sorted(rank for group in groups for rank in group) == list(range(params.convert.tp_size))
    cores = {"trn2.48xlarge": 64, "trn2.3xlarge": 4, "trn1.32xlarge": 32}[instance_name(params)]  # trn2's in pairs
    assert params.train.dp_size * params.convert.tp_size == cores
    instance = instance_of(params)
    assert instance is not None
    assert make_plan(params, config, None).core_bytes <= USABLE * core_memory(instance, params)


def test_shards_and_adapter_have_the_planned_sizes(make_llama, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """For the default profile, compared with a model built in torch."""
    from trnlora.backends.torch import thread_backends
    from trnlora.model.decoder import DecoderLM
    from trnlora.model.lora import add_lora

    params = load_params(ROOT / "params.yaml")
    config = ModelConfig.from_folder(make_llama(tmp_path / "llama"))
    plan = make_plan(params, config, packed_rows=50)
    backend = thread_backends(kv_replica_groups(config, params.convert))[0]
    model = DecoderLM.empty(config, backend, params.convert.kv_size_multiplier)
    assert plan.shard_bytes == sum(p.numel() for p in model.parameters()) * torch.float32.itemsize
    add_lora(model, params.lora)
    assert plan.trainable_per_rank == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (plan.steps_per_epoch, plan.steps) == (50, 100)


LORAS = [
    {"target_modules": ["qkv_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "share_a": False, "lora_dropout": 0.0},
    {"target_modules": ["v_proj", "o_proj", "up_proj"]},
]


FAMILIES_AND_LORAS = [*(("llama", lora) for lora in LORAS), ("qwen3", LORAS[1])]


@pytest.mark.parametrize(
    ("family", "lora", "backend_name", "recompute", "tokens"),
    [
        *(
            (*each, "cpu", recompute, tokens)
            for each in FAMILIES_AND_LORAS
            for recompute, tokens in ((False, 512), (False, 1024), (True, 512))
        ),
        *(
            pytest.param(*FAMILIES_AND_LORAS[n], "neuron", recompute, 512, marks=pytest.mark.slow)
            for n, recompute in ((2, False), (4, False), (1, True))
        ),
    ],
)
def test_activations_are_those_autograd_keeps(
    tmp_path: Path,
    family: str,
    lora: dict[str, Any],
    backend_name: str,
    recompute: bool,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The planned bytes, compared with the tensors that a forward pass on the torch backend saves for backward.

    neuron: in its static form, compiled by PyTorch's front end, which decides what a graph keeps.
    """
    from trnlora.backends import torch as torch_backend
    from trnlora.backends.torch_static import StaticTorchBackend, compile_model
    from trnlora.model.decoder import DecoderLM
    from trnlora.model.lora import add_lora

    params = load_params(ROOT / "params.yaml")
    params = params.model_copy(
        update={
            "backend": backend_name,
            "convert": params.convert.model_copy(update={"tp_size": 1}),
            "lora": params.lora.model_copy(update=lora),
            "train": params.train.model_copy(update={"activation_checkpointing": recompute}),
            "data": params.data.model_copy(update={"seq_len": tokens}),
        }
    )
    config = ModelConfig.from_folder(write_model(tmp_path / "model", family, num_hidden_layers=6, head_dim=32))

    def static(tp_group: torch_backend.Group, kv_group: torch_backend.Group) -> StaticTorchBackend:
        return StaticTorchBackend(tp_group, kv_group, compiler="aot_eager_decomp_partition")

    make = static if backend_name == "neuron" else torch_backend.TorchBackend
    (backend,) = torch_backend.thread_backends(kv_replica_groups(config, params.convert), make)
    model = DecoderLM.empty(config, backend, 1).to_empty(device="cpu")
    add_lora(model, params.lora)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.recompute_layers = recompute
    if backend_name == "neuron":
        compile_model(model)
    ids = torch.arange(tokens)[None] % config.vocab_size
    documents = 1 + (torch.arange(tokens)[None] > tokens // 3)
    batch = (tensor.to(torch.int32) for tensor in (ids, torch.arange(tokens)[None], documents))
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks
    # The model's own hooks hide those around them.
    monkeypatch.setattr(
        torch.autograd.graph, "saved_tensors_hooks", lambda pack, unpack: hooks(lambda x: keep(pack(x)), unpack)
    )
    with hooks(keep, lambda x: x):
        hidden = model(*batch)
    planned = make_plan(params, config, None).activation_bytes
    if backend_name == "neuron":  # subtract what is needed while one layer is computed
        planned -= 8 * config.num_attention_heads * tokens**2
    if recompute:  # subtract the layer that the backward pass recomputes
        planned = (6 + 1) * tokens * config.hidden_size * 4
    assert hidden.requires_grad
    assert sum(kept.values()) == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize(
    ("lora", "cut"), [(LORAS[1], (2, 1)), (LORAS[0], (2, 1)), (LORAS[3], (4, 2)), (LORAS[1], (4, 2))]
)
def test_collectives_of_the_static_form_are_those_of_the_plan(
    tmp_path: Path, lora: dict[str, Any], cut: tuple[int, int], micro_batch: int
) -> None:
    """Kind, group and bytes of what rank 0 reduces in one micro-batch, on ranks that are threads."""
    from trnlora.backends.torch import Group, run_as_threads, thread_backends
    from trnlora.backends.torch_static import StaticTorchBackend, compile_model
    from trnlora.model.decoder import DecoderLM
    from trnlora.model.lora import add_lora

    tp_size, multiplier = cut
    params, _ = profile("llama3-8b-trn2")
    convert = params.convert.model_copy(update={"tp_size": tp_size, "kv_size_multiplier": multiplier})
    params = params.model_copy(
        update={
            "convert": convert,
            "model": params.model.model_copy(update={"dtype": "float32"}),
            "data": params.data.model_copy(update={"seq_len": 300}),  # not a multiple of the loss's chunks
            "lora": params.lora.model_copy(update={**lora, "lora_dropout": 0.0}),
            "train": params.train.model_copy(
                update={"activation_checkpointing": False, "micro_batch_size": micro_batch}
            ),
        }
    )
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    config = ModelConfig.from_folder(write_model(tmp_path / "model", "llama", **sizes))

    def static(tp_group: Group, kv_group: Group) -> StaticTorchBackend:
        return StaticTorchBackend(tp_group, kv_group, compiler=None)

    backends = thread_backends(kv_replica_groups(config, convert), static)
    found: Counter[tuple[str, int]] = Counter()
    for name in ("tp", "kv"):
        group = getattr(backends[0], f"{name}_group")
        reduce = group.all_reduce

        def count(x: torch.Tensor, op: str = "sum", name: str = name, reduce: Any = reduce) -> torch.Tensor:
            found[name, x.nbytes] += 1
            return reduce(x, op)

        group.all_reduce = count
    ids = torch.ones(micro_batch, params.data.seq_len, dtype=torch.int32)

    def train(backend: Any) -> None:
        model = DecoderLM.empty(config, backend, multiplier).to_empty(device="cpu")
        add_lora(model, params.lora)
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        compile_model(model)
        loss, _ = model.loss(ids, ids, ids, ids)
        loss.backward()

    run_as_threads(backends, train)
    wanted: Counter[tuple[str, int]] = Counter()
    for collective in micro_batch_collectives(params, config):
        assert collective.kind == "all-reduce"
        wanted[collective.group, collective.bytes] += collective.count
    assert found == wanted


def planned(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plan.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def with_targets(params: Params, target_modules: Any) -> Params:
    return params.model_copy(update={"lora": params.lora.model_copy(update={"target_modules": target_modules})})


def test_llama3_8b_on_trn2() -> None:
    """The plan's numbers with LoRA on q, k and v, compared with a calculation by hand."""
    params, config = profile("llama3-8b-trn2-nxd")
    plan = make_plan(with_targets(params, ["qkv_proj"]), config, packed_rows=721)
    assert (plan.ranks, plan.shards) == (64, 32)
    # embedding and lm_head; per layer: q and o, gate, up and down, k and v, two norms; the last norm
    layer = 4096 * (2 * 4096 + 3 * 14336 + 2 * 1024) + 2 * 4096
    assert plan.parameters == 2 * 128256 * 4096 + 32 * layer + 4096
    # The same divided by tp 32, except norms, which are on every rank, and k and v, which are on four ranks each.
    shard = 4096 * (2 * 4096 + 3 * 14336 + 4 * 2 * 1024) // 32 + 2 * 4096
    assert plan.shard_bytes == 2 * (2 * 128256 * 4096 // 32 + 32 * shard + 4096)
    # Every rank has all of A, and B's rows for one query head, one key head and one value head.
    assert plan.trainable_per_rank == 32 * 16 * (4096 + 3 * 128)
    assert plan.trainable == 32 * 16 * (4096 + 4096 + 2 * 1024)
    assert plan.adapter_bytes == 4 * 4 * plan.trainable_per_rank
    assert (plan.steps_per_epoch, plan.steps) == (46, 138)  # ⌈721 / 16⌉, three epochs
    assert plan.tokens_per_step == 16 * 4096
    # Per layer and 4096 tokens: two residuals (4096/32 × 4096 × 2 bytes each), q of one head and k and v of one KV head
    # (3 × 128 × 2), gate and up (2 × 14336/32 × 2), lora_A's input and mask (4096/32 × 4096 × 5), 16 × 4. The last norm
    # keeps one more residual.
    activations = 32 * 4096 * (2 * 128 * 2 + 3 * 128 * 2 + 2 * 448 * 2 + 128 * 5 + 16 * 4) + 128 * 4096 * 2
    assert plan.activation_bytes == activations
    assert plan.logit_bytes == 4096 * 128256 // 32 * 4 * 2
    assert plan.core_bytes == plan.shard_bytes + plan.adapter_bytes + activations + plan.logit_bytes
    # For each of 8 micro-batches: all-gathers of 4096 × 4096 bfloat16 values, 4 per layer and one for the LM head;
    # reduce-scatters of as many in float32, without that of the first qkv, and one in bfloat16 for the embeddings;
    # LoRA's three of 4096 × 16; the loss's three numbers per token; the gradients of k and v, of the base layer and of
    # LoRA, without the first. Then lora_A's gradients.
    hidden, kv = 4096 * 4096, 2 * 4096 * 128
    micro_batch = (4 * 32 + 1) * hidden * 2 + 4 * 32 * hidden * 4 + hidden * 2
    micro_batch += 32 * 3 * 4096 * 16 * 4 + 3 * 4096 * 4 + (2 * 32 - 1) * kv * 4
    assert plan.tp_bytes_per_step == 8 * micro_batch + 32 * 16 * 4096 * 4
    assert plan.dp_bytes_per_step == 4 * plan.trainable_per_rank
    matrices = plan.parameters - 128256 * 4096  # without the embedding; includes the norms, which are negligible
    # Of attention, scores and weighted values: forward, recomputed, and twice in the backward pass.
    attention = 4 * 2 * 2 * 4096 * 4096 * 32
    assert plan.flops_per_step == (4 * matrices + attention) * plan.tokens_per_step


def test_all_linear_llama3_8b_on_trn2() -> None:
    """The adapter's share of the plan, with LoRA on all linear layers, compared with a calculation by hand."""
    params, config = profile("llama3-8b-trn2-nxd")
    plan = make_plan(with_targets(params, ["qkv_proj"]), config, None)
    all_linear = make_plan(with_targets(params, "all-linear"), config, None)
    # A and B of qkv, o, gate and up, down; of cut matrices, a rank's 1/32 (k and v: 1/8).
    per_rank = (4096 + 3 * 128) + (128 + 4096) + (4096 + 2 * 448) + (448 + 4096)
    assert all_linear.trainable_per_rank == 32 * 16 * per_rank
    whole = (4096 + 4096 + 2 * 1024) + (4096 + 4096) + (4096 + 2 * 14336) + (14336 + 4096)
    assert all_linear.trainable == 32 * 16 * whole
    # Per layer and token: the inputs and masks of the three other lora_A (128, 128 and 448 values × 5), three lora_B's.
    more = 32 * 4096 * ((128 + 128 + 448) * 5 + 3 * 16 * 4)
    assert all_linear.activation_bytes == plan.activation_bytes + more
    # The three more layers: 3 + 2 × 2 narrow collectives, and two lora_B and one lora_A that are whole.
    more = 8 * 32 * (3 + 2 * 2) * 4096 * 16 * 4 + 32 * 3 * 16 * 4096 * 4
    assert all_linear.tp_bytes_per_step == plan.tp_bytes_per_step + more
    assert all_linear.dp_bytes_per_step == 4 * all_linear.trainable_per_rank


def test_several_nodes_keep_the_global_batch() -> None:
    params, config = profile("llama3-8b-trn2-nxd")
    one = make_plan(params, config, None)
    for nodes in (1, 2, 4):
        spread = on_nodes(params, nodes)
        plan = make_plan(spread, config, None)
        assert spread.train.dp_size == 2 * nodes  # two replicas of 32 ranks on 64 cores
        assert plan.tokens_per_step == one.tokens_per_step
        assert plan.core_bytes == one.core_bytes
        whole = 32 * 4 * 16 * 4096 * 4  # the gradients of four whole weights per layer, once per step
        # fewer micro-batches per replica
        assert (plan.tp_bytes_per_step - whole) * nodes == one.tp_bytes_per_step - whole
        assert plan.dp_bytes_per_step == one.dp_bytes_per_step
        assert plan.flops_per_step == one.flops_per_step
    with pytest.raises(UserError, match="16 is not a multiple of micro_batch_size × replicas = 1 × 32 on 16 nodes"):
        on_nodes(params, 16)


@pytest.mark.parametrize(
    ("name", "instance", "tp_size", "multiplier"),
    [("llama3-8b-trn2-nxd", "trn2.3xlarge", 4, 1), ("llama3-70b-trn2", "trn2.48xlarge", 16, 2)],
)
def test_smallest_instance(name: str, instance: str, tp_size: int, multiplier: int) -> None:
    """The model fits there, but not with half the tp_size."""
    params, config = profile(name)
    fit = smallest_fit(params, config)
    assert fit is not None
    smallest, sharded, plan = fit
    assert (smallest.name, sharded.convert.tp_size, sharded.convert.kv_size_multiplier) == (
        instance, tp_size, multiplier,
    )  # fmt: skip
    assert plan.core_bytes <= USABLE * core_memory(smallest, sharded)
    half = sharded.convert.model_copy(update={"tp_size": tp_size // 2, "kv_size_multiplier": max(1, multiplier // 2)})
    narrower = make_plan(sharded.model_copy(update={"convert": half}), config, None)
    assert narrower.core_bytes > USABLE * core_memory(smallest, sharded)


def test_trn1_needs_a_kv_head_per_rank() -> None:
    """1B needs 3 GiB at tp 4, but NxD on trn1 needs num_key_value_heads × kv_size_multiplier ranks."""
    params, config = profile("llama3.2-1b-trn1")
    fit = smallest_fit(params, config)
    assert fit is not None
    assert (fit[0].name, fit[1].convert.tp_size, config.num_key_value_heads) == ("trn1.32xlarge", 8, 8)


def test_plan_is_printed_offline() -> None:
    printed = planned(*chosen("llama3-8b-trn2-nxd"), "--nodes", "2").stdout
    assert re.search(r"^model .*: 8\.030 B parameters, bfloat16$", printed, re.M)
    assert re.search(r"^per core +1\.69 GiB: weights 0\.515 GiB, ", printed, re.M)
    assert "138 in total (721 packed rows, estimated from the size of data.source" in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    # DP ms: 35.6 MiB × 32 ranks × 2 × 1/2 over 3.2 Tbit/s. ideal s: FLOPs over 2 × 10.7 PFLOPS.
    assert rows == [["2", "4", "4", "1.69", "49.58", "35.6", "2.99", "0.118", "138"]]
    refused = planned(*chosen("llama3-8b-trn2-nxd"), "--nodes", "16")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: train.global_batch_size 16 is not a multiple of")
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_dvc_plans_all_stages_of_the_trn2_run(project: Project) -> None:
    project.run("make", "--old-file=.venv/.ready", "profile", "NAME=llama3-8b-trn2-nxd")
    printed = project.dvc("repro", "--dry", "--force")
    stages = [line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")]
    assert stages == [
        "check_params", "fetch_model", "prepare_data", "convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm",
    ]  # fmt: skip


def test_training_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_RT_ROOT_COMM_ID", "10.0.0.1:48620")
    monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
    env = training_environment(profile("llama3-8b-trn2-nxd")[0], ranks_per_node=64)
    assert env["NEURON_CC_FLAGS"] == "--model-type=transformer -O1 --retry_failed_compilation"
    assert {env[name] for name in ("NEURON_RT_NUM_CORES", "NUM_NEURONCORES", "TPU_NUM_DEVICES")} == {"64"}
    assert env["NEURON_LOGICAL_NC_CONFIG"] == "2"
    assert env["NEURON_RT_ROOT_COMM_ID"] == "10.0.0.1:48620"  # set by the user
    assert "XLA_USE_BF16" not in env
    assert "FI_PROVIDER" not in env  # one machine needs no EFA


def test_training_variables_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURON_RT_ROOT_COMM_ID", raising=False)
    env = training_environment(profile("llama3-8b-trn2-nxd")[0], 32, 2, "trn05")
    assert env["NEURON_RT_NUM_CORES"] == "32"  # of the 64 ranks
    assert env["NEURON_RT_ROOT_COMM_ID"] == "trn05:48620"
    assert env["FI_PROVIDER"] == "efa"


def test_precompilation_uses_the_options_of_the_real_run() -> None:
    command = [sys.executable, "tools/precompile.py", "--dry-run"]
    printed = subprocess.run(
        [*command, *chosen("llama3-8b-trn2-nxd")], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    venv = "/opt/aws_neuronx_venv_pytorch_2_9/bin"
    tool = rf"{venv}/neuron_parallel_compile --num_parallel [1-9]\d* {venv}/python -u {ROOT}/stages/finetune_lora.py"
    assert re.search(tool, printed)
    assert re.search(f"PATH='?{venv}:", printed)
    assert "NEURON_CC_FLAGS='--model-type=transformer -O1 --retry_failed_compilation'" in printed
    assert "NEURON_COMPILE_CACHE_URL=/var/tmp/neuron-compile-cache" in printed
    refused = subprocess.run([*command, *chosen("smollm2-135m-cpu")], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "backend cpu compiles nothing" in refused.stderr
