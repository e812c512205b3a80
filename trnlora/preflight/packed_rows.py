"""How many packed rows there are, or will be, to train on."""

import math
from pathlib import Path

from trnlora import paths
from trnlora.data.source_files import data_sources
from trnlora.params import DataSource, Params
from trnlora.readers import read_yaml
from trnlora.sources import parse_source

HUB_DATA_BYTES = {"databricks/databricks-dolly-15k": 13_085_339}  # size of the JSONL file
BYTES_PER_TOKEN = 4.0  # an estimate for English JSONL, rendered with a template


def packed_rows(params: Params) -> tuple[int | None, str]:
    """The number of training rows (None: unknown) and where it comes from."""
    if is_prepared(params):
        import pyarrow.parquet as pq

        return pq.read_metadata(paths.PREPARED / "train.parquet").num_rows, "as prepared"
    return estimated_rows(params), "estimated from the size of data.source; exact after prepare_data"


def is_prepared(params: Params) -> bool:
    """Whether artifacts/prepared was made with these data params, according to dvc.lock."""
    lock = Path("dvc.lock")
    if not (paths.PREPARED / "train.parquet").exists() or not lock.exists():
        return False
    stage = read_yaml(lock).get("stages", {}).get("prepare_data", {})
    recorded = stage.get("params", {}).get("params.yaml", {})
    given = params.data.model_dump(exclude_unset=True)
    return all(recorded.get(f"data.{name}") == value for name, value in given.items())


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
