"""AWS instances with Neuron devices, and which of them a run fits on."""

import dataclasses

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Params, supported_ranks
from trnlora.preflight.plan import GIB, Plan, make_plan
from trnlora.weights.nxd_layout import check_divisible


@dataclasses.dataclass(frozen=True)
class Instance:
    """An AWS instance type.

    Sources: AWS Neuron documentation, "Amazon EC2 Trn1/Trn1n Architecture" and "Amazon EC2 Trn2 Architecture", and
    "Best practices for training on AWS Neuron" for the memory of a logical core (about 24 GiB with two joined).
    """

    name: str
    hw_backend: str
    cores: int  # physical NeuronCores
    memory: int  # of the devices, bytes
    flops: float  # bfloat16 FLOPs per second
    network: float  # EFA bandwidth, bits per second

    def ranks(self, params: Params) -> tuple[int, ...]:
        """The numbers of ranks that this instance runs, in ascending order.

        Those that AWS supports; where it says nothing, all that divide the number of logical cores.
        """
        cores = self.cores // params.neuron.logical_core_size
        supported = supported_ranks(params) or tuple(n for n in range(1, cores + 1) if cores % n == 0)
        return tuple(count for count in supported if count <= cores)


INSTANCES = (  # smallest first
    Instance("trn1.2xlarge", "trn1", 2, 32 * GIB, 190e12, 25e9),
    Instance("trn1.32xlarge", "trn1", 32, 512 * GIB, 3040e12, 800e9),
    Instance("trn2.48xlarge", "trn2", 128, 1536 * GIB, 10.7e15, 3200e9),
)
# An estimate: the runtime, compiled code and collectives' buffers take the rest of a core's memory.
USABLE = 0.85


def instance_of(params: Params) -> Instance | None:
    """The instance that a profile is for: the largest of its generation. None for a CPU or GPU."""
    if params.backend != "nxd":
        return None
    return max((i for i in INSTANCES if i.hw_backend == params.convert.hw_backend), key=lambda i: i.cores)


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
    for instance in INSTANCES:
        if instance.hw_backend != params.convert.hw_backend:
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
