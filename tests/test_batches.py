"""Global batches: every row once per epoch; all labelled tokens of a step have the same weight."""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trnlora.errors import UserError
from trnlora.training.batches import COLUMNS, MicroBatches, epoch_order, read_packed_rows


@given(
    rows=st.integers(1, 40), micro=st.integers(1, 3), dp_size=st.integers(1, 3), accumulate=st.integers(1, 3),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_replicas_and_micro_batches_add_up_to_the_global_batch(
    rows: int, micro: int, dp_size: int, accumulate: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.rand(rows, 6, generator=generator) < 0.5, 1, -100)
    table = {name: torch.arange(rows)[:, None].expand(rows, 6).clone() + 1 for name in COLUMNS} | {"labels": labels}
    order = epoch_order(rows, 0, seed)
    global_batch_size = micro * dp_size * accumulate
    replicas = [
        MicroBatches(
            table, order, global_batch_size=global_batch_size, micro_batch_size=micro, dp_rank=rank, dp_size=dp_size
        )
        for rank in range(dp_size)
    ]
    assert {len(replica) for replica in replicas} == {-(-rows // global_batch_size) * accumulate}
    seen: list[int] = []
    for step in range(len(replicas[0]) // accumulate):
        weight, step_rows = 0.0, []
        for item in range(step * accumulate, (step + 1) * accumulate):
            batches = [replica[item] for replica in replicas]
            tokens = sum(int((batch["document_ids"] > 0).sum()) for batch in batches)
            assert {batch["tokens"] for batch in batches} == {tokens}
            for batch in batches:
                weight += float((batch["labels"] != -100).sum() * batch["loss_scale"]) / accumulate
                step_rows += [int(row[0]) - 1 for row in batch["document_ids"] if row[0] > 0]
        expected = order[step * global_batch_size : (step + 1) * global_batch_size].tolist()
        assert sorted(step_rows) == sorted(expected)
        has_labels = bool((labels[expected] != -100).any())
        assert weight == pytest.approx(1.0 if has_labels else 0.0)
        seen += step_rows
    assert sorted(seen) == list(range(rows))


def test_padding_that_ends_all_rows_is_cut_off_unless_shapes_are_static() -> None:
    documents = torch.tensor([[1, 1, 2, 0, 0], [1, 0, 0, 0, 0], [1, 2, 2, 2, 0]])
    table = {name: documents.clone() for name in COLUMNS}
    batches = partial(MicroBatches, table, torch.arange(3), global_batch_size=2, micro_batch_size=2)
    cut, full = batches(), batches(static_shapes=True)
    assert [batch["input_ids"].tolist() for batch in (cut[0], cut[1])] == [
        [[1, 1, 2], [1, 0, 0]],
        [[1, 2, 2, 2], [1, 1, 2, 0]],
    ]
    assert cut[1]["document_ids"].tolist() == [[1, 2, 2, 2], [0, 0, 0, 0]]  # the second row is empty
    assert {column.shape for column in (full[0][name] for name in COLUMNS)} == {(2, 5)}


def test_each_epoch_has_its_own_reproducible_order() -> None:
    assert epoch_order(50, 0, 17).tolist() == epoch_order(50, 0, 17).tolist()
    assert epoch_order(50, 0, 17).tolist() != epoch_order(50, 1, 17).tolist()
    assert epoch_order(50, 0, 17).tolist() != epoch_order(50, 0, 18).tolist()


@pytest.mark.parametrize("content", [b"", b"PAR1 not parquet"], ids=["empty", "garbage"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet cannot be read"):
        read_packed_rows(path)


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    values = [[1, 2, 3], [4, 5, -100]]
    pq.write_table(pa.table({name: pa.array(values, pa.list_(pa.int32())) for name in COLUMNS}), path)
    rows = read_packed_rows(path)
    assert all(rows[name].tolist() == values and rows[name].dtype == torch.int64 for name in COLUMNS)
