"""The steps of stages/prepare_data.py: choose the rows, encode them, write the splits; and what it prints.

All of it is a function of the file and the params: two runs write the same bytes, whatever the number of processes.

The file may be larger than the memory. It is read twice, in chunks of whole lines that processes share: once for what
splitting needs to know of each row, once to tokenize. Token ids wait in a temporary file until they are packed.
"""

import contextlib
import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trnlora.data.encode import JSONL_SPLITS, ChunkTask, Counts, EncodedChunk, RowEncoder, chunk_tasks
from trnlora.data.examples import row_name
from trnlora.data.packing import DocumentStore, pack, write_parquet
from trnlora.data.rows import RowsFile, chunks, file_table, read_rows
from trnlora.data.split import (
    SPLIT_CODES,
    copies_of_row,
    keep_categories,
    prompts_of_test_rows,
    read_split_keys,
    split_of_row,
    split_rows,
    with_near_prompts,
    without_duplicates,
)
from trnlora.data.statistics import STATISTICS_ROWS, response_statistics
from trnlora.data.tokenizer import padding_token_id
from trnlora.data.workers import map_in_order, worker_count
from trnlora.errors import UserError
from trnlora.params import Data


@dataclass(frozen=True)
class ChosenRows:
    """Which rows of the files are used, and in which split. Small beside the files: two bytes per row."""

    files: list[RowsFile]
    rows_read: int
    empty: list[int]  # ids of rows that have a turn without text, and are not used
    duplicates: int  # rows whose prompt and answer an earlier row has
    of_test_prompts: list[int]  # ids of rows that are not trained on because a test row has their prompt
    shared_prompts: int  # how many such prompts there are
    split_codes: bytes  # split.split_of_row
    copies: bytes  # split.copies_of_row

    def rows_in(self, split: str) -> int:
        return self.split_codes.count(SPLIT_CODES[split])


@dataclass
class EncodedSplit:
    """The encoded documents of a split, and counts over them."""

    documents: DocumentStore
    categories: Counter[str] = field(default_factory=Counter)
    responses: list[str] = field(default_factory=list)  # the first STATISTICS_ROWS
    counts: Counts = field(default_factory=Counts)

    def add(self, chunk: EncodedChunk) -> None:
        self.documents.add(chunk.documents, chunk.tokens)
        self.categories += chunk.categories
        self.responses += chunk.responses[: STATISTICS_ROWS - len(self.responses)]
        self.counts.dropped += chunk.counts.dropped
        self.counts.truncated += chunk.counts.truncated
        self.counts.with_special_tokens += chunk.counts.with_special_tokens
        self.counts.unreachable += chunk.counts.unreachable


def choose_rows(files: list[RowsFile], params: Data) -> ChosenRows:
    """Read all rows of the files and divide those of data.categories into splits.

    Raises UserError for a row that cannot be read, and where a column `split` has rows with one prompt in train and in
    test, unless params.deduplicate leaves them out of train.
    """
    read = read_split_keys(files, params.seed)
    chosen = keep_categories(read, params.categories)
    kept = with_near_prompts([key for key in chosen if not key.is_empty])
    if not kept:
        raise UserError(f"all {len(chosen)} rows have a turn without text")
    duplicates = len(kept) - len(without_duplicates(kept))
    shared = prompts_of_test_rows(kept)
    if shared and not params.deduplicate:
        table = file_table(files)
        some = "; ".join(
            f"{row_name(table, a)} as {row_name(table, b)}" for a, b in itertools.islice(shared.items(), 3)
        )
        raise UserError(
            f"{len(shared)} train rows have the prompt of a test row, perhaps with other white space or case, so that "
            f"scores would say little: {some}. Change the column split, or set data.deduplicate: true, which leaves "
            "them out of train"
        )
    keys = [key for key in kept if key.id not in shared]
    keys = without_duplicates(keys) if params.deduplicate else keys
    splits = split_rows(keys, params.test_fraction, params.validation_fraction)
    last = read[-1].id
    return ChosenRows(
        files=files,
        rows_read=len(read),
        empty=[key.id for key in chosen if key.is_empty],
        duplicates=duplicates,
        of_test_prompts=list(shared),
        shared_prompts=len({key.test_hash for key in kept if key.id in shared}),
        split_codes=split_of_row(splits, last),
        copies=copies_of_row(splits["train"], files, last),
    )


def encode_all(chosen: ChosenRows, encoder: RowEncoder, out: Path) -> dict[str, EncodedSplit]:
    """Encode all chosen rows, by split; write out/<split>.jsonl on the way.

    Raises UserError if a split has no row that fits into seq_len.
    """
    splits = {split: EncodedSplit(DocumentStore(out)) for split in SPLIT_CODES}
    tasks: list[ChunkTask] = chunk_tasks(chosen.files, chosen.split_codes)
    with contextlib.ExitStack() as stack:
        jsonl = {
            split: stack.enter_context((out / f"{split}.jsonl").open("w", encoding="utf-8")) for split in JSONL_SPLITS
        }
        for encoded in stack.enter_context(map_in_order(encoder.encode_chunk, tasks, worker_count(chosen.files))):
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


