"""The trained adapter with a model card, as a folder to upload to the Hugging Face hub.

    python tools/card.py [--base ORG/NAME]        (make card BASE=ORG/NAME)
    hf upload ORG/ADAPTER reports/adapter         (then; it asks for a token of yours)

--base names the base model on the hub where model.source is not hf://. PEFT and vLLM load the adapter onto that one, so
it has to be the same model.

Reads   params.yaml, metrics/, artifacts/adapter, artifacts/answers.jsonl, and what `dvc status` reads
Writes  reports/adapter: the adapter's files and README.md, whose metadata the hub reads
        (huggingface.co/docs/hub/model-cards)
"""

import argparse
import shutil
from pathlib import Path

from report import data_revision, fenced, score_table, what_was_run

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.files import atomic_dir, read_json, write_json
from trnlora.params import load_params
from trnlora.reporting.results import Results, load_results
from trnlora.serving.adapters import check_own_adapter
from trnlora.sources import parse_source

OUT = Path("reports/adapter")
TEMPLATE = Path(__file__).with_name("card.md.jinja")
# eval_vllm's key, name and type of the metric as the hub knows them (huggingface.co/metrics)
METRICS = (
    ("exact_match", "exact match", "exact_match"),
    ("rougeL", "ROUGE-L", "rouge"),
    ("bleu", "BLEU", "bleu"),
    ("chrf", "chrF", "chrf"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="ORG/NAME", help="the base model on the hub; default: that of model.source")
    args = parser.parse_args()
    params = load_params()
    now = load_results()
    if params.eval.adapter:
        raise UserError("eval.adapter is set, so the scores are not those of artifacts/adapter: set null and rerun")
    if now.get("eval_vllm", "prompts") is None or not now.answers:
        raise UserError("the adapter is not evaluated yet: run `make repro`")
    check_own_adapter(paths.ADAPTER, paths.MODEL, params.lora, "tuned")
    check_current()
    base = args.base or hub_id(params.model.source)
    if base:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(base)
        except HFValidationError:
            raise UserError(f"{base!r} is not a model's name on the hub: write it as org/name") from None

    with atomic_dir(OUT) as partial:
        shutil.copyfile(paths.ADAPTER / "adapter_model.safetensors", partial / "adapter_model.safetensors")
        config = read_json(paths.ADAPTER / "adapter_config.json")
        config["base_model_name_or_path"] = base or public(params.model.source)
        write_json(partial / "adapter_config.json", config)
        (partial / "README.md").write_text(card(now, base), encoding="utf-8")
    print(f"adapter and card in {OUT}; next: hf upload ORG/NAME {OUT}")
    if not base:
        print("the card names no base model of the hub, model.source is not hf://: `make card BASE=ORG/NAME` mends it")


def check_current() -> None:
    """Raise UserError where the results are not those of the params, the code and the data that are here now."""
    from dvc.repo import Repo

    with Repo() as repo:
        changed = repo.status()
    if changed:
        raise UserError(f"the results are older than what they depend on ({', '.join(changed)}): run `make repro`")


def hub_id(uri: str) -> str | None:
    """org/name of a source on the hub."""
    source = parse_source(uri)
    return source.name if source.scheme == "hf" else None


def public(uri: str) -> str:
    """A source as strangers may see it: of a path of this machine its last part alone."""
    source = parse_source(uri)
    return source.path.name if source.scheme == "path" else uri


def card(now: Results, base: str | None) -> str:
    """README.md: YAML metadata and text, of the run's metrics and params."""
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    model, data = now.params["model.source"], now.params["data.source"]
    name = f"{Path(base).name if base else Path(public(model)).stem}-lora"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_id(data) or "custom",
            dataset_name=hub_id(data) or public(data),
            dataset_split="test",
            metric_type=kind,
            metric_name=title,
            metric_value=now.get("eval_vllm", f"tuned.{key}"),
        )
        for key, title, kind in METRICS
    ]
    metadata = ModelCardData(
        model_name=name,
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="peft",
        pipeline_tag="text-generation",
        datasets=hub_id(data),
        tags=["lora", "trnlora"],
        eval_results=results,
    )

    def count(stage: str, key: str) -> str:
        return f"{now.get(stage, key):,}"

    assert now.answers, "main has looked"
    what = what_was_run(now)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE.name).render(
        metadata=metadata.to_yaml(),
        name=name,
        base=base,
        source=public(model),
        source_on_hub=hub_id(model),
        digest=now.get("fetch_model", "sha256.model.safetensors"),
        data=data_revision(data).replace(data, public(data)),
        params=now.params,
        prompt=fenced(now.answers[0]["prompt"].rstrip()),
        scores="\n".join(score_table(now)),
        count=count,
        made={label: what[label] for label in ("Profile", "Git commit", "Versions")},
    )


if __name__ == "__main__":
    run(main)
