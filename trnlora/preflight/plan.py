"""What a run will be, by arithmetic alone: ranks and shards, bytes a core, steps and tokens, traffic between ranks.

Pure arithmetic over the params and a model's config, so that a target can be planned on any machine. docs/scale.md has
the formulas in words.
"""

import dataclasses
import math

from trnlora.errors import UserError
from trnlora.model.config import LlamaConfig
from trnlora.model.targets import adapter_tensors, trainable_parameters, trainable_parameters_per_rank
from trnlora.model.tensors import hf_shapes
from trnlora.params import Params
from trnlora.sources import parse_source
from trnlora.weights.nxd_layout import check_divisible, shard_shapes

# Of the JSONL file; what is not text in it is about 90 bytes a row.
HUB_DATA_BYTES = {"databricks/databricks-dolly-15k": 13_085_339}
BYTES_PER_TOKEN = 4.0  # of English JSONL, rendered with a template: an estimate

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30
LOSS_CHUNK = 256  # rows of logits that exist at once, trnlora/backends/torch.py; on Neuron all rows do


@dataclasses.dataclass(frozen=True)
class Instance:
    """Of AWS's: physical NeuronCores and device memory, bfloat16 FLOPs a second, EFA bandwidth in bits a second.

    Sources: AWS Neuron documentation, "Amazon EC2 Trn1/Trn1n Architecture" and "Amazon EC2 Trn2 Architecture", and for
    the memory of a logical core "Best practices for training on AWS Neuron" (about 24 GiB with two joined).
    """

    name: str
    hw_backend: str
    cores: int
    memory: int
    flops: float
    network: float


