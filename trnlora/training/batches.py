"""Packed rows in the order of training, split into global batches, replicas and micro-batches."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trnlora.errors import UserError

COLUMNS = ("input_ids", "labels", "position_ids", "document_ids")


def read_packed_rows(path: Path) -> dict[str, Tensor]:
    """The columns of a packed parquet file, each as an int64 tensor (rows, seq_len).

    Raises UserError naming the file when it is missing, unreadable or not in prepare_data's format.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: run prepare_data (`dvc repro prepare_data`)")
    try:
        table = pq.read_table(path, columns=list(COLUMNS))
        lists = {name: table[name].combine_chunks() for name in COLUMNS}
        rows = {
            name: torch.from_numpy(column.flatten().to_numpy().astype("int64")).view(len(table), -1)
            for name, column in lists.items()
        }
    except Exception as error:  # pyarrow raises its own or Python's errors for a broken file
        raise UserError(f"{path} cannot be read ({error}): run `dvc repro -f prepare_data`") from None
    if len({tuple(column.shape) for column in rows.values()}) != 1:
        raise UserError(f"{path} has columns of different lengths: run `dvc repro -f prepare_data`")
    return rows


def row_ids(path: Path, packed_rows: list[int]) -> list[int]:
    """The ids of the rows of data in these rows of a packed parquet file: see `trnlora.data.rows.row_name`."""
    ids = pq.read_table(path, columns=["row_ids"])["row_ids"]
    return sorted(id for row in packed_rows for id in ids[row].as_py())


class MicroBatches(Dataset):
    """The micro-batches of one data-parallel replica for one epoch, as a dataset of ready batches.

    A global batch is `global_batch_size` rows. The last one is filled up with empty rows (without labels), so that
    every replica has the same number of micro-batches. Each item has the four columns (micro_batch_size, seq_len),
    `tokens` and `loss_scale`. tokens: their number in this micro-batch of all replicas, without padding. loss_scale:
    multiplied by it, the sums of token losses add up to the mean over the labelled tokens of the global batch, for any
    number of replicas and micro-batches. (A mean of means would weight a token by its row's length.) It also undoes
    Lightning's division by the number of accumulated batches.

    order: row indices, in the order of the epoch. static_shapes: keep the columns at their full length, for a graph
    compiled for that length; otherwise padding that ends all rows of a micro-batch is cut off. dtype: of the columns.
    """

    def __init__(
        self,
        rows: dict[str, Tensor],
        order: Tensor,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        static_shapes: bool = False,
        dtype: torch.dtype = torch.int64,
    ):
        self.rows = rows
        self.static_shapes = static_shapes
        self.dtype = dtype
        self.accumulate = global_batch_size // (micro_batch_size * dp_size)
        steps = -(-len(order) // global_batch_size)
        filled = torch.cat([order, order.new_full((steps * global_batch_size - len(order),), -1)])
        # (steps, accumulate, dp, micro): interleaved over the replicas, so that each gets some of the empty rows
        index = filled.view(steps, self.accumulate, dp_size, micro_batch_size)
        self.index = index[:, :, dp_rank]
        lengths = torch.cat([(rows["document_ids"] > 0).sum(1), torch.zeros(1, dtype=torch.long)])  # [-1]: empty
        self.tokens_of_micro_batch = lengths[index].sum((2, 3))
        labelled = torch.cat([(rows["labels"] != -100).sum(1), torch.zeros(1, dtype=torch.long)])
        self.tokens_of_step = labelled[filled].view(steps, -1).sum(1).clamp(min=1)

    def __len__(self) -> int:
        return self.index.shape[0] * self.index.shape[1]

    def __getitem__(self, item: int) -> dict[str, Any]:
        if item >= len(self):
            raise IndexError(item)
        step, micro = divmod(item, self.accumulate)
        index = self.index[step, micro]
        batch = {name: self.rows[name][index.clamp(min=0)].to(self.dtype, copy=True) for name in COLUMNS}
        batch["labels"][index < 0] = -100
        batch["document_ids"][index < 0] = 0
        if not self.static_shapes:
            longest = max(1, int((batch["document_ids"] > 0).sum(1).max()))
            batch = {name: column[:, :longest] for name, column in batch.items()}
        batch["loss_scale"] = self.accumulate / self.tokens_of_step[step]
        return {**batch, "tokens": int(self.tokens_of_micro_batch[step, micro])}


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Optimizer steps of an epoch of packed rows. The last step may have fewer rows than the others."""
    return -(-rows // global_batch_size)


def epoch_order(rows: int, epoch: int, seed: int) -> Tensor:
    """A permutation of the rows for one epoch. It depends only on the arguments, so a rerun has the same order."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(rows, generator=generator)
