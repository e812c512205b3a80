"""The steps of stages/prepare_data.py: choose the rows, encode them, write the splits; and what it prints.

All of it is a function of the file and the params: two runs write the same bytes, whatever the number of processes.

The file may be larger than the memory. It is read twice, in chunks of whole lines that processes share: once for what
splitting needs to know of each row, once to tokenize. Token ids wait in a temporary file until they are packed.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trnlora.data.encode import JSONL_SPLITS, ChunkTask, EncodedChunk, Overlong, RowEncoder, chunk_tasks
from trnlora.data.packing import DocumentStore, pack, write_parquet
from trnlora.data.rows import chunks, read_jsonl_rows
from trnlora.data.split import SPLIT_CODES, keep_categories, read_split_keys, split_of_line, split_rows
from trnlora.data.statistics import STATISTICS_ROWS, response_statistics
from trnlora.data.tokenizer import padding_token_id
from trnlora.data.workers import map_in_order, worker_count
from trnlora.errors import UserError
from trnlora.params import Data


@dataclass(frozen=True)
class ChosenRows:
    """Which rows of a file are used, and in which split. Small beside the file: a byte per line."""

    path: Path
    rows_read: int
    split_codes: bytes  # split.split_of_line

    def rows_in(self, split: str) -> int:
        return self.split_codes.count(SPLIT_CODES[split])


@dataclass
class EncodedSplit:
    """The encoded documents of a split, and counts over them."""

    documents: DocumentStore
    categories: Counter[str] = field(default_factory=Counter)
    responses: list[str] = field(default_factory=list)  # the first STATISTICS_ROWS
    overlong: Overlong = field(default_factory=Overlong)

    def add(self, chunk: EncodedChunk) -> None:
        self.documents.add(chunk.documents, chunk.tokens)
        self.categories += chunk.categories
        self.responses += chunk.responses[: STATISTICS_ROWS - len(self.responses)]
        self.overlong.dropped += chunk.overlong.dropped
        self.overlong.truncated += chunk.overlong.truncated


def choose_rows(path: Path, params: Data) -> ChosenRows:
    """Read all rows of a file and divide those of data.categories into splits."""
    keys = read_split_keys(path, params.seed)
    splits = split_rows(keep_categories(keys, params.categories), params.test_fraction, params.validation_fraction)
    return ChosenRows(path, len(keys), split_of_line(splits, keys[-1].line))


def encode_all(chosen: ChosenRows, encoder: RowEncoder, out: Path) -> dict[str, EncodedSplit]:
    """Encode all chosen rows, by split; write out/<split>.jsonl on the way.

    Raises UserError if a split has no row that fits into seq_len.
    """
    splits = {split: EncodedSplit(DocumentStore(out)) for split in SPLIT_CODES}
    tasks: list[ChunkTask] = chunk_tasks(chosen.path, chosen.split_codes)
    with contextlib.ExitStack() as stack:
        jsonl = {
            split: stack.enter_context((out / f"{split}.jsonl").open("w", encoding="utf-8")) for split in JSONL_SPLITS
        }
        for encoded in stack.enter_context(map_in_order(encoder.encode_chunk, tasks, worker_count(chosen.path))):
            for split, chunk in encoded.items():
                splits[split].add(chunk)
                if split in jsonl:
                    jsonl[split].write(chunk.jsonl)
    for split, members in splits.items():
        members.documents.finish()
        if not members.documents:
            raise UserError(
                f"all {chosen.rows_in(split)} {split} rows exceed data.seq_len {encoder.seq_len} tokens: raise it"
            )
    return splits


def write_splits(splits: dict[str, EncodedSplit], encoder: RowEncoder, params: Data, out: Path) -> dict[str, Any]:
    """Write out/train.parquet and out/validation.parquet, and return the counts of all splits, by split."""
    pad_token_id = padding_token_id(encoder.tokenizer)
    counts: dict[str, Any] = {}
    for split, members in splits.items():
        documents = members.documents
        lengths = documents.lengths
        tokens = int(lengths.sum())
        counts[split] = {"rows": len(documents), "tokens": tokens, "labelled_tokens": documents.labelled_tokens}
        if split != "test":  # the test rows are asked one by one, in evaluation
            packed = pack(documents, lengths, params.seq_len, pad_token_id, params.packing, params.seed)
            rows = write_parquet(out / f"{split}.parquet", packed)
            counts[split] |= {
                "packed_rows": rows,
                "padding_fraction": round(1 - tokens / (rows * params.seq_len), 4),
            }
    return counts


def dataset_metrics(chosen: ChosenRows, splits: dict[str, EncodedSplit], counts: dict[str, Any]) -> dict[str, Any]:
    """What metrics/prepare_data.json holds. `counts`: what `write_splits` returned."""
    members = splits.values()
    categories = sum((split.categories for split in members), Counter())
    responses = [response for split in members for response in split.responses]
    return {
        "rows_read": chosen.rows_read,
        "rows_dropped": sum(split.overlong.dropped for split in members),
        "rows_truncated": sum(split.overlong.truncated for split in members),
        **counts,
        "rows_by_category": dict(sorted(categories.items())),
        "responses": response_statistics(responses[:STATISTICS_ROWS]),
    }


def print_examples(chosen: ChosenRows, encoder: RowEncoder, number: int) -> None:
    """Print the first `number` training examples, decoded from their token ids: what is seen is what is trained on.

    The prompt, which has no labels, is dim and the response bold green; without colors, the response stands in ⟦ ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    left, right = ("", "") if console.color_system else ("⟦", "⟧")
    for chunk in chunks(chosen.path):
        rows = [
            row for row in read_jsonl_rows(chosen.path, chunk) if chosen.split_codes[row.line] == SPLIT_CODES["train"]
        ]
        examples, _ = encoder.encode(rows[:number])
        for example in examples:
            prompt, response = len(example.prompt_ids), len(example.response_ids)
            console.rule(f"line {example.line} · {example.row.category} · {prompt} masked, {response} labelled")
            text = Text(encoder.tokenizer.decode(example.prompt_ids), style="dim")
            text.append(left + encoder.tokenizer.decode(example.response_ids) + right, style="not dim bold green")
            console.print(text, soft_wrap=True)
        number -= len(examples)
        if not number:
            return


def print_counts(metrics: dict[str, Any]) -> None:
    """Print a few lines of what `dataset_metrics` counted."""
    for split in SPLIT_CODES:
        counts = metrics[split]
        line = f"{split}: {counts['rows']} rows, {counts['tokens']} tokens, {counts['labelled_tokens']} labelled"
        if "packed_rows" in counts:
            line += f", packed into {counts['packed_rows']} rows with {counts['padding_fraction']:.1%} padding"
        print(line)
    print(f"longer than data.seq_len: {metrics['rows_dropped']} dropped, {metrics['rows_truncated']} truncated")
