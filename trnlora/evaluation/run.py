"""The evaluation of an adapter: inputs, scores of base and adapter with one engine, gates, results."""

import time
from dataclasses import dataclass
from typing import Any

from trnlora import paths
from trnlora.data.examples import PreparedExample, read_examples, read_prepared_with
from trnlora.errors import UserError
from trnlora.evaluation.answers import Scored, answer_rows, spread
from trnlora.evaluation.gates import gate
from trnlora.evaluation.scoring import changed_fraction
from trnlora.files import check_sums, partial_path, write_json, write_jsonl
from trnlora.metrics import metrics_file, stage_outputs, write_metrics
from trnlora.params import Params
from trnlora.readers import read_json
from trnlora.serving.adapters import BASE, TUNED, Adapter, check_adapter, check_own_adapter
from trnlora.serving.device_engine import DeviceEngine, neuron_engine
from trnlora.serving.engine import Engine, start_engine
from trnlora.training.adapter_record import GREEDY, check_foreign, check_own
from trnlora.weights.adapter_source import fetch_adapter

REJECTED = paths.ANSWERS.with_suffix(".rejected.jsonl")


def evaluate(params: Params, engine: Engine | DeviceEngine | None = None) -> None:
    """Score base and adapter, print the scores, and write the results if the adapter passes the gates.

    engine: one that was started with room for this adapter; None: that of eval.engine. Raises UserError for inputs that
    are missing or damaged, when vLLM fails, and when a gate fails: then only REJECTED is written.
    """
    reads = [paths.MODEL, paths.PREPARED, paths.ADAPTER, paths.MERGED]
    with stage_outputs("eval_vllm", [], [paths.ANSWERS, paths.CATEGORY_PLOT], reads):
        evaluate_locked(params, engine)


def evaluate_locked(params: Params, engine: Engine | DeviceEngine | None) -> None:
    """`evaluate`, while no other process writes what it reads, or the same results."""
    inputs = read_inputs(params)
    begun = time.perf_counter()
    if engine is None and params.eval.engine == "device":
        engine = neuron_engine(params, inputs.adapter)
    engine = engine or start_engine(params, [inputs.adapter])
    engine_start_seconds = time.perf_counter() - begun
    if isinstance(engine, DeviceEngine):
        answers = engine.answer(inputs.test, params.eval.max_tokens)
        base, tuned = (Scored(None, *answers.models[name]) for name in (BASE, TUNED))
        engine_start_seconds = answers.start_seconds
    else:
        base = score(engine, BASE, None, inputs, params.eval.max_tokens)
        tuned = score(engine, TUNED, inputs.adapter, inputs, params.eval.max_tokens)

    models = {BASE: base.metrics(inputs.test), TUNED: tuned.metrics(inputs.test)}
    metrics = {
        "prompts": len(inputs.test),
        "changed_fraction": changed_fraction(base.texts(), tuned.texts()),
        **loss_gaps(tuned.loss, inputs.other_losses),
        **models,
    }
    print_scores(models)

    rows = answer_rows(inputs.test, base, tuned)
    if failures := gate(metrics, params.eval):
        write_jsonl(REJECTED, rows)
        raise UserError("; ".join(failures) + f" (the answers are in {REJECTED})")
    REJECTED.unlink(missing_ok=True)
    write_jsonl(partial_path(paths.ANSWERS), rows)
    speeds = {BASE: base.speed(), TUNED: tuned.speed()}
    timing = {"engine_start_seconds": engine_start_seconds, "seconds": time.perf_counter() - begun, **speeds}
    write_metrics("eval_vllm", metrics, timing)
    write_json(partial_path(paths.CATEGORY_PLOT), plot_points(models))


@dataclass(frozen=True)
class Inputs:
    """What is evaluated, on which rows."""

    validation: list[PreparedExample]
    test: list[PreparedExample]  # at most eval.max_prompts
    adapter: Adapter
    # The adapter's losses on the validation rows in other stages, by who measured them: nats per token. Empty for an
    # adapter from elsewhere.
    other_losses: dict[str, float]


