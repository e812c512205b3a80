"""The graphs of a training step that NxD and the real torch_xla make of every Trainium profile, recorded and not run.

They have the profile's own shapes, but two layers. docs/trainium.md says what this needs.
"""

import dataclasses
import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT
from support.hlo import Instruction, function_at, read_hlo
from support.nxd import REHEARSAL, XLA_PYTHON, xla_environment

from trnlora.model.config import ModelConfig
from trnlora.model.targets import fused_layers, peft_modules
from trnlora.params import Params, check_params
from trnlora.preflight.collectives import micro_batch_collectives, step_collectives
from trnlora.preflight.known_models import known_config
from trnlora.profiles import load_profile
from trnlora.weights.nxd_layout import kv_replica_groups

pytestmark = pytest.mark.long

LAYERS = 2
LARGE = 2**18  # values

# Where a large bfloat16 tensor becomes float32, and why.
UPCASTS = {
    "fused_ops.py:_RMSNorm.forward": "a norm's mean is taken in float32, as in HF",
    "fused_ops.py:_RMSNorm.backward": "the same",
    "fused_ops.py:_SwiGLU.forward": "torch_xla computes element-wise products of bfloat16 tensors in float32",
    "fused_ops.py:_SwiGLU.backward": "the same",
    "fused_ops.py:_rotate": "the same",
    "nxd.py:_core_attention": "the softmax is float32, as in HF",
    "graph.py:_engine_run_backward": "the softmax's gradient",
    "nxd.py:NxdBackend.cross_entropy": "the loss is float32",
    "lora.py:_LoraFusedLinear.low": "the adapter is float32",
    "lora.py:LoraRowParallelLinear.forward": "the same",
    "layers.py:ParallelEmbedding._forward_shard_across_vocab": "NxD multiplies by a mask, which is element-wise",
    "layers.py:RowParallelLinear._rpl_maybe_reduce_output": "NxD reduces in float32 (reduce_dtype)",
    "layers_utils.py:_linear_autograd_bwd_no_weight_grad": "the same",
    "layers_utils.py:_linear_autograd_bwd_grad_reduce": "the same",
    "qkv_linear_utils.py:_qkvlinear_autograd_base_setup_bwd": "the same",
    "qkv_linear_utils.py:_qkvlinear_autograd_bwd_no_weight_grad": "the same",
    "qkv_linear_utils.py:_qkvlinear_autograd_bwd_grad_reduce": "the same",
    "": "autograd's gradient of one of these casts, or of one back to bfloat16",
}


@dataclasses.dataclass(frozen=True)
class Trace:
    """The graphs of rank 0 of `params`, with LAYERS layers."""

    params: Params
    config: ModelConfig
    micro_batch: list[Instruction]
    update: list[Instruction]
    host: dict[str, Any]  # see record_graphs.py
    text: str

    def dots(self) -> list[Instruction]:
        return [instruction for instruction in self.micro_batch if instruction.op == "dot"]

    @property
    def dtype(self) -> str:
        return {"bfloat16": "bf16", "float32": "f32"}[self.params.model.dtype]

    def is_lora(self, dot: Instruction) -> bool:
        """Only LoRA's products have a matrix with r rows or columns."""
        return any(self.params.lora.r in array.shape[-2:] for array in dot.operands)

    def replicas(self) -> list[list[int]]:
        """The tensor-parallel ranks of each replica, as the reduction of the embeddings has them."""
        return next(i.groups for i in self.micro_batch if i.op in ("reduce-scatter", "all-reduce") and i.groups)


TRAINIUM = {
    path.stem: load_profile(path.stem, ROOT / "profiles")
    for path in sorted((ROOT / "profiles").glob("*.yaml"))
    if "trn" in path.stem
}
PROFILES = [name for name, params in TRAINIUM.items() if params.backend == "nxd"]
PLAIN = {"neuron": {"sequence_parallel": False, "selective_checkpointing": False}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PROFILES},
    # The models of the native profiles, as the guide trains them.
    **{
        f"{name}-on-nxd": ("llama3-8b-trn2-nxd", {"model": {"source": params.model.source}})
        for name, params in TRAINIUM.items()
        if params.backend == "neuron" and not name.startswith("llama3-8b")
    },
    "not-sequence-parallel": ("llama3-8b-trn2-nxd", PLAIN),
    "qkv-only": ("llama3-8b-trn2-nxd", {"lora": {"target_modules": ["qkv_proj"]}}),
    "q-and-down": ("llama3-8b-trn2-nxd", {"lora": {"target_modules": ["q_proj", "down_proj"]}}),
    "one-replica-tp-16": (
        "llama3-8b-trn2-nxd",
        {"convert": {"tp_size": 16, "kv_size_multiplier": 2}, "train": {"dp_size": 1, "micro_batch_size": 2}},
    ),
}


