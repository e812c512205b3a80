"""Weight files: HF folders of safetensors and NxD's one file per rank, read and written a few rows at a time.

Nothing here holds more of a model in memory than a caller asks for: a `StoredTensor` says where in which file a
tensor's bytes are, and rows of it are read or written in place.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trnlora.errors import UserError
from trnlora.files import SUMS, atomic_file, write_json
from trnlora.weights.safetensors_header import INDEX, WEIGHTS, read_header, read_index

PRETRAINED_TAG = "pretrained_weight"  # nxd.load_checkpoint(path, tag="pretrained_weight")
LORA_TAG = "lora"  # nxd.save_checkpoint(path, tag="lora")

FETCH_AGAIN = ": fetch the model again (`dvc repro -f fetch_model`)"

MAX_FILE_BYTES = 5 * 10**9  # of one safetensors file, as save_pretrained splits them

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # tensors' shapes and dtypes by name

# Names of dtypes in safetensors headers.
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def rank_file(folder: Path, tag: str, tp_rank: int) -> Path:
    """NxD's path of one rank's tensors: <folder>/<tag>/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt."""
    return folder / tag / "model" / f"dp_rank_00_tp_rank_{tp_rank:02d}_pp_rank_00.pt"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's bytes within an open file: row-major, little-endian, rows along dim 0."""

    fd: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""  # the file's name, of an HF folder

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as bytes, uint8 (stop − start, row_bytes)."""
        block = np.empty((stop - start, self.row_bytes), dtype=np.uint8)
        self.read_into(start, block)
        return block

    def read_into(self, start: int, block: np.ndarray) -> None:
        """Fill `block`, contiguous uint8 (rows, row_bytes), with the rows from `start` on."""
        view, position = memoryview(block.data).cast("B"), self.offset + start * self.row_bytes
        while view:  # a read may be short
            count = os.preadv(self.fd, [view], position)
            if count == 0:
                raise UserError("a weight file became shorter while it was read: rerun the stage that writes it")
            view, position = view[count:], position + count

    def write_rows(self, start: int, block: np.ndarray) -> None:
        """Write bytes (rows, row_bytes) from row `start` on."""
        position = self.offset + start * self.row_bytes
        view = memoryview(np.ascontiguousarray(block).data).cast("B")
        while view:
            count = os.pwrite(self.fd, view, position)
            view, position = view[count:], position + count

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) as a tensor of its own."""
        stop = self.rows if stop is None else stop
        block = torch.from_numpy(self.read_rows(start, stop).reshape(-1))
        return block.view(self.dtype).view(stop - start, *self.shape[1:])


class HFCheckpoint:
    """The tensors of an HF folder (one safetensors file, or several with an index).

    where: what to call the folder in errors, if `folder` is not what the user knows; fix: how they end. Raises
    UserError naming the file for a missing, truncated or unreadable one, for tensors that are not dense floats, and for
    an index that does not agree with its files.
    """

    def __init__(self, folder: Path, where: str = "", fix: str = FETCH_AGAIN):
        self.where, self._fix = where or str(folder), fix
        self.stored: dict[str, StoredTensor] = {}
        index = read_index(folder / INDEX, f"{self.where}/{INDEX}", fix) if (folder / INDEX).exists() else None
        with contextlib.ExitStack() as opened:
            for name in sorted(set(index.values())) if index else [WEIGHTS]:
                self._add_file(opened, folder / name, f"{self.where}/{name}")
                for key in (key for key, file in (index or {}).items() if file == name):
                    if key not in self.stored or self.stored[key].file != name:
                        raise UserError(f"{self.where}/{name} has no tensor {key}, which its {INDEX} says{fix}")
            self._open = opened.pop_all()

    def _add_file(self, opened: contextlib.ExitStack, path: Path, where: str) -> None:
        if not path.is_file() and path.name != WEIGHTS:
            raise UserError(f"{where} is missing, which its {INDEX} lists{self._fix}")
        header = read_header(path, where, self._fix)
        file = opened.enter_context(path.open("rb", buffering=0))
        for key, entry in header.items():
            if entry.dtype not in SAFETENSORS_DTYPES:
                raise UserError(f"{where}: {key} is {entry.dtype}, not a dense float: fetch another model")
            if key in self.stored:
                raise UserError(f"{where}: {key} is in {self.stored[key].file} too{self._fix}")
            dtype = SAFETENSORS_DTYPES[entry.dtype]
            self.stored[key] = StoredTensor(file.fileno(), entry.offset, dtype, entry.shape, path.name)

    def __enter__(self) -> "HFCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def __getitem__(self, key: str) -> StoredTensor:
        if key not in self.stored:
            raise UserError(f"{self.where} has no tensor {key}{self._fix}")
        return self.stored[key]


