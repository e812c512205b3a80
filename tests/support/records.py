"""What stages record, for tests that start with a later stage."""

import hashlib
import json
from pathlib import Path
from typing import Any

from trnlora.data.examples import PREPARED_WITH, SOURCES, PreparedWith
from trnlora.data.templates import load_template
from trnlora.files import SUMS, sha256, write_json, write_sums
from trnlora.training.adapter_record import TRAINED_WITH, weights_digests
from trnlora.weights.peft_folder import RECORD

OTHER_DIGEST = "0" * 64


def write_fetched(root: Path) -> None:
    """metrics/fetch_model.json in the folder `root`, whose artifacts/model is there."""
    fetched = {"source": "path:///models/tiny", "revision": "", "sha256": weights_digests(root / "artifacts/model")}
    write_json(root / "metrics/fetch_model.json", fetched)


def write_prepared_with(folder: Path, template: str = "dolly") -> None:
    """prepared.json and sources.json of artifacts/prepared, which is `folder`, and then its checksums."""
    made_with = PreparedWith(template=load_template(template, {}, None), params={"prompt_template": template})
    write_json(folder / PREPARED_WITH, made_with.model_dump())
    rows = {"file": "rows.jsonl", "unit": "line", "offset": 0, "format": "instruction", "sha256": OTHER_DIGEST}
    write_json(folder / SOURCES, [rows])
    write_sums(folder)


def write_trained_with(root: Path) -> None:
    """training.json in artifacts/lora_adapter below `root`, which has artifacts/model and artifacts/prepared."""
    files = [Path("artifacts/prepared") / SUMS, Path("artifacts/model/config.json")]
    trained = {"params": {"train": {"lr": 0.001}}, "inputs": {str(file): sha256(root / file) for file in files}}
    write_json(root / "artifacts/lora_adapter" / TRAINED_WITH, trained)


def record(model: Path, template: str = "dolly", prepared: Path | None = None, **generation: Any) -> dict[str, Any]:
    """What trnlora.json holds for an adapter of `model` that was trained with a template on the rows in `prepared`."""
    params = {"data": {"prompt_template": template}}
    sampling = {
        "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    return {
        "format": 1,
        "template": load_template(template, {}, None).model_dump(),
        "base_model": {"source": "path://…/tiny", "revision": "", "sha256": weights_digests(model)},
        "data": {
            "files": [{"file": "rows.jsonl", "sha256": OTHER_DIGEST}],
            "prepared_sha256": sha256(prepared / SUMS) if prepared else OTHER_DIGEST,
        },
        "params": params,
        "params_sha256": hashlib.sha256(json.dumps(params).encode()).hexdigest(),
        "generation": sampling | generation,
    }


def write_record(adapter: Path, model: Path, **values: Any) -> Path:
    """Write trnlora.json to a PEFT folder, which is returned. values: those of `record`."""
    write_json(adapter / RECORD, record(model, **values))
    return adapter
