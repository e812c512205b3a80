"""AWS instances with Neuron devices, and which of them a run fits on."""

import dataclasses

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import LARGEST, InstanceName, Params, instance_name, supported_ranks
from trnlora.preflight.plan import GIB, Plan, make_plan
from trnlora.weights.nxd_layout import check_divisible


@dataclasses.dataclass(frozen=True)
class Instance:
    """A machine of AWS's with Trainium chips.

    Sources: aws-neuron-sdk, about-neuron/arch/neuron-hardware/{trn1,trn2,trn3}-arch.rst and trainium{2,3}.rst, and
    "Best practices for training on AWS Neuron" for the memory of a logical core (about 24 GiB with two joined). They
    do not have trn2.3xlarge: its one chip is trainium2.rst's, and its network is not known. AWS publishes Trn3
    UltraServers of 4 and of 36 such servers.
    """

    name: InstanceName
    chips: int
    cores: int  # physical NeuronCores
    memory: int  # of the devices, bytes
    flops: float  # bfloat16 FLOPs per second
    hbm: float  # bandwidth of the devices' memory, bytes per second
    link: float  # NeuronLink bandwidth of a chip to the others of the instance, bytes per second
    switched: bool  # whether every chip reaches every other with all of it; otherwise they are a 2D torus
    network: float | None  # EFA bandwidth, bits per second

    def ranks(self, params: Params) -> tuple[int, ...]:
        """The numbers of ranks that this instance runs, in ascending order.

        Those that AWS supports; where it says nothing, all that divide the number of logical cores.
        """
        cores = self.logical_cores(params)
        here = params.model_copy(update={"neuron": params.neuron.model_copy(update={"instance": self.name})})
        return supported_ranks(here) or tuple(n for n in range(1, cores + 1) if cores % n == 0)

    def logical_cores(self, params: Params) -> int:
        """Number of logical cores: as many ranks as fill the instance."""
        return self.cores // params.neuron.logical_core_size


INSTANCES = (  # smallest first
    Instance("trn1.2xlarge", 1, 2, 32 * GIB, 190e12, 820 * GIB, 0, False, 25e9),
    Instance("trn1.32xlarge", 16, 32, 512 * GIB, 3040e12, 13120 * GIB, 384e9, False, 800e9),
    Instance("trn2.3xlarge", 1, 8, 96 * GIB, 667e12, 2.9e12, 0, False, None),
    Instance("trn2.48xlarge", 16, 128, 1536 * GIB, 10.7e15, 46.4e12, 1024e9, False, 3200e9),
    # The page's two figures for a Trn3 chip's links differ: 2,048 GiB/s here, and 256 GB/s to the chips of its server.
    Instance(
        "trn3-gen2-server", 4, 32, 576 * GIB, 96.624e15 / 36, 705.6e12 / 36, 2048 * GIB, True, 800e9
    ),
    Instance(
        "trn3-gen1-server", 16, 128, 2304 * GIB, 42.944e15 / 4, 313.6e12 / 4, 2048 * GIB, True, 3200e9
    ),
)  # fmt: skip
# An estimate: the runtime, compiled code and collectives' buffers take the rest of a core's memory.
USABLE = 0.85


def instance_of(params: Params) -> Instance | None:
    """The instance that the params are for. None for a CPU or GPU."""
    if not params.on_trainium:
        return None
    return next(instance for instance in INSTANCES if instance.name == instance_name(params))


def core_memory(instance: Instance, params: Params) -> int:
    """Device memory of one logical core, in bytes."""
    return instance.memory // instance.cores * params.neuron.logical_core_size


def on_nodes(params: Params, nodes: int) -> Params:
    """The same run on `nodes` full instances: as many replicas as their cores hold, the same global batch.

    Raises UserError if the global batch does not divide by them, or the ranks of an instance by tp_size.
    """
    instance = instance_of(params)
    if instance is None:
        raise UserError(f"--nodes needs a profile for Trainium; backend {params.backend} has no instance type")
    if instance.name not in LARGEST.values():
        raise UserError(f"--nodes: only {' and '.join(LARGEST.values())} train together, not {instance.name}")
    full = instance.ranks(params)[-1]
    if full % params.convert.tp_size:
        raise UserError(
            f"convert.tp_size {params.convert.tp_size} does not divide the {full} ranks of a full {instance.name}, and "
            "only full instances train together: set it to one that does"
        )
    replicas = nodes * (full // params.convert.tp_size)
    rows = params.train.global_batch_size
    if rows % (params.train.micro_batch_size * replicas):
        raise UserError(
            f"train.global_batch_size {rows} is not a multiple of micro_batch_size × replicas = "
            f"{params.train.micro_batch_size} × {replicas} on {nodes} nodes"
        )
    return params.model_copy(update={"train": params.train.model_copy(update={"dp_size": replicas})})


def smallest_fit(params: Params, config: ModelConfig) -> tuple[Instance, Params, Plan] | None:
    """The smallest instance that holds one replica of this run, at the smallest tp_size that fits. None if none does.

    Only tp_size and kv_size_multiplier are changed. With them sequence parallelism may no longer divide the sequence.
    """
    generation = instance_name(params)[: len("trn1")]
    for instance in INSTANCES:
        if not instance.name.startswith(generation):
            continue
        for tp_size in instance.ranks(params):  # one replica: as many ranks
            multiplier = max(1, tp_size // config.num_key_value_heads)
            convert = params.convert.model_copy(update={"tp_size": tp_size, "kv_size_multiplier": multiplier})
            train = params.train.model_copy(update={"dp_size": 1})
            sharded = params.model_copy(update={"convert": convert, "train": train})
            try:
                check_divisible(config, convert)
            except UserError:
                continue
            plan = make_plan(sharded, config, None)
            if plan.core_bytes <= USABLE * core_memory(instance, sharded):
                return instance, sharded, plan
    return None