def with_changes(profile: str, changes: dict[str, Any]) -> Params:
    values = load_profile(profile, ROOT / "profiles").model_dump()
    for section, keys in changes.items():
        values[section] |= keys
    return check_params(values, Path("params.yaml"))


def run_script(name: str, params: Params, *arguments: str) -> None:
    """Run a script of the rehearsal on the real torch_xla, with the hardware that `params` names."""
    debug = {"XLA_IR_DEBUG": "1", "XLA_HLO_DEBUG": "1"}  # HLO with source files and lines
    environment = {**xla_environment(), **debug, "NEURON_PLATFORM_TARGET_OVERRIDE": params.convert.hw_backend}
    command = [str(XLA_PYTHON), str(REHEARSAL / name), *arguments]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trace]:
    """traced(case): the trace of one of CASES."""
    done: dict[str, Trace] = {}

    def trace(case: str) -> Trace:
        if case not in done:
            params = with_changes(*CASES[case])
            folder = tmp_path_factory.mktemp("trace")
            (folder / "params.yaml").write_text(yaml.safe_dump(params.model_dump()), "utf-8")
            run_script("record_graphs.py", params, str(folder / "params.yaml"), str(LAYERS), str(folder))
            known = known_config(params)
            assert known is not None
            done[case] = Trace(
                params,
                dataclasses.replace(known, num_hidden_layers=LAYERS),
                read_hlo(folder / "micro_batch.hlo"),
                read_hlo(folder / "update.hlo"),
                json.loads((folder / "host.json").read_text("utf-8")),
                (folder / "micro_batch.hlo").read_text("utf-8") + (folder / "update.hlo").read_text("utf-8"),
            )
        return done[case]

    return trace


all_cases = pytest.mark.parametrize("case", CASES)


@all_cases
def test_products_are_in_the_models_dtype_but_for_lora(traced: Callable[[str], Trace], case: str) -> None:
    trace = traced(case)
    model = [dot for dot in trace.dots() if not trace.is_lora(dot)]
    lora = [dot for dot in trace.dots() if trace.is_lora(dot)]
    print(f"\n{case}: {len(model)} products in {trace.dtype}, {len(lora)} of LoRA in f32")
    assert {(array.dtype) for dot in model for array in [*dot.results, *dot.operands]} == {trace.dtype}
    assert {(array.dtype) for dot in lora for array in [*dot.results, *dot.operands]} == {"f32"}
    # Forward: q, k, v, scores, weighted values, o, gate_up, down; the LM head. Backward: for each the gradient of its
    # input, of two inputs in attention. The embeddings are frozen: in the first layer, q, k and v pass no gradient on,
    # and get one only where LoRA trains them.
    modules = peft_modules(trace.params.lora.target_modules)
    recomputed = int(trace.params.neuron.selective_checkpointing)  # the scores
    untrained = sum(f"{letter}_proj" not in modules for letter in "qkv")
    assert len(model) == LAYERS * (8 + recomputed + 10) - 3 - untrained + 2
    targets = fused_layers(modules)
    # A and B, forward, the gradients of their inputs and of their weights; q, k and v have three B. Of one that is not
    # trained, only the gradient of its input remains.
    of_lora = sum(12 - 2 * untrained if layer == "qkv_proj" else 6 for layer in targets)
    assert len(lora) == LAYERS * of_lora - ("qkv_proj" in targets)


