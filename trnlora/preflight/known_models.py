"""What is known about the model of model.source before the pipeline has run."""

from pathlib import Path

from trnlora import paths
from trnlora.errors import UserError
from trnlora.metrics import metrics_file
from trnlora.model.config import ModelConfig
from trnlora.params import Params
from trnlora.preflight.plan import DTYPE_BYTES, GIB, make_plan
from trnlora.readers import read_json
from trnlora.sources import hub_snapshot, parse_source

CONFIGS = Path("profiles/configs")  # config.json of the profiles' models, by the model's name


def known_config(params: Params) -> ModelConfig | None:
    """The model's config if this machine has it: fetched, in the folder of a path:// source, or in CONFIGS."""
    source = parse_source(params.model.source)
    stored = CONFIGS / f"{source.name.rpartition('/')[2]}.json"
    if is_fetched(params):
        return ModelConfig.from_folder(paths.MODEL)
    if source.scheme == "path":
        return ModelConfig.from_folder(source.path, fix="")
    if source.scheme == "hf" and stored.exists():
        return ModelConfig.from_hf(read_json(stored), str(stored))
    return None


def model_config(params: Params) -> ModelConfig:
    """The model's config, from this machine or from the hub. Raises UserError if neither has it."""
    config = known_config(params)
    if config is None and parse_source(params.model.source).scheme == "hf":
        config = hub_config(params)
    if config is None:
        raise UserError(f"{params.model.source} has not been fetched yet: run `dvc repro fetch_model` first")
    return config


def hub_config(params: Params) -> ModelConfig:
    """The config of an hf:// source, from the hub's cache or the hub. Raises UserError if access is refused."""
    source = parse_source(params.model.source)
    return ModelConfig.from_folder(hub_snapshot(source, ["config.json"]), f"{source.where}/config.json", fix="")


def is_fetched(params: Params) -> bool:
    """Whether artifacts/model is this model."""
    return paths.MODEL_CONFIG.exists() and fetched_gib(params) is not None


def fetched_gib(params: Params) -> float | None:
    """GiB of weights in metrics/fetch_model.json, which Git tracks; None if it is of another model.source."""
    if not metrics_file("fetch_model").exists():
        return None
    metrics = read_json(metrics_file("fetch_model"))
    return float(metrics["weights_gib"]) if metrics.get("source") == params.model.source else None


def weights_gib(params: Params) -> float | None:
    """GiB of the model's weights, as fetched or computed from its config; None if neither is known."""
    fetched = fetched_gib(params)
    if fetched is not None:
        return fetched
    config = known_config(params)
    if config is None:
        return None
    return make_plan(params, config, None).parameters * DTYPE_BYTES[params.model.dtype] / GIB
