"""All layouts of a run on its instance, ranked by the modelled step time."""

import dataclasses
from collections.abc import Iterator

from pydantic import ValidationError

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Params
from trnlora.preflight.instances import USABLE, Instance, core_memory, instance_of
from trnlora.preflight.plan import Plan, make_plan
from trnlora.preflight.step_time import StepTime, step_time
from trnlora.weights.nxd_layout import check_divisible


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to put the run on the instance."""

    params: Params
    plan: Plan
    time: StepTime

    @property
    def key(self) -> tuple[int, int, int, int, bool]:
        """dp, tp, kv_size_multiplier, micro-batch, and whether layers (nxd: attention) are recomputed."""
        return layout_key(self.params)


def layout_key(params: Params) -> tuple[int, int, int, int, bool]:
    convert, train = params.convert, params.train
    again = params.neuron.selective_checkpointing if params.backend == "nxd" else train.activation_checkpointing
    return train.dp_size, convert.tp_size, convert.kv_size_multiplier, train.micro_batch_size, again


def search(params: Params, config: ModelConfig) -> list[Layout]:
    """The layouts that the params' rules, the instance's rank counts and its memory allow, fastest first.

    The model, rows, global batch and LoRA stay those of `params`. Raises UserError without an instance, or if no layout
    fits it.
    """
    instance = instance_of(params)
    if instance is None:
        raise UserError(f"the search for a layout needs a profile for Trainium, not backend {params.backend}")
    found = [
        Layout(candidate, plan, step_time(candidate, config, instance))
        for candidate in _candidates(params, config, instance)
        if (plan := make_plan(candidate, config, None)).core_bytes <= USABLE * core_memory(instance, candidate)
    ]
    if not found:
        raise UserError(
            f"no layout fits {instance.name}: shorten data.seq_len, or name a larger machine in neuron.instance"
        )
    return sorted(found, key=lambda layout: (layout.time.total, layout.time.device, layout.plan.core_bytes))


def _candidates(params: Params, config: ModelConfig, instance: Instance) -> Iterator[Params]:
    rows = params.train.global_batch_size
    for ranks in instance.ranks(params):
        for tp_size in (n for n in range(1, ranks + 1) if ranks % n == 0):
            for multiplier in _multipliers(params, config, tp_size):
                for micro_batch in (n for n in range(1, rows + 1) if rows % n == 0):
                    for again in (False, True):
                        values = params.model_dump()
                        values["convert"] |= {"tp_size": tp_size, "kv_size_multiplier": multiplier}
                        values["train"] |= {"dp_size": ranks // tp_size, "micro_batch_size": micro_batch}
                        if params.backend == "nxd":
                            values["neuron"]["selective_checkpointing"] = again
                        else:
                            values["train"]["activation_checkpointing"] = again
                        try:
                            yield Params.model_validate(values)
                        except ValidationError:  # a rule between keys does not allow it
                            continue


def _multipliers(params: Params, config: ModelConfig, tp_size: int) -> list[int]:
    """The fewest copies of KV heads that cut the model for tp_size, and as many as `params` have, if they do too."""
    fitting = []
    for multiplier in range(1, tp_size + 1):
        convert = params.convert.model_copy(update={"tp_size": tp_size, "kv_size_multiplier": multiplier})
        try:
            check_divisible(config, convert)
        except UserError:
            continue
        fitting.append(multiplier)
    own = params.convert.kv_size_multiplier if tp_size == params.convert.tp_size else None
    return [multiplier for n, multiplier in enumerate(fitting) if n == 0 or multiplier == own]
