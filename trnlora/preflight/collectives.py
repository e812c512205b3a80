"""What a training step sends between ranks: the collectives of each layer, by kind, group and size.

For `nxd` the list is exact: tests/neuron/test_trace.py compares it with the graphs that NxD 0.18 makes on torch_xla.
For `neuron` it is too: tests/test_plan.py counts those of the static form. For the other forms of the torch backend,
whose reductions depend on the rows, it is the largest volume that they can have.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trnlora.model.config import LOSS_CHUNK, ModelConfig
from trnlora.model.targets import adapter_tensors, fused_layers, peft_modules, trainable_parameters_per_rank
from trnlora.model.tensors import Cut
from trnlora.params import Params

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of model.dtype
FLOAT32 = 4


@dataclass(frozen=True)
class Collective:
    """`count` collectives of one kind within a micro-batch, or within an optimizer's step.

    kind: in HLO's terms. group: tensor-parallel ranks, ranks that hold the same KV heads, or data-parallel replicas.
    bytes: of each one's whole tensor: the result of an all-gather, the input of a reduce-scatter, either of an
    all-reduce.
    """

    kind: str  # all-gather | reduce-scatter | all-reduce
    group: str  # tp | kv | dp
    count: int
    bytes: int

    @property
    def volume(self) -> int:
        """Bytes of all of them. A ring sends about as many from each rank, and twice as many for an all-reduce."""
        return self.count * self.bytes


def micro_batch_collectives(params: Params, config: ModelConfig) -> list[Collective]:
    """The collectives of a forward and backward pass of train.micro_batch_size rows on each rank."""
    if params.convert.tp_size == 1:
        return []
    kinds = {"nxd": _nxd, "neuron": _static}
    return list(kinds.get(params.backend, _torch)(params, config))


def step_collectives(params: Params, config: ModelConfig) -> list[Collective]:
    """Those of an optimizer's step after its micro-batches, without single numbers: the adapter's float32 gradients."""
    convert = params.convert
    table = adapter_tensors(config, params.lora)
    found = []
    if convert.tp_size > 1 and (params.backend != "nxd" or params.neuron.sequence_parallel):
        whole = sum(math.prod(tensor.shape) for tensor in table if tensor.cut is Cut.WHOLE)
        found = [Collective("all-reduce", "tp", 1, whole * FLOAT32)]
    if params.train.dp_size > 1:
        per_rank = trainable_parameters_per_rank(table, convert.tp_size, convert.kv_size_multiplier)
        found.append(Collective("all-reduce", "dp", 1, per_rank * FLOAT32))
    return found


def _nxd(params: Params, config: ModelConfig) -> Iterator[Collective]:
    """NxD's layers. They reduce in float32 (`reduce_dtype`) and gather in the model's dtype.

    Source: neuronx-distributed 0.18, parallel_layers (layers.py, layers_utils.py, loss_functions.py) and
    modules/qkv_linear.py.
    """
    layers, tokens = config.num_hidden_layers, params.train.micro_batch_size * params.data.seq_len
    hidden = tokens * config.hidden_size
    model = DTYPE_BYTES[params.model.dtype]
    # A reduction after o and down, and one of the input's gradient before qkv, gate_up and the LM head. The first
    # layer's qkv has none: the embeddings are frozen.
    reductions = 2 * layers + 2 * layers - 1 + 1
    low = tokens * params.lora.r * FLOAT32  # between lora_A and lora_B
    lora_a = [tensor for tensor in adapter_tensors(config, params.lora) if ".lora_A." in tensor.nxd_key]
    whole_a = sum(tensor.cut is Cut.WHOLE for tensor in lora_a)
    if params.neuron.sequence_parallel:
        yield Collective("all-gather", "tp", 4 * layers + 1, hidden * model)
        yield Collective("reduce-scatter", "tp", reductions, hidden * FLOAT32)
        yield Collective("reduce-scatter", "tp", 1, hidden * model)  # the embeddings
        # Where A is whole, B gathers its input, and again in the backward pass for its own gradient.
        yield Collective("all-gather", "tp", len(lora_a) + whole_a, low)
        yield Collective("reduce-scatter", "tp", len(lora_a), low)
    else:
        yield Collective("all-reduce", "tp", reductions, hidden * FLOAT32)
        yield Collective("all-reduce", "tp", 1, hidden * model)
        yield Collective("all-reduce", "tp", len(lora_a), low)
    yield Collective("all-reduce", "tp", 3, tokens * FLOAT32)  # the loss: maxima, sums, the targets' logits
    if params.convert.kv_size_multiplier > 1:
        # The gradients of k and v, of the base layers (without the first) and of LoRA's.
        has_qkv = "qkv_proj" in fused_layers(peft_modules(params.lora.target_modules))
        kv = 2 * tokens * config.kv_size * params.convert.kv_size_multiplier // params.convert.tp_size
        yield Collective("all-reduce", "kv", layers - 1 + layers * has_qkv, kv * FLOAT32)


def _torch(params: Params, config: ModelConfig) -> Iterator[Collective]:
    """All-reduces of hidden states after the embedding, attention and MLP, of gradients before them and the loss."""
    hidden = params.train.micro_batch_size * params.data.seq_len * config.hidden_size
    bytes_each = hidden * DTYPE_BYTES[params.model.dtype]
    yield Collective("all-reduce", "tp", 4 * config.num_hidden_layers + 2, bytes_each)


def _static(params: Params, config: ModelConfig) -> Iterator[Collective]:
    """The static form of the torch backend: the same, the loss in chunks of one size, and LoRA's copies of k and v.

    With train.activation_checkpointing, each layer's graph runs again, with the reductions after attention and MLP.
    """
    layers, tokens = config.num_hidden_layers, params.train.micro_batch_size * params.data.seq_len
    model = DTYPE_BYTES[params.model.dtype]
    repeated = 2 * layers if params.train.activation_checkpointing else 0
    yield Collective("all-reduce", "tp", 4 * layers + 1 + repeated, tokens * config.hidden_size * model)
    chunks = math.ceil(tokens / LOSS_CHUNK)
    yield Collective("all-reduce", "tp", chunks, LOSS_CHUNK * FLOAT32)  # maxima
    yield Collective("all-reduce", "tp", chunks, 2 * LOSS_CHUNK * FLOAT32)  # sums and the targets' logits
    yield Collective("all-reduce", "tp", chunks, LOSS_CHUNK * config.hidden_size * model)  # the input's gradient
    copies = params.convert.kv_size_multiplier
    trained = len({"k_proj", "v_proj"} & set(peft_modules(params.lora.target_modules)))
    if copies > 1 and trained:
        rows = config.kv_size * copies // params.convert.tp_size
        yield Collective("all-reduce", "kv", trained * layers, rows * params.lora.r * FLOAT32)
