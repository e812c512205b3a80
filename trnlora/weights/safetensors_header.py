"""The header of a safetensors file, checked: names, dtypes and shapes of its tensors, and where their bytes are.

The format: an 8-byte little-endian header length, the JSON header, the data. The `safetensors` library checks the
header's types and size, and that the tensors fill the data without overlaps and holes, each with the bytes of its shape
and dtype. It takes a name that is there twice (its last entry wins), which is refused here. Only the header is read, so
this is fast for files of any size. No torch.
"""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from trnlora.errors import UserError
from trnlora.readers import read_json_as, unique_keys

# Of an HF folder: its only weight file, or the index of several.
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class HeaderEntry(NamedTuple):
    """A tensor in a file."""

    dtype: str  # the format's name: F32, BF16, …
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def read_header(path: Path, where: str, fix: str) -> dict[str, HeaderEntry]:
    """The tensors of a safetensors file by name.

    where: the file, and fix: what to do, for errors. Raises UserError when the file is missing or not valid.
    """
    if not path.is_file():
        raise UserError(f"{where} is missing{fix}")
    size = path.stat().st_size
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        reason = _wrong_size(path, size) or str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{where} is not a valid safetensors file ({reason}){fix}") from None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_keys)
        except ValueError as error:
            raise UserError(f"{where} is not a valid safetensors file ({error}){fix}") from None
    return {
        name: HeaderEntry(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_index(path: Path, where: str, fix: str) -> dict[str, str]:
    """The files of a folder's tensors, from model.safetensors.index.json.

    Raises UserError for an index of other types, without tensors, or that names anything but files beside it.
    """
    index = read_json_as(path, dict[str, Any], fix, where)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{where} lists no weights in weight_map{fix}")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{where} has {name!r} for {key}, not the name of a safetensors file beside it{fix}")
    return weight_map


def _wrong_size(path: Path, size: int) -> str | None:
    """What is wrong with a file whose length is not what its header says; None if it is, or if that cannot be told."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length) if length < min(size, 10**8) else b"")
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            expected = 8 + length + end
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return None
    return None if expected == size else f"it has {size} bytes where its header says {expected}"
