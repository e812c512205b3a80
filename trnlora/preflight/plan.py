"""The size of a run by arithmetic alone: ranks and shards, bytes per core, steps and tokens, collectives.

From the params and the model's config, so that any run can be planned on any machine. docs/scale.md has the formulas
in words.
"""

import dataclasses
import math

from trnlora.model.config import KEPT_TOKENS, LOSS_CHUNK, ModelConfig
from trnlora.model.targets import (
    adapter_tensors,
    fused_layers,
    peft_modules,
    trainable_parameters,
    trainable_parameters_per_rank,
)
from trnlora.model.tensors import hf_shapes
from trnlora.params import Params
from trnlora.preflight.collectives import DTYPE_BYTES, Collective, micro_batch_collectives, step_collectives
from trnlora.weights.nxd_layout import shard_shapes

MIB = 2**20
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes are in bytes. Steps are None as long as the number of packed rows is unknown."""

    ranks: int
    shards: int
    parameters: int  # of the model
    shard_bytes: int  # base weights on one core
    adapter_bytes: int  # float32 adapter, its gradient and AdamW's two moments, on one core
    trainable_per_rank: int
    trainable: int  # of the whole adapter, copies on several ranks counted once
    steps_per_epoch: int | None
    steps: int | None
    tokens_per_step: int  # padding included
    activation_bytes: int  # kept for the backward pass of one micro-batch, on one core
    logit_bytes: int  # float32 logits and their softmax, on one core
    collectives: list[Collective]  # of one core, per step
    flops_per_step: float  # of all cores

    @property
    def core_bytes(self) -> int:
        """Memory of one core: weights, adapter, activations, logits."""
        return self.shard_bytes + self.adapter_bytes + self.activation_bytes + self.logit_bytes

    @property
    def tp_bytes_per_step(self) -> int:
        """Bytes that one core passes to collectives within its replica."""
        return sum(collective.volume for collective in self.collectives if collective.group != "dp")

    @property
    def dp_bytes_per_step(self) -> int:
        """Bytes that one core passes to collectives between replicas."""
        return sum(collective.volume for collective in self.collectives if collective.group == "dp")


def make_plan(params: Params, config: ModelConfig, packed_rows: int | None) -> Plan:
    """The plan of `params` for a model. packed_rows: training rows of seq_len tokens after packing, if known."""
    convert, lora, train = params.convert, params.lora, params.train
    shapes = hf_shapes(config)
    shard = sum(math.prod(shape) for shape in shard_shapes(config, convert, 0).values())
    adapter = adapter_tensors(config, lora)
    per_rank = trainable_parameters_per_rank(adapter, convert.tp_size, convert.kv_size_multiplier)
    steps_per_epoch = steps = None
    if packed_rows is not None:
        steps_per_epoch = math.ceil(packed_rows / train.global_batch_size)
        steps = min(steps_per_epoch * train.epochs, train.max_steps or math.inf)
    tokens = train.micro_batch_size * params.data.seq_len
    micro_batches = train.global_batch_size // (train.micro_batch_size * train.dp_size)  # per replica
    per_step = [
        dataclasses.replace(collective, count=collective.count * micro_batches)
        for collective in micro_batch_collectives(params, config)
    ]
    logit_rows = tokens if params.backend == "nxd" else min(LOSS_CHUNK, tokens)
    return Plan(
        ranks=train.dp_size * convert.tp_size,
        shards=convert.tp_size,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        shard_bytes=shard * DTYPE_BYTES[params.model.dtype],
        adapter_bytes=per_rank * 4 * 4,
        trainable_per_rank=per_rank,
        trainable=trainable_parameters(adapter),
        steps_per_epoch=steps_per_epoch,
        steps=None if steps is None else int(steps),
        tokens_per_step=train.global_batch_size * params.data.seq_len,
        activation_bytes=_activation_bytes(params, config, tokens),
        logit_bytes=logit_rows * config.vocab_size // convert.tp_size * 4 * 2,
        collectives=per_step + step_collectives(params, config),
        flops_per_step=train.global_batch_size * sum(row_flops(params, config)),
    )


def row_flops(params: Params, config: ModelConfig) -> tuple[float, float]:
    """FLOPs of the matrix products for one row of seq_len tokens, of all cores: with weights, and of attention.

    Forward, and backward to the activations (frozen weights have no gradients): 2 each per weight and token. The
    embedding is a look-up, and LoRA's products are left out: about 1 %. On Trainium attention multiplies all
    seq_len × seq_len scores; the other backends compute those within documents, which are not counted.
    """
    tokens, train = params.data.seq_len, params.train
    head = config.vocab_size * config.hidden_size
    layers = sum(math.prod(shape) for shape in hf_shapes(config).values()) - head * (2 - config.tie_word_embeddings)
    weights = 2.0 * tokens * (layers * (2 + train.activation_checkpointing) + head * 2)
    if not params.on_trainium:
        return weights, 0.0
    again = train.activation_checkpointing or (params.backend == "nxd" and params.neuron.selective_checkpointing)
    # Scores and weighted values; the gradient of each of the two has two products.
    return weights, 4.0 * tokens**2 * config.q_size * config.num_hidden_layers * (3 + again)


def _activation_bytes(params: Params, config: ModelConfig, tokens: int) -> int:
    """Bytes that autograd keeps for `tokens` tokens on one core, and for neuron what attention needs besides."""
    dtype = DTYPE_BYTES[params.model.dtype]
    score = working = 0
    if params.backend == "neuron":
        score = 4 + (dtype if dtype != 4 else 0)  # the softmax in float32, and in the model's dtype
        # In one layer at a time, the scores and their gradient, in float32.
        working = 8 * config.num_attention_heads * tokens * params.data.seq_len // params.convert.tp_size
    elif params.backend == "nxd" and not params.neuron.selective_checkpointing:
        score = 8 + dtype  # scores and softmax in float32, and the softmax in the model's dtype
    layer, residual = layer_bytes(params, config, tokens, score)
    if params.train.activation_checkpointing:
        return round((config.num_hidden_layers + 1) * residual + layer) + working  # one layer is recomputed at a time
    return round(config.num_hidden_layers * layer + residual) + working  # the last norm's input


def layer_bytes(params: Params, config: ModelConfig, tokens: int, score: int) -> tuple[float, float]:
    """Bytes that one layer keeps of `tokens` tokens on one core, and those of a residual, which is its input.

    As in trnlora/model: decoder.py, fused_ops.py, lora.py. Of the linear layers' inputs only those of lora_A and lora_B
    are kept: the other weights are frozen. For `neuron`, attention is a masked product, and that its compiler computes
    element-wise results again in the backward pass, as fused_ops does, is an assumption (PyTorch's partitioner does).
    score: on Trainium, bytes for each of attention's seq_len × seq_len scores.
    """
    tp, dtype = params.convert.tp_size, DTYPE_BYTES[params.model.dtype]
    # With sequence parallelism, everything outside attention and MLP is sharded along the tokens.
    outside = tokens / tp if params.backend == "nxd" and params.neuron.sequence_parallel else tokens
    residual = outside * config.hidden_size * dtype
    q = config.q_size / tp
    kv = config.kv_size * params.convert.kv_size_multiplier / tp
    attention = tokens * (q + 2 * kv) * dtype
    if config.family.qk_norm:
        attention += tokens * (q + kv) * dtype  # the norms' inputs
    if not params.on_trainium:
        attention += tokens * q * dtype  # the fused kernel's output
    attention += config.num_attention_heads / tp * tokens * params.data.seq_len * score
    modules = peft_modules(params.lora.target_modules)
    # The inputs of lora_A: whole where a layer is cut by rows, a rank's part where it is cut by columns.
    inputs = {
        "qkv_proj": outside * config.hidden_size,
        "o_proj": tokens * q,
        "gate_up_proj": outside * config.hidden_size,
        "down_proj": tokens * config.intermediate_size / tp,
    }
    kept_as_made = params.on_trainium or params.lora.lora_dropout or params.train.activation_checkpointing
    if dtype == 4 and tokens > KEPT_TOKENS and not kept_as_made:
        inputs = {"o_proj": inputs["o_proj"]}  # norms and SwiGLU are computed again in the backward pass
    item = 4 + (params.lora.lora_dropout > 0)  # float32, and the dropout's mask
    lora = sum(inputs.get(layer, 0) for layer in fused_layers(modules)) * item
    low = len(fused_layers(modules) if params.lora.share_a else modules) * params.lora.r  # the inputs of lora_B
    lora += tokens * low * 4
    mlp = tokens * 2 * config.intermediate_size / tp * dtype
    return 2 * residual + attention + lora + mlp, residual
