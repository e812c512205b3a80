"""Answer the test rows with the base model and with the adapter through one vLLM engine, score both, and gate.

    python stages/eval_vllm.py [--params FILE]

Decoding is greedy, up to eval.max_tokens or the end-of-sequence token. Prompts go in as the token ids that prepare_data
wrote, so nothing is tokenized a second time. The loss on the validation rows is teacher-forced through vLLM's
prompt_logprobs and compared with the trainer's and PEFT's on the same rows.

The stage fails, with the numbers in one line, when the adapter changes too few answers or leaves the loss as it was
(vLLM serves the base model in silence when an adapter does not fit), and when the three losses disagree. The answers
of a failed run are then in artifacts/answers.rejected.jsonl, and no out is written that could be taken as good.

With eval.adapter, a PEFT adapter from elsewhere is scored in the same way in place of the trained one. Its loss is then
compared with the base's alone.

Reads   artifacts/model, artifacts/adapter (and its SHA256SUMS), artifacts/prepared/{validation,test}.jsonl,
        metrics/finetune_lora.json (validation_loss), metrics/flatten_adapter.json (peft_validation_loss)
Writes  artifacts/answers.jsonl, metrics/eval_vllm.json, metrics/timing/eval_vllm.json,
        plots/exact_match_by_category.json
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.evaluation import scoring
from trnlora.files import check_sums, read_json, read_jsonl, write_json, write_jsonl
from trnlora.params import Eval, Params, load_params
from trnlora.serving import adapters as peft_folder
from trnlora.serving import vllm_args as serving
from trnlora.serving.adapters import Adapter
from trnlora.sources import hub_snapshot, parse_source

REJECTED = paths.ANSWERS.with_suffix(".rejected.jsonl")
# Nats. An adapter of zeros gives the base's loss to the last bit; one that moves the mean by less does nothing either.
SAME_LOSS = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, help="params file (default: %(default)s)")
    args = parser.parse_args()

    # Everything that can be wrong without vLLM is looked at before the engine is paid for.
    params = load_params(args.params)
    check_sums(paths.PREPARED, "prepare_data", ["validation.jsonl", "test.jsonl"])
    validation = read_rows("validation")
    test = spread(read_rows("test"), params.eval.max_prompts)
    if params.eval.adapter is None:
        tuned = peft_folder.check_own_adapter(paths.ADAPTER, paths.MODEL, params.lora.r, serving.TUNED)
        check_sums(paths.ADAPTER, "flatten_adapter", sums=paths.ADAPTER_SUMS)
        other_losses = {
            "loss_gap_trainer": read_loss("finetune_lora", "validation_loss"),
            "loss_gap_peft": read_loss("flatten_adapter", "peft_validation_loss"),
        }
    else:
        tuned = peft_folder.check_adapter(fetch_adapter(params.eval.adapter), paths.MODEL, serving.TUNED)
        other_losses = {}
    check_sums(paths.MODEL, "fetch_model")
    engine_args = serving.engine_args(params, [tuned])

    begun = time.perf_counter()
    llm = start_engine(params, engine_args)
    engine_start_seconds = time.perf_counter() - begun
    print(f"vLLM engine started in {engine_start_seconds:.1f} s", flush=True)

    # Base and adapter in calls of their own: each gets its own throughput, and no batch mixes the two. The loss comes
    # first, so that loading the adapter and the first touch of memory are not part of the throughput.
    models: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[dict[str, Any]]] = {}
    speeds: dict[str, dict[str, float]] = {}
    for name, adapter in ((serving.BASE, None), (serving.TUNED, tuned)):
        loss = teacher_forced_loss(llm, name, adapter, validation)
        answers[name], speeds[name] = answer(llm, name, adapter, test, params.eval.max_tokens)
        models[name] = {"loss": loss, **score(answers[name], test)}

    metrics: dict[str, Any] = {
        "prompts": len(test),
        "changed_fraction": scoring.changed_fraction(*([a["text"] for a in answers[name]] for name in models)),
        **{name: abs(models[serving.TUNED]["loss"] - loss) for name, loss in other_losses.items()},
        **models,
    }
    references, categories = [row["response"] for row in test], [row["category"] for row in test]
    by_category = {
        name: scoring.exact_match_by_category([a["text"] for a in answers[name]], references, categories)
        for name in models
    }
    metrics |= {f"{name}_exact_match_by_category": values for name, values in by_category.items()}
    report(models, by_category)

    answer_rows = [
        answer_row(row, base, tuned)
        for row, base, tuned in zip(test, answers[serving.BASE], answers[serving.TUNED], strict=True)
    ]
    if failures := gate(metrics, params.eval):
        write_jsonl(REJECTED, answer_rows)
        raise UserError("; ".join(failures) + f" (answers to look at: {REJECTED})")
    REJECTED.unlink(missing_ok=True)
    write_jsonl(paths.ANSWERS, answer_rows)
    write_json(paths.METRICS / "eval_vllm.json", metrics)
    timing = {"engine_start_seconds": engine_start_seconds, "seconds": time.perf_counter() - begun, **speeds}
    write_json(paths.METRICS / "timing" / "eval_vllm.json", timing)
    write_json(
        paths.PLOTS / "exact_match_by_category.json",
        [
            {"category": category, "model": name, "exact_match": value}
            for name, values in by_category.items()
            for category, value in values.items()
        ],
    )


def read_rows(split: str) -> list[dict[str, Any]]:
    """The rows of artifacts/prepared/<split>.jsonl. Raises UserError when there are none."""
    path = paths.PREPARED / f"{split}.jsonl"
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} has no rows: raise data.{split}_fraction or give prepare_data more rows")
    return rows


def fetch_adapter(uri: str) -> Path:
    """The folder that eval.adapter names, downloaded where it is on the hub."""
    source = parse_source(uri)
    if source.scheme == "hf":
        return hub_snapshot(source, ["adapter_config.json", "adapter_model.safetensors"])
    return source.path


def spread(rows: list[dict[str, Any]], count: int | None) -> list[dict[str, Any]]:
    """`count` rows at even distances, so that a file sorted by category keeps its mix; None: all."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def read_loss(stage: str, key: str) -> float:
    """A loss from metrics/<stage>.json, in nats a labelled token."""
    path = paths.METRICS / f"{stage}.json"
    value = read_json(path).get(key)
    if not isinstance(value, float | int):
        raise UserError(f"{path} has no number {key}: run `dvc repro {stage}`")
    return float(value)


