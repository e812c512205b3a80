"""The tokens of a batch that its loss depends on, and of those with the same hidden states one.

A token's hidden states depend only on its position and on the tokens before it in its document. So documents that begin
with the same tokens, such as a prompt template's first lines, have the same hidden states there: they are computed
once, and the gradients of all add up. And nothing depends on the tokens after a document's last labelled one, such as
the end of an answer.
"""

import dataclasses
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class NeededTokens:
    """The K different tokens that the loss of a batch (B, T) depends on, and P tokens of padding.

    places (K + P,): the K's in the flattened batch, ascending, then P times that of the first one. documents: for each
    document with a labelled token, which of the K its needed tokens are, in its order; the padding is the last one.
    """

    places: Tensor
    documents: list[list[int]]
    padding: int


def needed_tokens(
    input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, labelled: Tensor, multiple: int = 1
) -> NeededTokens | None:
    """Find them in a batch of four (B, T) tensors, of which document 0 is padding. None if no token is needed.

    labelled: bool, whether a position predicts a token that is trained on. From a document's first such position on,
    tokens are not compared, so that each labelled position is among the K. multiple: K + P is one of it.
    """
    columns = [column.flatten().tolist() for column in (input_ids, position_ids, labelled)]
    known: dict[tuple[int, int, int], int] = {}  # the token before (−1: none), id, position → which of the K
    places: list[int] = []
    documents: list[list[int]] = []
    for start, stop, document in document_runs(document_ids):
        ids, positions, marks = (column[start:stop] for column in columns)
        if document == 0 or True not in marks:
            continue
        tokens: list[int] = []
        first_label = marks.index(True)
        before = -1
        for offset in range(len(marks) - marks[::-1].index(True)):
            new = len(places)
            key = (before, ids[offset], positions[offset])
            before = known.setdefault(key, new) if offset < first_label else new
            if before == new:
                places.append(start + offset)
            tokens.append(before)
        documents.append(tokens)
    if not places:
        return None
    padding = -len(places) % multiple
    if padding:
        documents.append(list(range(len(places), len(places) + padding)))
        places += places[:1] * padding
    return NeededTokens(torch.tensor(places, device=input_ids.device), documents, padding)


def document_runs(document_ids: Tensor) -> Iterator[tuple[int, int, int]]:
    """Where each document of a batch (B, T) starts and stops in the flattened batch, and its id."""
    row_length = document_ids.shape[1]
    places = enumerate(document_ids.flatten().tolist())
    for (_, document), run in groupby(places, lambda item: (item[0] // row_length, item[1])):
        start, *others = (place for place, _ in run)
        yield start, start + 1 + len(others), document
