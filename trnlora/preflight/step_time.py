"""A model of an optimizer step's time on Trainium: a roofline of products and memory, collectives, and a floor.

It ranks layouts. As a forecast it is an estimate: docs/scale.md has its errors against published measurements. Two of
its constants are fitted to those, PRODUCT_SHARE and LAYER_FLOOR; the others are AWS's figures.
"""

import dataclasses
import math

from trnlora.model.config import ModelConfig
from trnlora.params import Params
from trnlora.preflight.collectives import DTYPE_BYTES, Collective, micro_batch_collectives, step_collectives
from trnlora.preflight.instances import Instance
from trnlora.preflight.plan import layer_bytes, make_plan, row_flops

# Fitted: the share of the peak that matrix products reach.
PRODUCT_SHARE = 0.82
# Fitted: the seconds that one pass (forward, backward or recomputation) of one layer takes at least, whatever its size,
# on torch_xla: what the host needs to start it, and what of the device's time does not shrink with the work. For native
# PyTorch, which starts a compiled graph per layer, nobody has published it; the same is assumed.
LAYER_FLOOR = 6.0e-3

# Of collectives. Source: aws-neuron-sdk, neuron-runtime/explore/intranode-collective-comm.rst: 1 read and 1 write of
# memory per byte that a ring gathers, 2 reads and 1 write per byte that it reduces; 1 to 2 µs per hop; mesh below 1 MB
# with 1 hop, recursive doubling up to 56 MB with log₂ N, KangaRing above with N/2.
TOUCHES = {"all-gather": 2, "reduce-scatter": 3, "all-reduce": 5}
HOP_SECONDS = 2e-6


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. Products overlap with memory traffic."""

    products: float
    memory: float
    collectives: float
    floor: float

    @property
    def device(self) -> float:
        return max(self.products, self.memory) + self.collectives

    @property
    def total(self) -> float:
        return max(self.device, self.floor)


def step_time(params: Params, config: ModelConfig, instance: Instance, attention_kernel: bool = False) -> StepTime:
    """The modelled time of a step of params.train.global_batch_size rows.

    attention_kernel: scores stay in the chip, and only those that a token may attend to are computed. False: a masked
    product, which nxd computes, and neuron where nkilib's kernels are not used. Left out: LoRA's products, the
    optimizer, loading rows.
    """
    train = params.train
    ranks = train.dp_size * params.convert.tp_size
    cores = instance.logical_cores(params)
    micro_batches = train.global_batch_size // (train.micro_batch_size * train.dp_size)
    weights, attention = row_flops(params, config)
    flops = train.global_batch_size * (weights + attention * (0.5 if attention_kernel else 1.0))
    passes = 3 if train.activation_checkpointing else 2
    tokens = train.micro_batch_size * params.data.seq_len
    # In each pass the weights are read, and what a layer keeps is written and read once; likewise scores, and their
    # softmax in float32 and in the model's dtype.
    score = 0 if attention_kernel else 8 + DTYPE_BYTES[params.model.dtype]
    layer, _ = layer_bytes(params, config, tokens, score)
    moved = passes * (make_plan(params, config, None).shard_bytes + 2 * config.num_hidden_layers * layer)
    per_micro_batch = sum(collective_time(c, params, instance) for c in micro_batch_collectives(params, config))
    per_step = sum(collective_time(c, params, instance) for c in step_collectives(params, config))
    return StepTime(
        products=flops / (PRODUCT_SHARE * instance.flops * ranks / cores),
        memory=micro_batches * moved / (instance.hbm / cores),
        collectives=micro_batches * per_micro_batch + per_step,
        floor=micro_batches * passes * config.num_hidden_layers * LAYER_FLOOR,
    )


def collective_time(collective: Collective, params: Params, instance: Instance) -> float:
    """Seconds of `count` collectives: the slower of memory and links for the volume, and the hops' latency.

    A group of consecutive ranks fills chip after chip. Replicas are on all chips, and the ranks of a chip that belong
    to one of them send at the same time. Replicas on other instances are reached over EFA.
    """
    tp_size, dp_size = params.convert.tp_size, params.train.dp_size
    size = {"tp": tp_size, "dp": dp_size, "kv": params.convert.kv_size_multiplier}[collective.group]
    cores = instance.logical_cores(params)
    on_chip = cores // instance.chips
    part = (size - 1) / size
    memory = TOUCHES[collective.kind] * part * collective.bytes / (instance.hbm / cores)
    rounds = 2 if collective.kind == "all-reduce" else 1
    if collective.group == "dp":
        chips, outside, sharing = instance.chips, part, min(on_chip, tp_size)
    else:
        chips = math.ceil(size / on_chip)
        outside, sharing = (chips - 1) / chips, 1
    links = 0.0
    if chips > 1:
        links = rounds * outside * collective.bytes * sharing / _link_bandwidth(instance, chips)
    seconds = max(memory, links) + rounds * _hops(size, collective.bytes) * HOP_SECONDS
    instances = math.ceil(tp_size * dp_size / cores)
    if collective.group == "dp" and instances > 1:
        assert instance.network, "only instances with EFA train together"
        seconds += network_time(collective.bytes, instances, tp_size, instance.network)
    return collective.count * seconds


def network_time(bytes_each: float, instances: int, tp_size: int, network: float) -> float:
    """Seconds of a ring all-reduce between instances, of `bytes_each` on each rank of a replica. network: bits/s.

    It sends each byte twice (reduce-scatter, all-gather), for every rank of one replica.
    """
    return 2 * (instances - 1) / instances * bytes_each * tp_size * 8 / network


def _link_bandwidth(instance: Instance, chips: int) -> float:
    """Bytes per second and direction with which a chip reaches the others of a group of `chips`.

    In a torus each chip has four links: one leads to the other of a pair, two are on the ring of a larger group, and
    all are used by the two rings of a whole instance (source: intranode-collective-comm.rst). That AWS's figure adds up
    both directions is an assumption.
    """
    usable = 1.0 if instance.switched or chips == instance.chips else 0.25 if chips == 2 else 0.5
    return instance.link * usable / 2


def _hops(ranks: int, size: int) -> float:
    if size < 2**20:
        return 1
    return math.log2(ranks) if size <= 56 * 2**20 else ranks / 2
