"""Checkpoint files: HF folders of safetensors read slice by slice, and NxD's one file a rank."""

import contextlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from trnlora.errors import UserError
from trnlora.files import atomic_file, read_json
from trnlora.layout import Piece

PRETRAINED_TAG = "pretrained_weight"  # nxd.load_checkpoint(path, tag="pretrained_weight")
LORA_TAG = "lora"  # nxd.save_checkpoint(path, tag="lora")


def rank_file(folder: Path, tag: str, tp_rank: int) -> Path:
    """NxD's path of one rank's tensors: <folder>/<tag>/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt."""
    return folder / tag / "model" / f"dp_rank_00_tp_rank_{tp_rank:02d}_pp_rank_00.pt"


class HFCheckpoint:
    """The tensors of an HF folder (one safetensors file, or several with an index), read only where asked.

    Raises UserError naming the file for a missing, truncated or unreadable one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open = contextlib.ExitStack()
        index = folder / "model.safetensors.index.json"
        files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
        self._file_of: dict[str, safe_open] = {}
        for name in files:
            path = folder / name
            check_safetensors(path)
            file = self._open.enter_context(safe_open(path, framework="pt"))
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> "HFCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def keys(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, key: str) -> list[int]:
        return self._slice(key).get_shape()

    def read(self, piece: Piece) -> torch.Tensor:
        """The piece as a tensor, in the file's dtype."""
        whole = self._slice(piece.hf_key)
        if piece.dim is None:
            return whole[:]
        return whole[piece.start : piece.stop] if piece.dim == 0 else whole[:, piece.start : piece.stop]

    def assemble(self, pieces: list[Piece]) -> torch.Tensor:
        """One NxD tensor: its pieces, concatenated along their dim; contiguous, with storage of its own."""
        parts = [self.read(piece) for piece in pieces]
        return (torch.cat(parts, dim=pieces[0].dim or 0) if len(parts) > 1 else parts[0]).contiguous()

    def _slice(self, key: str):  # type: ignore[no-untyped-def]  # safetensors exports no type for it
        if key not in self._file_of:
            raise UserError(f"{self.folder} has no tensor {key}: fetch the model again (`dvc repro -f fetch_model`)")
        return self._file_of[key].get_slice(key)


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is there and as long as its header says.

    Raises UserError otherwise. The format: an 8-byte little-endian header length, the JSON header, the data.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: fetch the model again (`dvc repro -f fetch_model`)")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        try:
            (header_size,) = struct.unpack("<Q", prefix)
            header = json.loads(file.read(header_size) if header_size < size else b"")
            end = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} has no readable safetensors header: fetch the model again") from None
    if size != 8 + header_size + end:
        raise UserError(f"{path} has {size} bytes where its header says {8 + header_size + end}: fetch the model again")


def save_rank(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one rank's flat dict of tensors, whole or not at all."""
    with atomic_file(path) as partial:
        torch.save(dict(tensors), partial)


def load_rank(path: Path) -> dict[str, torch.Tensor]:
    """Read one rank's flat dict of tensors, mapped from the file, so that untouched tensors cost no memory.

    Raises UserError naming the file when it is missing, cut short or holds anything but tensors.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: run the stage that writes it (`dvc repro`)")
    try:
        tensors = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError … for the same broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): delete it and run `dvc repro`") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a flat dict of tensors: it is no NxD checkpoint of this pipeline")
    return tensors
