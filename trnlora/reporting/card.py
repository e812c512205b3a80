"""The adapter as a folder for the Hugging Face hub: its files and a model card.

The card's metadata follow huggingface.co/docs/hub/model-cards.
"""

import shutil
from pathlib import Path

from trnlora import paths
from trnlora.errors import UserError
from trnlora.files import atomic_dir, write_json
from trnlora.model.targets import peft_modules
from trnlora.params import Params
from trnlora.readers import read_json
from trnlora.reporting.provenance import data_revision, data_uris, what_was_run, where_shown
from trnlora.reporting.results import Results
from trnlora.reporting.summary import fenced, score_table
from trnlora.reporting.templating import render
from trnlora.reporting.values import formatted
from trnlora.serving.adapters import check_own_adapter
from trnlora.sources import parse_source
from trnlora.weights.peft_folder import CONFIG, RECORD, WEIGHTS

FOLDER = Path("reports/adapter")
# eval_vllm's key below `tuned`, name of the metric, its type on the hub (huggingface.co/metrics)
METRICS = (
    ("exact_match", "exact match", "exact_match"),
    ("rougeL", "ROUGE-L", "rouge"),
    ("bleu", "BLEU", "bleu"),
    ("chrf", "chrF", "chrf"),
)


def check_publishable(params: Params, now: Results) -> None:
    """Raise UserError unless artifacts/adapter is whole, evaluated, and what the recorded run wrote."""
    if params.eval.adapter:
        raise UserError("eval.adapter is set, so the scores are not those of artifacts/adapter: set null and rerun")
    if now.number("eval_vllm", "prompts") is None:
        raise UserError("the adapter has not been evaluated yet: run `make repro`")
    if not now.answers:
        raise UserError(
            f"{paths.ANSWERS}, of which the card shows a prompt, is not here: run `dvc pull` or `make repro`"
        )
    # Others will read the card as a description of the adapter, without this project beside it.
    if changed := now.changes.lines():
        raise UserError(f"the card would not describe what was trained: {'; '.join(changed)}")
    check_own_adapter(paths.ADAPTER, paths.MODEL, params.lora, "tuned")


def check_hub_name(name: str) -> None:
    """Raise UserError unless `name` can be a model's on the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{name!r} is not a valid model name on the hub: write it as org/name") from None


def write_card_folder(params: Params, now: Results, base: str | None) -> str | None:
    """Write the adapter with its card to FOLDER. Returns the base model on the hub, if there is one.

    base: its name, where model.source is not on the hub. Raises UserError as `check_publishable` and `check_hub_name`.
    """
    check_publishable(params, now)
    base = base or hub_id(params.model.source)
    if base:
        check_hub_name(base)
    with atomic_dir(FOLDER) as partial:
        for name in (WEIGHTS, RECORD):
            shutil.copyfile(paths.ADAPTER / name, partial / name)
        config = read_json(paths.ADAPTER / CONFIG)
        config["base_model_name_or_path"] = base or public(params.model.source)
        write_json(partial / CONFIG, config)
        (partial / "README.md").write_text(card(now, base), encoding="utf-8")
    return base


def hub_id(uri: str) -> str | None:
    """org/name of a source on the hub; None for other sources."""
    source = parse_source(uri)
    return source.name if source.scheme == "hf" else None


def public(uri: str) -> str:
    """A source as others may see it: only the last part of a path on this machine."""
    source = parse_source(uri)
    return source.path.name if source.scheme == "path" else uri


def card(now: Results, base: str | None) -> str:
    """README.md: YAML metadata, and text from the run's metrics and params. The run must have answers."""
    model, data = now.params["model.source"], data_uris(now.params)
    name = f"{Path(base).name if base else Path(public(model)).stem}-lora"
    run, here = what_was_run(now), where_shown()
    assert now.answers, "check_publishable refuses a run without"

    def count(stage: str, key: str) -> str:
        return formatted(now, stage, key, "count")

    return render(
        "card.md.jinja",
        {
            "metadata": metadata(now, name, base),
            "name": name,
            "base": base,
            "source": public(model),
            "source_on_hub": hub_id(model),
            "digest": now.get("fetch_model", "sha256.model.safetensors"),
            "data": "; ".join(data_revision(uri, now.changes).replace(uri, public(uri)) for uri in data),
            "params": now.params,
            "modules": ", ".join(peft_modules(now.params["lora.target_modules"])),
            "prompt": fenced(now.answers[0]["prompt"].rstrip()),
            "scores": "\n".join(score_table(now)),
            "has_loss": now.get("eval_vllm", "tuned.loss") is not None,
            "count": count,
            "provenance": {
                "Profile": run["Profile"],
                "Card written at Git commit": here["Git commit"],
                "Card written with": here["Versions"],
            },
        },
    )


def metadata(now: Results, name: str, base: str | None) -> str:
    """The card's metadata as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    data = data_uris(now.params)
    on_hub = [each for each in map(hub_id, data) if each]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=on_hub[0] if on_hub else "custom",
            dataset_name=", ".join(hub_id(uri) or public(uri) for uri in data),
            dataset_split="test",
            metric_type=kind,
            metric_name=title,
            metric_value=now.number("eval_vllm", f"tuned.{key}"),
        )
        for key, title, kind in METRICS
    ]
    return ModelCardData(
        model_name=name,
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        pipeline_tag="text-generation",
        datasets=on_hub or None,
        tags=["lora", "trnlora"],
        eval_results=results,
    ).to_yaml()
