"""What a run will be, by arithmetic alone: ranks and shards, bytes a core, trainable parameters, steps and tokens.

Pure arithmetic over the params and a model's config, so that a target can be planned on any machine.
"""

import dataclasses
import math

from trnlora.architecture import LlamaConfig
from trnlora.layout import hf_shapes, shard_pieces
from trnlora.lora import trainable_parameters
from trnlora.params import Params
from trnlora.sources import parse_source

# Of the JSONL file; what is not text in it is about 90 bytes a row.
HUB_DATA_BYTES = {"databricks/databricks-dolly-15k": 13_085_339}
BYTES_PER_TOKEN = 4.0  # of English JSONL, rendered with a template: an estimate

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30


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
    shard = 0
    for pieces in shard_pieces(config, convert, 0).values():
        shape = list(shapes[pieces[0].hf_key])
        if pieces[0].dim is not None:
            shape[pieces[0].dim] = sum(piece.stop - piece.start for piece in pieces)
        shard += math.prod(shape)
    per_rank = trainable_parameters(config, convert.kv_size_multiplier, convert.tp_size, lora)
    rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    steps_per_epoch = steps = None
    if packed_rows is not None:
        steps_per_epoch = math.ceil(packed_rows / train.global_batch_size)
        steps = min(steps_per_epoch * train.epochs, train.max_steps or math.inf)
    return Plan(
        ranks=train.dp_size * convert.tp_size,
        shards=convert.tp_size,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        shard_bytes=shard * DTYPE_BYTES[params.model.dtype],
        adapter_bytes=per_rank * 4 * 4,
        trainable_per_rank=per_rank,
        trainable=config.num_hidden_layers * lora.r * (config.hidden_size + rows),
        steps_per_epoch=steps_per_epoch,
        steps=None if steps is None else int(steps),
        tokens_per_step=train.global_batch_size * params.data.seq_len,
    )