def start_engine(params: Params, engine_args: dict[str, Any]) -> Any:
    """A `vllm.LLM` in this process. Raises UserError with vLLM's reason, in one line, when it does not start."""
    verbose = "VLLM_LOGGING_LEVEL" in os.environ
    os.environ.update(serving.environment(params))
    # The engine in this process, whatever the backend: nothing can be left behind, and an error arrives as itself and
    # not as "engine core initialization failed".
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not verbose:
        os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"  # the page that goes before such an error
    print("starting vLLM …", flush=True)
    try:
        with contextlib.nullcontext() if verbose else quiet():
            from vllm import LLM

            from trnlora.backends.mkl import settle_vector_math

            settle_vector_math()
            return LLM(**engine_args)
    except Exception as error:
        raise UserError(serving.failure("vLLM did not start", error)) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed meanwhile, by C++ code too; exceptions pass."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)


def generate(
    llm: Any, title: str, adapter: Adapter | None, prompts: list[list[int]], sampling: Any
) -> tuple[list[Any], float]:
    """Outputs of vLLM in the order of `prompts` (token ids), and the seconds it took.

    Raises UserError with vLLM's reason, in one line, when it refuses a prompt or its engine dies.
    """
    from tqdm import tqdm
    from vllm.lora.request import LoRARequest

    def bar(rows: Any = None, **options: Any) -> Any:
        # vLLM asks for two bars: one over the rows as it queues them, which is over at once, and the one that counts.
        return rows if rows is not None else tqdm(**{**options, "desc": title, "leave": False})

    begun = time.perf_counter()
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling,
            lora_request=LoRARequest(adapter.name, 1, str(adapter.folder)) if adapter else None,
            # Not a disabled bar where nobody watches: vLLM divides by its elapsed time, which is then 0.
            use_tqdm=bar if sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE") else False,
        )
    except Exception as error:
        raise UserError(serving.failure(f"vLLM failed ({title})", error)) from error
    return outputs, time.perf_counter() - begun


