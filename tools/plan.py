"""What a run will be, before it is paid for: ranks, bytes a core, steps, tokens, traffic, and the instance it needs.

    python tools/plan.py [--params FILE | --profile NAME] [--nodes N …]
    make plan PROFILE=llama3-8b-trn2 NODES="1 2 4"

By arithmetic alone (trnlora/preflight/plan.py; docs/scale.md has it in words), on any machine and offline, in a second.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from doctor import known_config

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.files import read_json
from trnlora.model.config import LlamaConfig
from trnlora.params import Params
from trnlora.preflight.plan import (
    GIB,
    USABLE,
    Plan,
    core_memory,
    estimated_rows,
    instance_of,
    make_plan,
    on_nodes,
    smallest_fit,
)
from trnlora.profiles import add_params_arguments, chosen_params
from trnlora.sources import hub_snapshot, parse_source
from trnlora.weights.nxd_layout import check_divisible

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_params_arguments(parser)
    parser.add_argument("--nodes", type=int, nargs="+", metavar="N", help="the same global batch on so many instances")
    args = parser.parse_args()
    params = chosen_params(args)
    config = model_config(params)
    check_divisible(config, params.convert)
    for line in plan(params, config):
        print(line)
    if args.nodes:
        print_nodes(params, config, args.nodes)


def model_config(params: Params) -> LlamaConfig:
    """The model's, where it is on this machine, or from the hub."""
    source = parse_source(params.model.source)
    config = known_config(params)
    if config is None and source.scheme == "hf":
        config = LlamaConfig.from_hf(read_json(hub_snapshot(source, ["config.json"]) / "config.json"))
    if config is None:
        raise UserError(f"{source.uri} is not here yet: run `dvc repro fetch_model` for its plan")
    return config


def packed_rows(params: Params) -> tuple[int | None, str]:
    """Rows to train on, and how they are known."""
    if is_prepared(params):
        import pyarrow.parquet as pq

        return pq.read_metadata(paths.PREPARED / "train.parquet").num_rows, "as prepared"
    return estimated_rows(params), "estimated from the size of data.source; exact after prepare_data"


def is_prepared(params: Params) -> bool:
    """Whether artifacts/prepared is of these params, as dvc.lock has it."""
    lock = Path("dvc.lock")
    if not (paths.PREPARED / "train.parquet").exists() or not lock.exists():
        return False
    import yaml

    stage = yaml.safe_load(lock.read_text("utf-8")).get("stages", {}).get("prepare_data", {})
    recorded = stage.get("params", {}).get("params.yaml", {})
    return all(recorded.get(f"data.{name}") == value for name, value in params.data.model_dump().items())


def plan(params: Params, config: LlamaConfig) -> Iterator[str]:
    """The sizes of the run, a line each."""
    rows, how = packed_rows(params)
    run_plan = make_plan(params, config, rows)
    convert, train = params.convert, params.train
    source = parse_source(params.model.source)
    yield f"model        {source.uri}: {run_plan.parameters / 1e9:.3f} B parameters, {params.model.dtype}"
    yield (
        f"ranks        {run_plan.ranks} = dp {train.dp_size} × tp {convert.tp_size}, {convert.hw_backend}, "
        f"kv_size_multiplier {convert.kv_size_multiplier}"
    )
    yield f"shards       {run_plan.shards} of {run_plan.shard_bytes / GIB:.3f} GiB"
    yield (
        f"bytes a core {run_plan.core_bytes / GIB:.2f} GiB: weights {run_plan.shard_bytes / GIB:.3f} GiB, "
        f"activations {run_plan.activation_bytes / GIB:.3f} GiB, logits {run_plan.logit_bytes / MIB:.1f} MiB, "
        f"adapter {run_plan.adapter_bytes / 4 / MIB:.1f} MiB, its gradient as much, optimizer twice that"
    )
    yield (
        f"trainable    {run_plan.trainable:,} parameters ({run_plan.trainable / run_plan.parameters:.3%}), "
        f"{run_plan.trainable_per_rank:,} on a rank"
    )
    if run_plan.steps is None:
        yield "steps        known once the data are prepared"
    else:
        yield f"steps        {run_plan.steps_per_epoch} an epoch, {run_plan.steps} in all ({rows} packed rows, {how})"
    yield f"tokens       {run_plan.tokens_per_step:,} a step, padding included"
    yield (
        f"collectives  a step and core: {run_plan.tp_bytes_per_step / GIB:.2f} GiB inside the replica, "
        f"{run_plan.dp_bytes_per_step / MIB:.1f} MiB between replicas"
    )
    if instance := instance_of(params):
        memory = core_memory(instance, params) / GIB
        yield f"instance     {instance.name}: {memory:.0f} GiB a core, of which {USABLE:.0%} are counted on"
        fit = smallest_fit(params, config)
        if fit is None:
            yield "smallest fit none: a replica must fit one instance; shorten data.seq_len or recompute activations"
        else:
            smallest, cut, its_plan = fit
            yield (
                f"smallest fit {smallest.name}, from tp {cut.convert.tp_size} × kv_size_multiplier "
                f"{cut.convert.kv_size_multiplier} on: {its_plan.core_bytes / GIB:.2f} GiB a core"
            )


def print_nodes(params: Params, config: LlamaConfig, counts: list[int]) -> None:
    """A table: what changes with the number of nodes at the same global batch, which gives the same losses."""
    from rich.console import Console
    from rich.table import Table

    table = Table("nodes", "replicas", "micro-batches", "GiB a core", "TP GiB", "DP MiB", "DP ms", "ideal s", "steps")
    for column in table.columns:
        column.justify = "right"
    rows, _ = packed_rows(params)
    instance = instance_of(params)
    for count in counts:
        spread = on_nodes(params, count)
        its_plan: Plan = make_plan(spread, config, rows)
        assert instance is not None, "on_nodes has refused"
        # A ring sends each byte twice (reduced, then spread), of every core of one replica over a node's EFA; between
        # replicas of one node NeuronLink carries them.
        sent = 2 * (count - 1) / count * its_plan.dp_bytes_per_step * params.convert.tp_size
        table.add_row(
            str(count),
            str(spread.train.dp_size),
            str(params.train.global_batch_size // (params.train.micro_batch_size * spread.train.dp_size)),
            f"{its_plan.core_bytes / GIB:.2f}",
            f"{its_plan.tp_bytes_per_step / GIB:.2f}",
            f"{its_plan.dp_bytes_per_step / MIB:.1f}",
            f"{sent * 8 / instance.network * 1000:.2f}",
            f"{its_plan.flops_per_step / (instance.flops * count):.3f}",
            str(its_plan.steps),
        )
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    console.print(
        "a step: micro-batches of each replica; TP and DP what a core gives to collectives; DP ms at the network's\n"
        f"full speed; ideal s at the full {instance and instance.flops / 1e15:.2f} bfloat16 PFLOPS an instance. "
        "Real steps take longer: see docs/scale.md",
        highlight=False,
    )


if __name__ == "__main__":
    run(main)
