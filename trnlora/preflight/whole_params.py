"""What is known of a run beforehand, from its params and what is on this machine: without torch and without network."""

from collections.abc import Iterator
from pathlib import Path

from trnlora.data.source_files import data_sources
from trnlora.data.tracking import check_tracked
from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Params
from trnlora.preflight.known_models import is_fetched, known_config
from trnlora.serving.servable import check_servable
from trnlora.sources import parse_source
from trnlora.weights.nxd_layout import check_divisible


def check_whole(params: Params) -> None:
    """Raise UserError for what a stage would refuse later."""
    check_sources(params)
    config = _config(params)
    if config is not None:
        check_fits(params, config)


def check_sources(params: Params) -> None:
    """Raise UserError for a source whose URI cannot be read, that is not there, or that DVC would not watch."""
    for key, uri in sources(params):
        try:
            source = parse_source(uri)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        if source.scheme == "path" and not _is_in_dvc(source.path):
            may_be_file = key != "model.source"
            if not (source.path.exists() if may_be_file else source.path.is_dir()):
                kind = "" if may_be_file else "folder "
                raise UserError(f"{key}: there is no {kind}{source.path}; path:// is relative to {Path.cwd()}")
    check_tracked(params.data)
    if params.on_trainium and Path(params.neuron.compile_cache).is_file():
        raise UserError(f"neuron.compile_cache {params.neuron.compile_cache} is a file: name a folder")


def check_fits(params: Params, config: ModelConfig) -> None:
    """Raise UserError where the model cannot be cut, trained or served as the params say."""
    check_divisible(config, params.convert)
    config.check_seq_len(params.data.seq_len)
    check_servable(config, params)


def sources(params: Params) -> Iterator[tuple[str, str]]:
    """(key, URI) of all that the params read from elsewhere."""
    yield "model.source", params.model.source
    for source in data_sources(params.data):
        yield "data.source", source.source
    if params.data.prompt_template.startswith("path://"):
        yield "data.prompt_template", params.data.prompt_template
    if params.lora.init_adapter:
        yield "lora.init_adapter", params.lora.init_adapter
    if params.eval.adapter:
        yield "eval.adapter", params.eval.adapter


def _is_in_dvc(path: Path) -> bool:
    """Whether DVC has the file, or a folder that it is in: `dvc pull` fetches it."""
    return any(Path(f"{each}.dvc").exists() for each in (path, *path.parents))


def _config(params: Params) -> ModelConfig | None:
    """The model's config, where it is known. One that fetch_model left damaged is not: that stage replaces it."""
    try:
        fetched = is_fetched(params)
    except UserError:
        return None
    try:
        return known_config(params)
    except UserError:
        if fetched:
            return None
        raise
