"""The loss of an adapter with HF + PEFT, in one process, one row per sequence."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from trnlora.backends.mkl import settle_vector_math
from trnlora.data.examples import PreparedExample

BATCH_TOKENS = 1024


def peft_loss(model: Path, adapter: Path, dtype: str, examples: Iterable[PreparedExample]) -> tuple[float, int]:
    """Mean cross-entropy in nats per labelled token of the examples, and the number of those tokens.

    model: an HF folder; adapter: a PEFT folder; dtype: that of params.model.
    """
    settle_vector_math()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    nats, labelled = 0.0, 0
    with torch.no_grad():
        for batch in track(batches(examples), description="scoring with HF + PEFT"):
            rows = [torch.tensor(example["token_ids"]) for example in batch]
            ids = pad_sequence(rows, batch_first=True)  # (B, T), padded on the right, where no label is
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits = tuned(ids, attention_mask=mask).logits
            for example, row, row_logits in zip(batch, rows, logits, strict=True):
                for start, end in example["labelled"]:
                    predicted = row_logits[start - 1 : end - 1].float()  # each position predicts the next token
                    nats += F.cross_entropy(predicted, row[start:end], reduction="sum").item()
                    labelled += end - start
    return nats / labelled, labelled


def batches(examples: Iterable[PreparedExample]) -> list[list[PreparedExample]]:
    """The examples sorted by length, in batches of at most BATCH_TOKENS with padding, which bounds the memory."""
    grouped: list[list[PreparedExample]] = [[]]
    for example in sorted(examples, key=_length):
        if grouped[-1] and _length(example) * (len(grouped[-1]) + 1) > BATCH_TOKENS:
            grouped.append([])
        grouped[-1].append(example)
    return grouped


def _length(example: PreparedExample) -> int:
    return len(example["token_ids"])