def stored_bytes(specs: Specs) -> int:
    """Size in bytes of tensors of these shapes and dtypes."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def copy_all_but_weights(model: Path, target: Path) -> None:
    """Copy an HF folder's config, tokenizer and chat template to `target`."""
    for file in sorted(model.iterdir()):
        if not file.name.startswith("model") and file.name != SUMS:
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def create_safetensors(path: Path, specs: Specs) -> Iterator[dict[str, StoredTensor]]:
    """Create a safetensors file with room for tensors of these shapes and dtypes, to be written in place."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (shape, dtype) in specs.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format allows spaces; tensors then begin at a multiple of 8
    with path.open("w+b", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        yield {
            key: StoredTensor(file.fileno(), 8 + len(text) + header[key]["data_offsets"][0], dtype, shape)
            for key, (shape, dtype) in specs.items()
        }
        os.fsync(file.fileno())


@contextlib.contextmanager
def create_hf_folder(folder: Path, specs: Specs) -> Iterator[dict[str, StoredTensor]]:
    """Create a model's safetensors in `folder`, to be written in place: one file, or files of at most 5 GB and an
    index, as transformers' save_pretrained names and splits them."""
    files: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    filled = 0
    for key, (shape, dtype) in specs.items():
        size = math.prod(shape) * dtype.itemsize
        if filled + size > MAX_FILE_BYTES and files[-1]:
            files.append({})
            filled = 0
        files[-1][key] = (shape, dtype)
        filled += size
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [WEIGHTS]
    else:
        weight_map = {key: name for name, keys in zip(names, files, strict=True) for key in keys}
        index = {"metadata": {"total_size": stored_bytes(specs)}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    with contextlib.ExitStack() as stack:
        stored: dict[str, StoredTensor] = {}
        for name, keys in zip(names, files, strict=True):
            stored.update(stack.enter_context(create_safetensors(folder / name, keys)))
        yield stored


@contextlib.contextmanager
def create_rank_file(path: Path, specs: Specs) -> Iterator[dict[str, StoredTensor]]:
    """Create what `torch.save` writes for a flat dict of tensors, with room for the data, to be written in place.

    The zip's checksums of the data stay 0; torch does not look at them (it is built without miniz's CRC check).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.serialization.skip_data():  # the tensors' memory is never touched, so it costs none
        torch.save({name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in specs.items()}, path)
    with path.open("r+b", buffering=0) as file:
        yield _stored_tensors(path, file.fileno())
        os.fsync(file.fileno())


@contextlib.contextmanager
def open_rank_file(path: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of one rank's file, for reading in place. Raises UserError as `load_rank` does."""
    _check_exists(path)
    with path.open("rb", buffering=0) as file:
        yield _stored_tensors(path, file.fileno())


def _stored_tensors(path: Path, fd: int) -> dict[str, StoredTensor]:
    with FakeTensorMode():  # reads the pickle alone, and where each storage lies
        tensors = _load(path)
    stored = {}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.is_neg():
            raise UserError(f"{path}: {name} is a view of another tensor: save a contiguous copy of it")
        begin = int(tensor.untyped_storage()._checkpoint_offset or 0) + int(tensor.storage_offset()) * tensor.itemsize
        stored[name] = StoredTensor(fd, begin, tensor.dtype, tuple(tensor.shape))
    return stored


def save_rank(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one rank's flat dict of tensors atomically."""
    with atomic_file(path) as partial:
        torch.save(dict(tensors), partial)


def load_rank(path: Path) -> dict[str, torch.Tensor]:
    """Read one rank's flat dict of tensors, mapped from the file, so that untouched tensors cost no memory.

    Raises UserError naming the file when it is missing, cut short or holds anything but dense float tensors by name.
    """
    _check_exists(path)
    return _load(path, mmap=True)


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing: run the stage that writes it (`dvc repro`)")


def _load(path: Path, mmap: bool | None = None) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError … for the same broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # its text names an option that would run the file's code
            reason = "it is damaged, or holds more than tensors"
        raise UserError(f"{path} cannot be read ({reason}): rerun the stage that writes it (`dvc repro`)") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in tensors.items()
    ):
        raise UserError(f"{path} is not a flat dict of tensors, so it is not an NxD checkpoint of this pipeline")
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES.values() or tensor.layout is not torch.strided:
            raise UserError(f"{path}: {name} is {tensor.dtype}, {tensor.layout}, not a dense float tensor")
        if tensor.is_meta:  # so are those of files in torch's old format, in `_stored_tensors`
            raise UserError(f"{path}: {name} has no values in torch's present format: save it again with torch.save")
    return tensors