def teacher_forced_loss(llm: Any, name: str, adapter: Adapter | None, rows: list[dict[str, Any]]) -> float:
    """Mean cross-entropy in nats over all response tokens (EOS included) of all rows, as the trainer counts it."""
    from vllm import SamplingParams

    # 0: the log-probability of the actual token alone (vllm/sampling_params.py). One token must be generated.
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [row["prompt_token_ids"] + row["response_token_ids"] for row in rows]
    outputs, seconds = generate(llm, f"{name} loss", adapter, prompts, sampling)
    total, count = 0.0, 0
    for row, tokens, output in zip(rows, prompts, outputs, strict=True):
        for position in range(len(row["prompt_token_ids"]), len(tokens)):
            total -= output.prompt_logprobs[position][tokens[position]].logprob
            count += 1
    print(f"{name}: loss {total / count:.6f} over {count} tokens of {len(rows)} rows, {seconds:.1f} s", flush=True)
    return total / count


def answer(
    llm: Any, name: str, adapter: Adapter | None, rows: list[dict[str, Any]], max_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Greedy answers (text, tokens incl. EOS, finish_reason) in the order of `rows`, and the throughput."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs, seconds = generate(llm, f"{name} answers", adapter, [row["prompt_token_ids"] for row in rows], sampling)
    completions = [output.outputs[0] for output in outputs]
    answers = [{"text": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason} for c in completions]
    tokens = sum(a["tokens"] for a in answers)
    print(f"{name}: {len(rows)} answers, {tokens} tokens, {seconds:.1f} s, {tokens / seconds:.0f} tokens/s", flush=True)
    return answers, {"requests_per_s": len(rows) / seconds, "output_tokens_per_s": tokens / seconds}


def score(answers: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        **scoring.scores([a["text"] for a in answers], [row["response"] for row in rows]),
        "response_tokens": sum(a["tokens"] for a in answers) / len(answers),
        "truncated_fraction": scoring.truncated_fraction([a["finish_reason"] for a in answers]),
    }


def answer_row(row: dict[str, Any], base: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "category": row["category"],
        "prompt": row["prompt"],
        "reference": row["response"],
        "base": base["text"],
        "tuned": tuned["text"],
        "base_exact": scoring.is_exact(base["text"], row["response"]),
        "tuned_exact": scoring.is_exact(tuned["text"], row["response"]),
        "base_finish_reason": base["finish_reason"],
        "tuned_finish_reason": tuned["finish_reason"],
    }


def gate(metrics: dict[str, Any], limits: Eval) -> list[str]:
    """What is wrong with the run, each in one line; empty when it passes. NaN never passes."""
    failures = []
    base_loss, tuned_loss = metrics[serving.BASE]["loss"], metrics[serving.TUNED]["loss"]
    changed = metrics["changed_fraction"]
    if not (changed >= limits.min_changed_fraction and abs(tuned_loss - base_loss) > SAME_LOSS):
        failures.append(
            f"the adapter has too little effect in vLLM: {changed:.1%} of the answers changed "
            f"(eval.min_changed_fraction {limits.min_changed_fraction:.1%}), "
            f"loss {base_loss:.6f} without and {tuned_loss:.6f} with it"
        )
    for name, key in (("the trainer", "loss_gap_trainer"), ("PEFT", "loss_gap_peft")):
        gap = metrics.get(key, 0.0)  # not measured for an adapter from elsewhere
        if not gap <= limits.max_loss_gap:
            failures.append(
                f"vLLM's loss of the adapter is {tuned_loss:.6f}, {gap:.6f} nats from that of {name} "
                f"(eval.max_loss_gap {limits.max_loss_gap}): are adapter and prepared rows of one run? `dvc repro`"
            )
    return failures


def report(models: dict[str, dict[str, Any]], by_category: dict[str, dict[str, float]]) -> None:
    """Print base and tuned side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *models)
    for key in next(iter(models.values())):
        table.add_row(key, *(f"{values[key]:.4g}" for values in models.values()))
    table.add_section()
    for category in next(iter(by_category.values())):
        table.add_row(f"exact_match {category}", *(f"{values[category]:.4g}" for values in by_category.values()))
    Console().print(table)


if __name__ == "__main__":
    run(main)
