"""Only the tokens that a loss needs are computed, and what documents begin with in common once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import lora_params
from support.sharded import conversion, sharded_gradients

from trnlora.backends import torch as torch_backend
from trnlora.backends.torch import TorchBackend
from trnlora.model.decoder import IGNORED, next_tokens
from trnlora.model.needed_tokens import needed_tokens

DOCUMENTS = st.lists(
    st.tuples(st.lists(st.integers(1, 2), min_size=1, max_size=9), st.integers(0, 9), st.integers(0, 9)),
    min_size=1, max_size=4,
)  # fmt: skip


def batch_of(rows: list[list[tuple[list[int], int, int]]], length: int = 40) -> dict[str, torch.Tensor]:
    """Packed rows of documents: ids, the place of the first labelled token, and that after the last one."""
    batch = {name: torch.zeros((len(rows), length), dtype=torch.int64) for name in ("input_ids", "position_ids")}
    batch["document_ids"], batch["labels"] = batch["input_ids"].clone(), torch.full((len(rows), length), IGNORED)
    for row, documents in enumerate(rows):
        start = 0
        for number, (ids, label_from, label_to) in enumerate(documents, 1):
            places = slice(start, start + len(ids))
            batch["input_ids"][row, places] = torch.tensor(ids)
            batch["position_ids"][row, places] = torch.arange(len(ids))
            batch["document_ids"][row, places] = number
            first, last = start + max(1, label_from), start + min(label_to, len(ids))
            batch["labels"][row, first:last] = batch["input_ids"][row, first:last]
            start += len(ids)
    return batch


def needed(batch: dict[str, torch.Tensor], multiple: int = 1):  # type: ignore[no-untyped-def]
    labelled = next_tokens(batch["labels"]) != IGNORED
    ids, positions, documents = (batch[name] for name in ("input_ids", "position_ids", "document_ids"))
    return needed_tokens(ids, positions, documents, labelled, multiple), labelled


def test_a_beginning_is_shared_up_to_the_first_label_and_nothing_follows_the_last() -> None:
    prompt = [7, 8, 9]
    batch = batch_of([[([*prompt, 4, 5], 4, 5), ([*prompt, 6, 5, 5], 3, 4)], [([7, 8, 5], 0, 0), ([7, 8, 4], 2, 3)]])
    found, _ = needed(batch)
    # Row 0: 7 8 9 4 (which predicts 5), then 7 8 again, and 9, which predicts 6.
    # Row 1: nothing, then 7 of row 0, and 8, which predicts 4.
    assert found is not None
    assert found.documents == [[0, 1, 2, 3], [0, 1, 4], [0, 5]]
    assert found.places.tolist() == [0, 1, 2, 3, 7, 44]


def test_nothing_is_needed_without_labels() -> None:
    assert needed(batch_of([[([1, 2, 3], 0, 0)]]))[0] is None
    assert needed(batch_of([[]]), multiple=16)[0] is None


@pytest.mark.parametrize(("multiple", "padding"), [(1, 0), (3, 0), (4, 2), (16, 10)])
def test_padding_is_a_document_of_its_own(multiple: int, padding: int) -> None:
    found, _ = needed(batch_of([[([7, 8, 9, 5, 5], 2, 4), ([7, 6, 5, 5], 1, 4)]]), multiple)
    assert found.padding == padding
    assert found.places.tolist() == [0, 1, 2, 5, 6, 7] + [0] * padding
    assert found.documents[:2] == [[0, 1, 2], [3, 4, 5]]
    assert found.documents[2:] == ([list(range(6, 6 + padding))] if padding else [])


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(DOCUMENTS, min_size=1, max_size=3))
def test_each_needed_token_has_its_documents_tokens_before_it(rows: list[list[tuple[list[int], int, int]]]) -> None:
    batch = batch_of(rows)
    found, labelled = needed(batch)
    if found is None:
        assert not labelled.any()
        return
    ids, kept = batch["input_ids"].flatten(), labelled.flatten()[found.places]
    assert kept.sum() == labelled.sum()
    assert found.places.tolist() == sorted(set(found.places.tolist()))
    wanted = []
    for row in range(len(rows)):
        for number in range(1, len(rows[row]) + 1):
            places = (batch["document_ids"][row] == number).nonzero().flatten()
            marks = labelled[row, places]
            if marks.any():
                wanted.append(batch["input_ids"][row, places][: int(marks.nonzero().max()) + 1].tolist())
    assert [ids[found.places[document]].tolist() for document in found.documents] == wanted
    assert {token for document in found.documents for token in document} == set(range(len(found.places)))


@pytest.mark.parametrize("row_multiple", [1, 16])
@pytest.mark.parametrize("first_is_labelled", [False, True])  # whose place is that of the padding
@pytest.mark.parametrize(("tp_size", "multiplier"), [(1, 1), (3, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_and_its_gradients_are_those_of_all_tokens(
    tiny_llama: Path, tp_size: int, multiplier: int, seed: int, first_is_labelled: bool, row_multiple: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(1, 1536, (12,), generator=generator).tolist()

    def document() -> tuple[list[int], int, int]:
        own = torch.randint(1, 4, (8,), generator=generator).tolist()  # so some agree for longer
        begins = int(torch.randint(3, 12, (), generator=generator))
        return [*prompt[:begins], *own], begins + 2, begins + 6

    first = [([3, 2, 1], 1, 3)] if first_is_labelled else []
    batch = batch_of([first + [document() for _ in range(3)] for _ in range(2)], length=64)
    arguments = (tiny_llama, conversion(tp_size, multiplier), lora_params(target_modules="all-linear"), batch)
    expected, _, all_gradients = sharded_gradients(*arguments)
    loss, _, gradients = sharded_gradients(*arguments, only_needed=True, row_multiple=row_multiple)
    found, labelled = needed(batch)
    assert labelled[0, 0] == first_is_labelled
    assert len(found.places) % 16
    assert len(found.places) < 0.8 * sum(map(len, found.documents))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for rank, own in enumerate(all_gradients):
        for name, gradient in own.items():
            assert (gradients[rank][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_all_products_have_a_multiple_of_rows(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all needed tokens, and in the last layer and the head those of the labelled ones."""
    rows: list[int] = []

    def record(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(x.shape[:-1].numel())
        return lora_linear(x, *rest)

    def record_head(self: TorchBackend, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return cross_entropy(self, hidden, *rest)

    lora_linear, cross_entropy = torch_backend.lora_linear, TorchBackend.cross_entropy
    monkeypatch.setattr(torch_backend, "lora_linear", record)
    monkeypatch.setattr(TorchBackend, "cross_entropy", record_head)
    batch = batch_of([[(list(range(1, 40)), 30, 37), (list(range(50, 70)), 3, 9)]], length=64)
    lora = lora_params(target_modules="all-linear")
    for multiple, expected in ((1, {36 + 8, 7 + 6}), (16, {48, 16})):
        rows.clear()
        sharded_gradients(tiny_llama, conversion(1, 1), lora, batch, only_needed=True, row_multiple=multiple)
        assert set(rows) == expected