INSTANCES = (  # smallest first
    Instance("trn1.2xlarge", "trn1", 2, 32 * GIB, 190e12, 25e9),
    Instance("trn1.32xlarge", "trn1", 32, 512 * GIB, 3040e12, 800e9),
    Instance("trn2.48xlarge", "trn2", 128, 1536 * GIB, 10.7e15, 3200e9),
)
USABLE = 0.85  # of a core's memory: the runtime, compiled code and collectives' buffers take the rest; an estimate


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes in bytes. Steps and tokens need the number of packed rows; None where it is not known yet."""

    ranks: int
    shards: int
    parameters: int  # of the model
    shard_bytes: int  # base weights on a core
    adapter_bytes: int  # float32 adapter, its gradient and AdamW's two moments, on a core
    trainable_per_rank: int
    trainable: int  # of the whole adapter: A once, B's rows once each, however often they are copied
    steps_per_epoch: int | None
    steps: int | None
    tokens_per_step: int  # positions, padding included
    activation_bytes: int  # kept for the way back, on a core, by one micro-batch
    logit_bytes: int  # float32 logits and their softmax, on a core
    tp_bytes_per_step: int  # that a core hands to all-reduces inside its replica
    dp_bytes_per_step: int  # that a core hands to all-reduces between replicas
    flops_per_step: float  # of all cores

    @property
    def core_bytes(self) -> int:
        return self.shard_bytes + self.adapter_bytes + self.activation_bytes + self.logit_bytes


def estimated_rows(params: Params) -> int | None:
    """About how many packed rows there will be to train on, from the size of the data file; None where unknown."""
    source = parse_source(params.data.source)
    if source.scheme == "hf":
        size = HUB_DATA_BYTES.get(source.name)
    else:
        size = source.path.stat().st_size if source.path.exists() else None
    if size is None or not params.data.packing or params.data.categories is not None:
        return None
    share = (1 - params.data.test_fraction) * (1 - params.data.validation_fraction)
    return math.ceil(size / BYTES_PER_TOKEN * share / params.data.seq_len)


def make_plan(params: Params, config: LlamaConfig, packed_rows: int | None) -> Plan:
    """The plan of `params` for a model; packed_rows: training rows of seq_len tokens after packing."""
    convert, lora, train = params.convert, params.lora, params.train
    shapes = hf_shapes(config)
    shard = sum(math.prod(shape) for shape in shard_shapes(config, convert, 0).values())
    adapter = adapter_tensors(config, lora.target_modules, lora.r)
    per_rank = trainable_parameters_per_rank(adapter, convert.tp_size, convert.kv_size_multiplier)
    steps_per_epoch = steps = None
    if packed_rows is not None:
        steps_per_epoch = math.ceil(packed_rows / train.global_batch_size)
        steps = min(steps_per_epoch * train.epochs, train.max_steps or math.inf)
    dtype, tokens = DTYPE_BYTES[params.model.dtype], train.micro_batch_size * params.data.seq_len
    micro_batches = train.global_batch_size // (train.micro_batch_size * train.dp_size)  # of a replica
    on_neuron, layers = params.backend == "nxd", config.num_hidden_layers
    # An all-reduce after attention and MLP on the way there, before both on the way back, and LoRA's narrow one; one
    # for the embedding and one for the loss's gradient. With sequence parallelism, each is an all-gather and a
    # reduce-scatter: as much.
    hidden_bytes = tokens * config.hidden_size * dtype
    tp_bytes = (4 * layers + 2) * hidden_bytes + layers * tokens * lora.r * 4
    logit_rows = tokens if on_neuron else min(LOSS_CHUNK, tokens)
    # Forward, and backward to the activations (the weights are frozen, so they have no gradients): 2 FLOPs each a
    # weight and token. Attention scores are left out, and so is the embedding, a look-up, unless it is the head too.
    matrices = sum(math.prod(shape) for shape in shapes.values())
    if not config.tie_word_embeddings:
        matrices -= config.vocab_size * config.hidden_size
    recomputed = 2 if train.activation_checkpointing else 0
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
        tp_bytes_per_step=tp_bytes * micro_batches if convert.tp_size > 1 else 0,
        dp_bytes_per_step=per_rank * 4 if train.dp_size > 1 else 0,
        flops_per_step=(4.0 + recomputed) * matrices * train.global_batch_size * params.data.seq_len,
    )


def _activation_bytes(params: Params, config: LlamaConfig, tokens: int) -> int:
    """What autograd keeps of `tokens` tokens on one core (trnlora/model/decoder.py, fused.py, lora.py).

    Of linear layers the inputs of lora_A and lora_B alone: the other weights are frozen.
    """
    tp, dtype = params.convert.tp_size, DTYPE_BYTES[params.model.dtype]
    on_neuron = params.backend == "nxd"
    # With sequence parallelism, what is outside of attention and MLP is cut along the tokens.
    outside = tokens / tp if on_neuron and params.neuron.sequence_parallel else tokens
    residual = outside * config.hidden_size * dtype
    q = config.q_size / tp
    kv = config.kv_size * params.convert.kv_size_multiplier / tp
    attention = tokens * (q + 2 * kv) * dtype
    if not on_neuron:
        attention += tokens * q * dtype  # the fused kernel's output
    elif not params.neuron.selective_checkpointing:
        # scores and softmax in float32, and the softmax in the model's dtype
        attention += config.num_attention_heads / tp * tokens * params.data.seq_len * (8 + dtype)
    lora = outside * config.hidden_size * (4 + 1) + tokens * params.lora.r * 4  # lora_A's input, its mask, lora_B's
    mlp = tokens * 2 * config.intermediate_size / tp * dtype
    layer = 2 * residual + attention + lora + mlp
    if params.train.activation_checkpointing:
        return round((config.num_hidden_layers + 1) * residual + layer)  # one layer at a time is whole
    return round(config.num_hidden_layers * layer + residual)  # and what the last norm keeps


def instance_of(params: Params) -> Instance | None:
    """The instance that a profile is for: the largest of its generation; None for a CPU or GPU."""
    if params.backend != "nxd":
        return None
    return max((i for i in INSTANCES if i.hw_backend == params.convert.hw_backend), key=lambda i: i.cores)


def core_memory(instance: Instance, params: Params) -> int:
    """Bytes of a logical core."""
    return instance.memory // instance.cores * params.neuron.logical_core_size


def on_nodes(params: Params, nodes: int) -> Params:
    """The same run on so many full instances: as many replicas as their cores hold, and the same global batch.

    Raises UserError where the global batch has too few rows for them.
    """
    instance = instance_of(params)
    if instance is None:
        raise UserError(f"backend {params.backend} has no instance to count: plan a profile of backend nxd")
    cores = instance.cores // params.neuron.logical_core_size
    replicas = nodes * (cores // params.convert.tp_size)
    rows = params.train.global_batch_size
    if rows % (params.train.micro_batch_size * replicas):
        raise UserError(f"train.global_batch_size {rows} does not spread over {replicas} replicas on {nodes} nodes")
    return params.model_copy(update={"train": params.train.model_copy(update={"dp_size": replicas})})


def smallest_fit(params: Params, config: LlamaConfig) -> tuple[Instance, Params, Plan] | None:
    """The smallest instance whose cores hold one replica of this run, with the narrowest cut that fits; None: none.

    The cut is the only thing changed. Sequence parallelism goes where the narrower cut does not divide the sequence.
    """
    for instance in INSTANCES:
        if instance.hw_backend != params.convert.hw_backend:
            continue
        cores = instance.cores // params.neuron.logical_core_size
        for tp_size in (size for size in range(1, cores + 1) if cores % size == 0):
            multiplier = max(1, tp_size // config.num_key_value_heads)
            convert = params.convert.model_copy(update={"tp_size": tp_size, "kv_size_multiplier": multiplier})
            train = params.train.model_copy(update={"dp_size": 1})
            cut = params.model_copy(update={"convert": convert, "train": train})
            try:
                check_divisible(config, convert)
            except UserError:
                continue
            plan = make_plan(cut, config, None)
            if plan.core_bytes <= USABLE * core_memory(instance, cut):
                return instance, cut, plan
    return None
