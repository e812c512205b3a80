"""How many packed rows there are, or will be, to train on."""

import math
from pathlib import Path

from trnlora import paths
from trnlora.data.source_files import data_sources
from trnlora.errors import UserError
from trnlora.params import DataSource, Params
from trnlora.readers import read_text
from trnlora.recorded import FIX, LOCK, param_values, parse_lock, workspace_changes
from trnlora.sources import parse_source

HUB_DATA_BYTES = {"databricks/databricks-dolly-15k": 13_085_339}  # size of the JSONL file
BYTES_PER_TOKEN = 4.0  # an estimate for English JSONL, rendered with a template


def packed_rows(params: Params) -> tuple[int | None, str]:
    """The number of training rows (None: unknown) and where it comes from."""
    if is_prepared(params):
        changes = workspace_changes("prepare_data")
        inputs = [file for file in changes.files if not file.endswith(".py")]
        rewritten = [out for out in changes.modified if out.startswith(str(paths.PREPARED))]
        if not (changes.unknown or inputs or rewritten):
            origin = "as prepared" + (", by code that has changed since" if changes.files else "")
            return prepared_rows(paths.PREPARED / "train.parquet"), origin
    return estimated_rows(params), "estimated from the size of data.source; exact after prepare_data"


def is_prepared(params: Params) -> bool:
    """Whether artifacts/prepared was made of this model with these data params, according to dvc.lock."""
    lock = Path(LOCK)
    if not (paths.PREPARED / "train.parquet").exists() or not lock.exists():
        return False
    runs = parse_lock(read_text(lock, FIX))
    fetched, prepared = runs.get("fetch_model"), runs.get("prepare_data")
    model = str(paths.MODEL)
    if fetched is None or prepared is None or prepared.deps.get(model) != fetched.outs.get(model):
        return False
    given = param_values(params.model_dump(exclude_unset=True))
    recorded = prepared.params | {key: fetched.params.get(key) for key in ("model.source", "model.sha256")}
    asked = {key for key in given if key.startswith("data.")} | recorded.keys()
    return all(given.get(key) == recorded.get(key) for key in asked)


def prepared_rows(file: Path) -> int:
    """The number of rows of a parquet file. Raises UserError if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is not readable ({reason}): run `dvc repro -f prepare_data`") from None


def estimated_rows(params: Params) -> int | None:
    """An estimate from the size of the data file; None if the size or the share of it that is used is unknown."""
    sizes = [source_bytes(source) for source in data_sources(params.data)]
    if None in sizes or not params.data.packing or params.data.categories is not None:
        return None
    share = (1 - params.data.test_fraction) * (1 - params.data.validation_fraction)
    return math.ceil(sum(filter(None, sizes)) / BYTES_PER_TOKEN * share / params.data.seq_len)


def source_bytes(source: DataSource) -> float | None:
    """The bytes of text of a source that are trained on; None if they are unknown."""
    parsed = parse_source(source.source)
    if parsed.scheme == "hf":
        size = HUB_DATA_BYTES.get(parsed.name)
    elif parsed.path.is_file() and parsed.path.suffix in (".jsonl", ".json", ".csv", ".tsv"):
        size = parsed.path.stat().st_size
    else:
        size = None
    return None if size is None or source.rows is not None else size * source.weight