def read_inputs(params: Params) -> Inputs:
    """Read and check everything that does not need vLLM. Raises UserError for anything that is missing or damaged."""
    check_sums(paths.PREPARED, "prepare_data", ["validation.jsonl", "test.jsonl"])
    prepared = read_prepared_with(paths.PREPARED)
    validation = read_split("validation")
    test = spread(read_split("test"), params.eval.max_prompts)
    other_losses: dict[str, float] = {}
    if params.eval.adapter is None:
        check_sums(paths.ADAPTER, "flatten_adapter", sums=paths.ADAPTER_SUMS)
        adapter = check_own_adapter(paths.ADAPTER, paths.MODEL, params.lora, TUNED)
        assert adapter.record, "check_own_adapter refuses a folder without"
        check_own(adapter.record, prepared)
        other_losses["trainer"] = read_loss("finetune_lora", "validation_loss")
        other_losses["peft"] = read_loss("flatten_adapter", "peft_validation_loss")
    else:
        adapter = check_adapter(fetch_adapter(params.eval.adapter), paths.MODEL, TUNED)
        check_foreign(adapter.folder, prepared, "eval.adapter")
    if adapter.record and adapter.record.generation != GREEDY:
        raise UserError(
            f"{adapter.folder} was evaluated with {adapter.record.generation}, and here answers are greedy: the scores "
            "would not be those of what a server gives"
        )
    check_sums(paths.MODEL, "fetch_model")
    return Inputs(validation, test, adapter, other_losses)


def loss_gaps(loss: float | None, others: dict[str, float]) -> dict[str, float]:
    """The differences in nats between vLLM's loss and those of `Inputs.other_losses`, as metrics.

    Without a loss of vLLM's (None), the difference between the others.
    """
    if loss is not None:
        return {f"loss_gap_{name}": abs(loss - other) for name, other in others.items()}
    return {"loss_gap_trainer_peft": abs(others["trainer"] - others["peft"])} if others else {}


def read_split(split: str) -> list[PreparedExample]:
    """The rows of artifacts/prepared/<split>.jsonl. Raises UserError if there are none."""
    path = paths.PREPARED / f"{split}.jsonl"
    rows = read_examples(path)
    if not rows:
        raise UserError(f"{path} has no rows: raise data.{split}_fraction or give prepare_data more rows")
    return rows


def read_loss(stage: str, key: str) -> float:
    """A loss from a stage's metrics, in nats per labelled token. Raises UserError if it is not a number."""
    path = metrics_file(stage)
    value = read_json(path).get(key)
    if not isinstance(value, float | int):
        raise UserError(f"{path} has no number {key}: run `dvc repro {stage}`")
    return float(value)


def score(engine: Engine, name: str, adapter: Adapter | None, inputs: Inputs, max_tokens: int) -> Scored:
    """Loss and answers of one model, base and adapter apart: each gets its own throughput, and no batch mixes the two.

    The loss comes first, so that loading the adapter and first touches of memory do not count as answering time.
    """
    loss = engine.teacher_forced_loss(name, adapter, inputs.validation)
    answers, seconds = engine.answer(name, adapter, inputs.test, max_tokens)
    return Scored(loss, answers, seconds)


def plot_points(models: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of DVC's plot of exact matches by category and model."""
    return [
        {"category": category, "model": name, "exact_match": value}
        for name, metrics in models.items()
        for category, value in metrics["exact_match_by_category"].items()
    ]


def print_scores(models: dict[str, dict[str, Any]]) -> None:
    """Print the models' metrics side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *models)
    base = models[BASE]
    for key in base:
        if key != "exact_match_by_category":
            table.add_row(key, *(f"{metrics[key]:.4g}" for metrics in models.values()))
    table.add_section()
    for category in base["exact_match_by_category"]:
        values = [metrics["exact_match_by_category"][category] for metrics in models.values()]
        table.add_row(f"exact_match {category}", *(f"{value:.4g}" for value in values))
    Console().print(table)
