"""How many packed rows there are, or will be, to train on."""

import math
from pathlib import Path

from trnlora import paths
from trnlora.params import Params
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
    import yaml

    stage = yaml.safe_load(lock.read_text("utf-8")).get("stages", {}).get("prepare_data", {})
    recorded = stage.get("params", {}).get("params.yaml", {})
    return all(recorded.get(f"data.{name}") == value for name, value in params.data.model_dump().items())


def estimated_rows(params: Params) -> int | None:
    """An estimate from the size of the data file; None if the size or the share of it that is used is unknown."""
    source = parse_source(params.data.source)
    if source.scheme == "hf":
        size = HUB_DATA_BYTES.get(source.name)
    else:
        size = source.path.stat().st_size if source.path.exists() else None
    if size is None or not params.data.packing or params.data.categories is not None:
        return None
    share = (1 - params.data.test_fraction) * (1 - params.data.validation_fraction)
    return math.ceil(size / BYTES_PER_TOKEN * share / params.data.seq_len)