def write_splits(
    splits: dict[str, EncodedSplit], chosen: ChosenRows, encoder: RowEncoder, params: Data, out: Path
) -> dict[str, Any]:
    """Write out/train.parquet and out/validation.parquet, and return the counts of all splits, by split."""
    pad_token_id = padding_token_id(encoder.tokenizer)
    counts: dict[str, Any] = {}
    for split, members in splits.items():
        documents = members.documents
        numbers = np.arange(len(documents))
        if split == "train":
            numbers = np.repeat(numbers, np.frombuffer(chosen.copies, np.uint8)[documents.ids])
            if not len(numbers):
                raise UserError("no train row that fits into data.seq_len is used: raise it, or weight in data.source")
        lengths = documents.lengths[numbers]
        tokens = int(lengths.sum())
        labelled = int(documents.labelled[numbers].sum())
        counts[split] = {"rows": len(numbers), "tokens": tokens, "labelled_tokens": labelled}
        if split != "test":  # the test rows are asked one by one, in evaluation
            packed = pack(documents, numbers, lengths, params.seq_len, pad_token_id, params.packing, params.seed)
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
        "rows_empty": len(chosen.empty),
        "rows_dropped": sum(split.counts.dropped for split in members),
        "rows_truncated": sum(split.counts.truncated for split in members),
        "rows_with_special_tokens": sum(len(split.counts.with_special_tokens) for split in members),
        "unreachable_references": sum(len(split.counts.unreachable) for split in members),
        "duplicate_rows": chosen.duplicates,
        "prompts_in_train_and_test": chosen.shared_prompts,
        **counts,
        "labels_per_row": percentiles(np.concatenate([split.documents.labelled for split in members])),
        "rows_by_category": dict(sorted(categories.items())),
        "responses": response_statistics(responses[:STATISTICS_ROWS]),
    }


def percentiles(values: np.ndarray) -> dict[str, int]:
    """The 50th, 90th and 99th percentile and the largest of some numbers."""
    return {f"p{share}": int(np.percentile(values, share, method="lower")) for share in (50, 90, 99)} | {
        "max": int(values.max())
    }


def print_examples(chosen: ChosenRows, encoder: RowEncoder, number: int) -> None:
    """Print the first `number` training examples, decoded from their token ids: what is seen is what is trained on.

    What has no labels is dim, and what has is bold green; without colors, it stands in ⟦ ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    left, right = ("", "") if console.color_system else ("⟦", "⟧")
    for chunk in (chunk for file in chosen.files for chunk in chunks(file)):
        rows = [row for row in read_rows(chunk) if chosen.split_codes[row.id] == SPLIT_CODES["train"]]
        examples, _ = encoder.encode(rows[:number], chunk.file.row_name)
        for example in examples:
            name, masked = chunk.file.row_name(example.id), len(example) - example.labels
            console.rule(f"{name} · {example.row.category} · {masked} masked, {example.labels} labelled")
            text, done = Text(style="dim"), 0
            for start, end in example.labelled:
                text.append(encoder.tokenizer.decode(example.tokens[done:start]))
                text.append(
                    left + encoder.tokenizer.decode(example.tokens[start:end]) + right, style="not dim bold green"
                )
                done = end
            console.print(text, soft_wrap=True)
        number -= len(examples)
        if not number:
            return


def source_warnings(chosen: ChosenRows) -> list[str]:
    """What to say of sources whose `rows` or `weight` has no effect."""
    lines = []
    codes = np.frombuffer(chosen.split_codes, np.uint8)
    ends = [file.offset for file in chosen.files[1:]] + [len(codes) - 1]
    train: Counter[int] = Counter()
    for file, end in zip(chosen.files, ends, strict=True):
        train[file.source] += int((codes[file.offset + 1 : end + 1] == SPLIT_CODES["train"]).sum())
    for file in {file.source: file for file in chosen.files}.values():
        rows = train[file.source]
        if file.rows is not None and file.rows > rows:
            lines.append(
                f"data.source: the source of {file.shown} has {rows} train rows, not the {file.rows} of `rows`"
            )
        elif not rows and file.weight != 1:
            lines.append(
                f"data.source: the source of {file.shown} has no train rows, to which its weight {file.weight} applies"
            )
    return lines


def print_counts(metrics: dict[str, Any]) -> None:
    """Print a few lines of what `dataset_metrics` counted."""
    for split in SPLIT_CODES:
        counts = metrics[split]
        line = f"{split}: {counts['rows']} rows, {counts['tokens']} tokens, {counts['labelled_tokens']} labelled"
        if "packed_rows" in counts:
            line += f", packed into {counts['packed_rows']} rows with {counts['padding_fraction']:.1%} padding"
        print(line)
    print(f"longer than data.seq_len: {metrics['rows_dropped']} dropped, {metrics['rows_truncated']} truncated")


def print_warnings(chosen: ChosenRows, splits: dict[str, EncodedSplit], params: Data) -> None:
    """Print what is probably not meant: duplicate rows, test prompts that are also trained on, and so on."""

    def first(ids: list[int]) -> str:
        return f"the first are {', '.join(row_name(table, id) for id in ids[:3])}"

    table = file_table(chosen.files)

    special = sorted(id for split in splits.values() for id in split.counts.with_special_tokens)
    unreachable = sorted(id for split in splits.values() for id in split.counts.unreachable)
    if chosen.empty:
        print(f"warning: {len(chosen.empty)} rows have a turn without text and are left out; {first(chosen.empty)}")
    if chosen.duplicates and not params.deduplicate:
        print(f"warning: {chosen.duplicates} rows repeat an earlier row's prompt and answer: see data.deduplicate")
    if chosen.of_test_prompts:
        print(
            f"warning: {len(chosen.of_test_prompts)} train rows are left out, since test rows have their prompts; "
            f"{first(chosen.of_test_prompts)}"
        )
    for line in source_warnings(chosen):
        print(f"warning: {line}")
    if special:
        print(
            f"warning: {len(special)} rows spell a special token (data.special_tokens: {params.special_tokens}); "
            f"{first(special)}"
        )
    if unreachable:
        print(
            f"warning: {len(unreachable)} answers come back from the tokenizer as other text, without special tokens "
            f"or with other characters, so that no model's answer can match them; {first(unreachable)}"
        )
