"""Checkpoint files: slices, both forms of an HF folder, and errors that name broken files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trnlora.errors import UserError
from trnlora.weights.storage import HFCheckpoint, load_rank, save_rank


def sharded(folder: Path) -> Path:
    """Split a folder's model.safetensors into two files with an index, as for large models on the hub."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def llama_folder(make_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return make_llama(tmp_path / "llama")


def test_slices_of_one_file_and_of_several_are_equal(llama_folder: Path) -> None:
    tensors = load_file(llama_folder / "model.safetensors")
    for folder in (llama_folder, sharded(llama_folder)):
        with HFCheckpoint(folder) as source:
            assert source.stored.keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert torch.equal(source[key].read(), tensor)
                assert torch.equal(source[key].read(1, 3), tensor[1:3])


def test_a_truncated_file_is_named(llama_folder: Path) -> None:
    path = llama_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        UserError, match=r"model\.safetensors is not a valid .* \(it has \d+ bytes where its header says \d"
    ):
        HFCheckpoint(llama_folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0[]"], ids=["empty", "garbage", "list"])
def test_a_file_without_a_header_is_named(llama_folder: Path, content: bytes) -> None:
    (llama_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        HFCheckpoint(llama_folder)


def test_an_index_naming_a_missing_file_is_named(llama_folder: Path) -> None:
    (sharded(llama_folder) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing"):
        HFCheckpoint(llama_folder)


def test_a_missing_tensor_is_named(llama_folder: Path) -> None:
    with HFCheckpoint(llama_folder) as source, pytest.raises(UserError, match=r"has no tensor lm_head\.weight"):
        source["lm_head.weight"]


def test_rank_files_are_complete_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "model" / "dp_rank_00_tp_rank_00_pp_rank_00.pt"
    with pytest.raises(UserError, match="is missing"):
        load_rank(path)
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_rank(path, tensors)
    loaded = load_rank(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"dp_rank_00_tp_rank_00_pp_rank_00\.pt cannot be read"):
        load_rank(path)
    torch.save({"a": [1, 2]}, path)
    with pytest.raises(UserError, match="not a flat dict of tensors"):
        load_rank(path)
