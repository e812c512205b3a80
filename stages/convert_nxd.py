"""Convert the HF folder to NxD's tensor-parallel shards, and prove them: sharded logits equal HF's.

    python stages/convert_nxd.py [--params FILE]
    python stages/convert_nxd.py --to-hf DIR [--shards DIR] [--params FILE]    the way back, to a new HF folder

Reads   artifacts/model (HF folder)
Writes  artifacts/shards/pretrained_weight/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt, one file a rank,
        metrics/convert_nxd.json, metrics/timing/convert_nxd.json

`nxd.load_checkpoint("artifacts/shards", tag="pretrained_weight")` reads the result on Trainium. Weights are moved in
blocks of convert.buffer_mib and proved layer by layer, so memory does not grow with the model.
"""

import argparse
import contextlib
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from trnlora import paths
from trnlora.model.config import LlamaConfig
from trnlora.errors import UserError, run
from trnlora.files import SUMS, atomic_dir, check_sums, write_json, write_sums
from trnlora.weights.nxd_layout import check_divisible, shard_pieces
from trnlora.params import Convert, load_params

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, metavar="FILE")
    parser.add_argument("--to-hf", type=Path, metavar="DIR", help="write the shards back as an HF folder to DIR")
    parser.add_argument("--shards", type=Path, default=paths.SHARDS, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    convert = load_params(args.params).convert

    # The rules are checked before anything heavy is imported.
    config = LlamaConfig.from_folder(paths.MODEL)
    check_divisible(config, convert)
    if args.to_hf:
        to_hf(config, convert, args.shards, args.to_hf)
    else:
        to_nxd(config, convert)


def to_nxd(config: LlamaConfig, convert: Convert) -> None:
    import torch

    from trnlora.weights.storage import PRETRAINED_TAG, open_rank_file, rank_file
    from trnlora.weights.verify_logits import max_logits_difference

    started = time.perf_counter()
    # The proof below compares the shards with the very weights that they come from, so damage there would pass it.
    check_sums(paths.MODEL, "fetch_model")
    converting = time.perf_counter()
    with atomic_dir(paths.SHARDS) as partial:
        size = write_shards(paths.MODEL, partial, config, convert)
        convert_seconds = time.perf_counter() - converting
        print("checking the shards' logits against HF's", flush=True)
        ids = torch.randint(config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
        with contextlib.ExitStack() as files:
            ranks = [
                files.enter_context(open_rank_file(rank_file(partial, PRETRAINED_TAG, rank)))
                for rank in range(convert.tp_size)
            ]
            difference = max_logits_difference(paths.MODEL, config, ranks, convert.kv_size_multiplier, ids)
        if not difference <= convert.max_logits_diff:  # also when it is NaN
            raise UserError(
                f"the shards' logits differ from HF's by {difference:.3g}, above convert.max_logits_diff "
                f"{convert.max_logits_diff:g}: the shards were not kept; report this model's config"
            )
        write_sums(partial)

    metrics = {
        "logits_max_abs_diff": difference,
        "checked_tokens": ids.shape[1],
        "checked_layers": config.num_hidden_layers,
        "checked_vocabulary": config.vocab_size,
        "shards": convert.tp_size,
        "size_gib": size / GIB,
    }
    write_json(paths.METRICS / "convert_nxd.json", metrics)
    seconds = {"convert_seconds": convert_seconds, "seconds": time.perf_counter() - started}
    write_json(paths.METRICS / "timing" / "convert_nxd.json", seconds)
    print(f"{convert.tp_size} shards in {paths.SHARDS}, largest logit difference to HF {difference:.2g}")


def write_shards(model: Path, shards: Path, config: LlamaConfig, convert: Convert) -> int:
    """Write every rank's file below `shards` from the HF folder `model`; the bytes written."""
    import numpy as np

    from trnlora.weights.storage import PRETRAINED_TAG, HFCheckpoint, StoredTensor, create_rank_file, rank_file, stored_bytes
    from trnlora.weights.reshard import each_block, parts_of_hf_tensors, scatter

    tables = [shard_pieces(config, convert, rank) for rank in range(convert.tp_size)]
    with HFCheckpoint(model) as source, contextlib.ExitStack() as files:
        specs = [{name: source.spec(pieces) for name, pieces in table.items()} for table in tables]
        size = sum(stored_bytes(spec) for spec in specs)
        check_space(shards, size)
        ranks = [
            files.enter_context(create_rank_file(rank_file(shards, PRETRAINED_TAG, rank), spec))
            for rank, spec in enumerate(specs)
        ]
        parts = parts_of_hf_tensors(tables, ranks)

        def move(name: str, tensor: StoredTensor, first: int, block: np.ndarray) -> int:
            tensor.read_into(first, block)
            return scatter(block, first, parts[name])

        blocks = each_block({name: source[name] for name in parts}, move, convert.buffer_mib * 2**20)
        show_progress(blocks, size, "writing shards")
    return size


def to_hf(config: LlamaConfig, convert: Convert, shards: Path, folder: Path) -> None:
    """Write the shards below `shards` back as an HF folder, with the config and tokenizer of artifacts/model."""
    import numpy as np

    from trnlora.weights.storage import (
        PRETRAINED_TAG,
        StoredTensor,
        copy_all_but_weights,
        create_hf_folder,
        open_rank_file,
        rank_file,
        stored_bytes,
    )
    from trnlora.weights.nxd_layout import hf_shapes
    from trnlora.weights.reshard import each_block, gather, kv_order, parts_of_hf_tensors

    check_sums(paths.MODEL, "fetch_model", without=(".safetensors",))
    if (shards / SUMS).exists():  # shards of NxD's own converter have none
        check_sums(shards, "convert_nxd")
    with contextlib.ExitStack() as files:
        ranks = [
            files.enter_context(open_rank_file(rank_file(shards, PRETRAINED_TAG, rank)))
            for rank in range(convert.tp_size)
        ]
        order = kv_order(ranks, config, convert)
        if order != convert.hw_backend:
            raise UserError(
                f"the KV heads in {shards} are in {order}'s order, convert.hw_backend is {convert.hw_backend}: NxD's "
                "converter writes such shards for trn2 and they give wrong logits there; convert the HF folder anew"
            )
        tables = [shard_pieces(config, convert, rank) for rank in range(convert.tp_size)]
        parts = parts_of_hf_tensors(tables, ranks)
        dtype = next(iter(ranks[0].values())).dtype
        specs = {name: (shape, dtype) for name, shape in hf_shapes(config).items()}
        size = stored_bytes(specs)
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_space(folder, size)
        with atomic_dir(folder) as partial:
            copy_all_but_weights(paths.MODEL, partial)
            target = files.enter_context(create_hf_folder(partial, specs))

            def move(name: str, tensor: StoredTensor, first: int, block: np.ndarray) -> int:
                gather(block, first, parts[name])
                tensor.write_rows(first, block)
                return block.size

            show_progress(each_block(target, move, convert.buffer_mib * 2**20), size, "writing HF folder")
    print(f"HF folder in {folder}")


def check_space(target: Path, size: int) -> None:
    """Raise UserError when the disk of `target` has not `size` bytes, and a little more, free."""
    free = shutil.disk_usage(target.parent).free
    if free < size * 1.01 + 2**20:
        raise UserError(f"{target} needs {size / GIB:.1f} GiB and its disk has {free / GIB:.1f} GiB free: free some")


def show_progress(counts: Iterable[int], total: int, title: str) -> None:
    """Run through `counts` (bytes done by each block) with a bar; one line at the end where nobody watches."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [
        TextColumn(title), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn(),
    ]  # fmt: skip
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total)
        for count in counts:
            bar.advance(task, count)


if __name__ == "__main__":
    run(main)
