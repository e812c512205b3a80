"""The plan of a run as text for the terminal."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Column, Table

from trnlora.model.config import ModelConfig
from trnlora.params import Params
from trnlora.preflight.instances import USABLE, core_memory, instance_of, on_nodes, smallest_fit
from trnlora.preflight.layout_search import Layout, layout_key, search
from trnlora.preflight.packed_rows import packed_rows
from trnlora.preflight.plan import GIB, MIB, Plan, make_plan
from trnlora.preflight.step_time import network_time, step_time

NODE_COLUMNS = (
    "nodes", "replicas", "micro-batches", "GiB per core", "TP GiB", "DP MiB", "DP ms", "ideal s", "steps",
)  # fmt: skip
SEARCH_COLUMNS = (
    "#", "dp", "tp", "kv ×", "micro-batch", "recompute", "GiB per core", "products", "memory", "collectives", "floor",
    "ms per step", "tokens/s", "",
)  # fmt: skip
SHOWN = 12  # layouts of a search, besides those with a name
GUIDE = ("trn2.48xlarge", 2, 32)  # instance, dp, tp of the guide that this project grew from


def describe(params: Params, config: ModelConfig) -> Iterator[str]:
    """The sizes of the run, one line each."""
    rows, origin = packed_rows(params)
    plan = make_plan(params, config, rows)
    convert, train = params.convert, params.train
    yield f"model        {params.model.source}: {plan.parameters / 1e9:.3f} B parameters, {params.model.dtype}"
    yield (
        f"ranks        {plan.ranks} = dp {train.dp_size} × tp {convert.tp_size}, {convert.hw_backend}, "
        f"kv_size_multiplier {convert.kv_size_multiplier}"
    )
    yield f"shards       {plan.shards} of {plan.shard_bytes / GIB:.3f} GiB"
    yield _core_line(plan)
    yield (
        f"trainable    {plan.trainable:,} parameters ({plan.trainable / plan.parameters:.3%}), "
        f"{plan.trainable_per_rank:,} per rank"
    )
    if plan.steps is None:
        yield "steps        known after prepare_data"
    else:
        yield f"steps        {plan.steps_per_epoch} per epoch, {plan.steps} in total ({rows} packed rows, {origin})"
    yield f"tokens       {plan.tokens_per_step:,} per step, padding included"
    yield _collectives_line(plan)
    yield from _instance_lines(params, config)
    yield from _time_lines(params, config, plan)


def _core_line(plan: Plan) -> str:
    adapter = plan.adapter_bytes / 4 / MIB  # values, gradient and AdamW's two moments are equally large
    return (
        f"per core     {plan.core_bytes / GIB:.2f} GiB: weights {plan.shard_bytes / GIB:.3f} GiB, "
        f"activations {plan.activation_bytes / GIB:.3f} GiB, logits {plan.logit_bytes / MIB:.1f} MiB, "
        f"adapter {adapter:.1f} MiB, its gradient {adapter:.1f} MiB, optimizer {2 * adapter:.1f} MiB"
    )


def _collectives_line(plan: Plan) -> str:
    within: dict[str, int] = {}
    for collective in plan.collectives:
        if collective.group != "dp":
            within[collective.kind] = within.get(collective.kind, 0) + collective.volume
    kinds = ", ".join(f"{kind} {volume / GIB:.2f} GiB" for kind, volume in within.items())
    return (
        f"collectives  per step and core: {kinds or 'none'} within a replica, "
        f"{plan.dp_bytes_per_step / MIB:.1f} MiB between replicas"
    )


def _instance_lines(params: Params, config: ModelConfig) -> Iterator[str]:
    """For Trainium: the instance of the profile, and the smallest one that would do."""
    instance = instance_of(params)
    if instance is None:
        return
    memory = core_memory(instance, params) / GIB
    counts = ", ".join(map(str, instance.ranks(params)))
    yield f"instance     {instance.name}: {memory:.0f} GiB per core, {USABLE:.0%} of it assumed usable; {counts} ranks"
    fit = smallest_fit(params, config)
    if fit is None:
        yield "smallest fit none: no instance holds a replica; shorten data.seq_len or checkpoint activations"
        return
    smallest, sharded, plan = fit
    yield (
        f"smallest fit {smallest.name} with tp {sharded.convert.tp_size} × kv_size_multiplier "
        f"{sharded.convert.kv_size_multiplier}: {plan.core_bytes / GIB:.2f} GiB per core"
    )


def _time_lines(params: Params, config: ModelConfig, plan: Plan) -> Iterator[str]:
    """For Trainium: the modelled time of a step, and of all of them."""
    instance = instance_of(params)
    if instance is None:
        return
    time = step_time(params, config, instance)
    whole = "" if plan.steps is None else f", {plan.steps * time.total / 60:.1f} min for all steps"
    yield (
        f"modelled     {time.total * 1000:,.0f} ms per step, {plan.tokens_per_step / time.total:,.0f} tokens/s{whole}: "
        f"products {time.products * 1000:,.0f} ms, memory {time.memory * 1000:,.0f}, "
        f"collectives {time.collectives * 1000:,.0f}, floor {time.floor * 1000:,.0f} (an estimate: docs/scale.md)"
    )


def print_search(params: Params, config: ModelConfig) -> None:
    """Print a table of the fastest layouts on the instance, with the guide's and that of the params.

    Raises UserError if there is no instance for the params, or no layout fits it.
    """
    layouts = search(params, config)
    instance = instance_of(params)
    assert instance is not None, "search refuses params without"
    guide = next((n for n, layout in enumerate(layouts) if (instance.name, *layout.key[:2]) == GUIDE), None)
    own = next((n for n, layout in enumerate(layouts) if layout.key == layout_key(params)), None)
    table = Table(*(Column(name, justify="right") for name in SEARCH_COLUMNS))
    for number, layout in enumerate(layouts):
        names = [name for name, at in (("this profile", own), ("the guide's", guide)) if at == number]
        if number < SHOWN or names:
            table.add_row(*_search_row(number, layout, ", ".join(names)))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    if own is None:
        print(f"The layout of these params does not fit {instance.name}, or its number of ranks is not supported.")
    console.print(
        f"{len(layouts)} layouts fit {instance.name} with backend {params.backend}, "
        f"{params.train.global_batch_size} rows of {params.data.seq_len} tokens per step. Times in ms: the device "
        "takes the longer of\nproducts and memory, and then the collectives; a step takes the longer of device and "
        "floor. An estimate, to rank layouts: docs/scale.md",
        highlight=False,
    )


def _search_row(number: int, layout: Layout, name: str) -> Iterator[str]:
    """The cells of a layout, in the order of SEARCH_COLUMNS."""
    dp_size, tp_size, multiplier, micro_batch, again = layout.key
    time = layout.time
    yield str(number + 1)
    yield from map(str, (dp_size, tp_size, multiplier, micro_batch))
    yield "yes" if again else "no"
    yield f"{layout.plan.core_bytes / GIB:.2f}"
    for seconds in (time.products, time.memory, time.collectives, time.floor, time.total):
        yield f"{seconds * 1000:,.0f}"
    yield f"{layout.plan.tokens_per_step / time.total:,.0f}"
    yield name


def print_nodes(params: Params, config: ModelConfig, counts: list[int]) -> None:
    """Print a table of what changes with the number of nodes. The global batch, and so the losses, stay the same.

    Raises UserError if there is no instance for the params, or if the global batch does not divide by the replicas.
    """
    rows, _ = packed_rows(params)
    table = Table(*(Column(name, justify="right") for name in NODE_COLUMNS))
    for count in counts:
        table.add_row(*_node_row(params, config, count, rows))
    instance = instance_of(params)
    assert instance is not None, "on_nodes refuses params without"
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    console.print(
        "Per step. micro-batches: of each replica. TP, DP: what one core passes to collectives within and between "
        "replicas.\nDP ms: at full network speed. ideal s: at the instance's full "
        f"{instance.flops / 1e15:.2f} bfloat16 PFLOPS. Real steps take longer: see docs/scale.md",
        highlight=False,
    )


def _node_row(params: Params, config: ModelConfig, count: int, rows: int | None) -> Iterator[str]:
    """The cells of `count` nodes, in the order of NODE_COLUMNS."""
    spread = on_nodes(params, count)
    instance = instance_of(spread)
    assert instance is not None, "on_nodes refuses params without"
    plan = make_plan(spread, config, rows)
    # Replicas on the same node exchange theirs over NeuronLink.
    assert instance.network, "on_nodes refuses instances without EFA"
    network = network_time(plan.dp_bytes_per_step, count, params.convert.tp_size, instance.network)
    yield str(count)
    yield str(spread.train.dp_size)
    yield str(params.train.global_batch_size // (params.train.micro_batch_size * spread.train.dp_size))
    yield f"{plan.core_bytes / GIB:.2f}"
    yield f"{plan.tp_bytes_per_step / GIB:.2f}"
    yield f"{plan.dp_bytes_per_step / MIB:.1f}"
    yield f"{network * 1000:.2f}"
    yield f"{plan.flops_per_step / (instance.flops * count):.3f}"
    yield "–" if plan.steps is None else str(plan.steps)
