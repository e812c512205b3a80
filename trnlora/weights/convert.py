"""An HF folder as NxD's shards, and back: which files are written, how much space they need, the progress shown."""

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from trnlora.errors import UserError, known_name
from trnlora.files import atomic_dir
from trnlora.model.config import ModelConfig
from trnlora.model.tensors import hf_shapes
from trnlora.params import Convert
from trnlora.weights.nxd_layout import shard_shapes, shard_slices
from trnlora.weights.reshard import each_block, gather, kv_order, scatter, slices_of_hf_tensors
from trnlora.weights.storage import (
    PRETRAINED_TAG,
    HFCheckpoint,
    StoredTensor,
    copy_all_but_weights,
    create_hf_folder,
    create_rank_file,
    open_rank_file,
    rank_file,
    stored_bytes,
)

GIB = 2**30


def write_shards(model: Path, shards: Path, config: ModelConfig, convert: Convert) -> int:
    """Write every rank's file below `shards` from the HF folder `model`. Returns the number of bytes written.

    Raises UserError when the disk has too little space, or when the HF folder is damaged.
    """
    tables = [shard_slices(config, convert, rank) for rank in range(convert.tp_size)]
    with HFCheckpoint(model) as source, contextlib.ExitStack() as files:
        specs = [
            {
                name: (shape, source[tables[rank][name][0].hf_key].dtype)
                for name, shape in shard_shapes(config, convert, rank).items()
            }
            for rank in range(convert.tp_size)
        ]
        size = sum(stored_bytes(spec) for spec in specs)
        check_space(shards, size)
        ranks = [
            files.enter_context(create_rank_file(rank_file(shards, PRETRAINED_TAG, rank), spec))
            for rank, spec in enumerate(specs)
        ]
        slices = slices_of_hf_tensors(tables, ranks)

        def move(name: str, tensor: StoredTensor, first: int, block: np.ndarray) -> int:
            tensor.read_into(first, block)
            return scatter(block, first, slices[name])

        blocks = each_block({name: source[name] for name in slices}, move, convert.buffer_mib * 2**20)
        show_progress(blocks, size, "writing shards")
    return size


def write_hf_folder(shards: Path, model: Path, folder: Path, config: ModelConfig, convert: Convert) -> None:
    """Write the shards below `shards` as the HF folder `folder`, with the config and tokenizer of `model`.

    Raises UserError when the shards are not of this model and `convert`, when their KV heads are not in the order of
    convert.hw_backend, when ranks that must hold equal values differ, or when the disk has too little space.
    """
    with contextlib.ExitStack() as files:
        ranks = [
            files.enter_context(open_rank_file(rank_file(shards, PRETRAINED_TAG, rank)))
            for rank in range(convert.tp_size)
        ]
        for rank, tensors in enumerate(ranks):
            _check_rank(rank_file(shards, PRETRAINED_TAG, rank), tensors, shard_shapes(config, convert, rank), ranks[0])
        order = kv_order(ranks, config, convert)
        if order != convert.hw_backend:
            raise UserError(
                f"the KV heads in {shards} are in {order}'s order, but convert.hw_backend is {convert.hw_backend}: "
                "NxD's converter writes such shards for trn2, where they give wrong logits; convert the HF folder again"
            )
        slices = slices_of_hf_tensors([shard_slices(config, convert, rank) for rank in range(convert.tp_size)], ranks)
        specs = {name: (shape, slices[name][0].tensor.dtype) for name, shape in hf_shapes(config).items()}
        size = stored_bytes(specs)
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_space(folder, size)
        with atomic_dir(folder) as partial:
            copy_all_but_weights(model, partial)
            target = files.enter_context(create_hf_folder(partial, specs))

            def move(name: str, tensor: StoredTensor, first: int, block: np.ndarray) -> int:
                gather(block, first, slices[name])
                tensor.write_rows(first, block)
                return block.size

            show_progress(each_block(target, move, convert.buffer_mib * 2**20), size, "writing HF folder")


def _check_rank(
    file: Path,
    tensors: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    first: Mapping[str, StoredTensor],
) -> None:
    """Raise UserError unless a rank has the tensors of `shapes`, in the dtypes of the `first` rank."""
    for name, shape in shapes.items():
        found = tensors[name].shape if name in tensors else "none"
        if found != shape:
            raise UserError(
                f"{file}: {name} has the shape {found}, expected {shape}: these are shards of another model"
            )
        if tensors[name].dtype != first[name].dtype:
            raise UserError(f"{file}: {name} is {tensors[name].dtype}, on the first rank {first[name].dtype}")


def check_space(target: Path, size: int) -> None:
    """Raise UserError unless the disk of `target` has `size` bytes free, and a little more."""
    free = shutil.disk_usage(target.parent).free
    if free < size * 1.01 + 2**20:
        name = known_name(target)
        raise UserError(f"{name} needs {size / GIB:.1f} GiB and its disk has {free / GIB:.1f} GiB free: free some")


def show_progress(counts: Iterable[int], total: int, title: str) -> None:
    """Consume `counts` (bytes done by each block) behind a progress bar; without a terminal, one line at the end."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [
        TextColumn(title), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total)
        for count in counts:
            bar.advance(task, count)