@all_cases
def test_collectives_are_those_of_the_plan(traced: Callable[[str], Trace], case: str) -> None:
    """Number, dtype, groups and bytes. `make plan` adds up the same list."""
    trace = traced(case)
    for graph, expected in (
        (trace.micro_batch, micro_batch_collectives(trace.params, trace.config)),
        (trace.update, step_collectives(trace.params, trace.config)),
    ):
        found = Counter((i.op, group_of(i, trace), whole_bytes(i)) for i in graph if i.groups)
        wanted: Counter[Any] = Counter()
        for collective in expected:
            wanted[collective.kind, collective.group, collective.bytes] += collective.count
        assert found == wanted
    volume = sum(c.volume for c in micro_batch_collectives(trace.params, trace.config))
    print(f"\n{case}: {volume / 2**20:.1f} MiB of collectives per micro-batch for {LAYERS} layers")


def whole_bytes(collective: Instruction) -> int:
    """Bytes of the whole tensor, without the single number that puts collectives in order."""
    whole = collective.operands if collective.op == "reduce-scatter" else collective.results
    return sum(array.bytes for array in whole if array.shape)


def group_of(collective: Instruction, trace: Trace) -> str:
    """tp, kv or dp: which ranks it combines."""
    replicas, groups = trace.replicas(), collective.groups
    assert groups
    if groups == replicas:
        assert {len(group) for group in replicas} == {trace.params.convert.tp_size}
        return "tp"
    world_size = trace.params.convert.tp_size * trace.params.train.dp_size
    assert sorted(rank for group in groups for rank in group) == list(range(world_size))
    if any(set(groups[0]) <= set(replica) for replica in replicas):
        ranks = next(replica for replica in replicas if 0 in replica)
        kv_groups = kv_replica_groups(trace.config, trace.params.convert)
        assert [ranks[position] for position in kv_groups[0]] in groups
        return "kv"
    places = {rank: place for replica in replicas for place, rank in enumerate(replica)}
    assert all(len({places[rank] for rank in group}) == 1 for group in groups)  # the same part of each replica
    return "dp"


@pytest.mark.parametrize("profile", PROFILES)
def test_every_rank_knows_its_part_and_its_replica(tmp_path: Path, profile: str) -> None:
    """All ranks of a replica train on the same rows, and the ranks whose gradients are summed hold the same shard.

    On 64 ranks of trn2 with tp 32, NxD's replicas are ranks 0…15, 48…63 and 16…47.
    """
    params = with_changes(profile, {})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump()), "utf-8")
    run_script("record_groups.py", params, str(tmp_path / "params.yaml"), str(tmp_path / "ranks.json"))
    ranks = json.loads((tmp_path / "ranks.json").read_text("utf-8"))
    tp_size, dp_size = params.convert.tp_size, params.train.dp_size
    for _, number, replica in ranks:
        assert {ranks[other][1] for other in replica} == {number}
        assert [ranks[other][0] for other in replica] == list(range(tp_size))
    assert {number for _, number, _ in ranks} == set(range(dp_size))


@all_cases
def test_a_large_tensor_becomes_float32_only_for_a_reason(traced: Callable[[str], Trace], case: str) -> None:
    trace = traced(case)
    found = Counter(
        function_at(*i.source) if i.source else ""
        for i in trace.micro_batch
        if i.op == "convert" and i.results[0].dtype == "f32" and i.operands[0].dtype == "bf16"
        if i.results[0].size >= LARGE
    )
    assert set(found) <= set(UPCASTS), sorted(set(found) - set(UPCASTS))
    assert not any(
        array.dtype == "f64" and array.size > 1 for i in trace.micro_batch + trace.update for array in i.results
    )


@all_cases
def test_shapes_are_static_and_nothing_runs_on_the_host(traced: Callable[[str], Trace], case: str) -> None:
    trace = traced(case)
    assert "[<=" not in trace.text
    assert ",<=" not in trace.text
    # In particular, the rotary frequencies are copied once and not in each forward pass.
    assert trace.host == {"fallbacks": [], "transfers": 0}


@all_cases
def test_attention_is_recomputed_behind_a_barrier(traced: Callable[[str], Trace], case: str) -> None:
    """Without the barrier, the compiler would find the same attention computed before and keep it."""
    trace = traced(case)
    barriers = sum(i.op == "opt-barrier" for i in trace.micro_batch)
    assert barriers == (LAYERS if trace.params.neuron.selective_checkpointing else 0)
