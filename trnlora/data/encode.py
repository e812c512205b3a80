"""Rendering rows with the prompt template and tokenizing them."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trnlora.data import templates
from trnlora.data.examples import PreparedExample
from trnlora.data.rows import Chunk, Row, chunks, read_jsonl_rows
from trnlora.data.split import SPLIT_CODES

JSONL_SPLITS = ("validation", "test")  # written as JSONL too, for evaluation


@dataclass(frozen=True)
class Example:
    """A row, rendered and tokenized. `response_ids` are the tokens with labels: EOS is the last unless truncated."""

    row: Row
    prompt: str
    prompt_ids: list[int]
    response_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def line(self) -> int:
        return self.row.line


@dataclass
class Overlong:
    """How many rows were longer than seq_len, by what was done with them."""

    dropped: int = 0
    truncated: int = 0


@dataclass(frozen=True)
class ChunkTask:
    """A chunk of a JSONL file, and the `split_of_line` codes of its lines, the first of which is byte 0."""

    path: Path
    chunk: Chunk
    split_codes: bytes


@dataclass(frozen=True)
class EncodedChunk:
    """What a chunk adds to one split: the token ids of its documents end to end, their lengths, and counts."""

    documents: np.ndarray  # (documents, 3) int32: line, number of prompt tokens, number of response tokens
    tokens: np.ndarray  # (tokens of all documents,) int32: prompt and response of each in turn
    categories: Counter[str]
    responses: list[str]
    jsonl: str  # the examples as lines of JSON; empty unless the split is one of JSONL_SPLITS
    overlong: Overlong


@dataclass(frozen=True)
class RowEncoder:
    """Renders and tokenizes rows. Workers get a copy with the tokenizer when they start."""

    tokenizer: Any  # a Hugging Face tokenizer
    template: str  # one of templates.NAMES
    seq_len: int
    overlong: Literal["drop", "truncate"]

    def encode(self, rows: list[Row]) -> tuple[list[Example], Overlong]:
        """Rows as examples; rows of more than `seq_len` tokens are dropped or truncated, and counted.

        `truncate` cuts the end of the response, EOS included, so that the model is not taught to stop in mid-sentence.
        The row keeps its whole text as the reference for scores. A row whose prompt alone fills seq_len has no token
        left to learn from and is dropped either way.
        """
        prompts = [templates.render_prompt(self.tokenizer, self.template, row.instruction, row.context) for row in rows]
        pairs = templates.tokenize_pair(self.tokenizer, prompts, [row.response for row in rows])
        examples, counts = [], Overlong()
        for row, prompt, (prompt_ids, response_ids) in zip(rows, prompts, pairs, strict=True):
            room = self.seq_len - len(prompt_ids)
            if len(response_ids) > room:
                if room <= 0 or self.overlong == "drop":
                    counts.dropped += 1
                    continue
                response_ids = response_ids[:room]
                counts.truncated += 1
            examples.append(Example(row, prompt, prompt_ids, response_ids))
        return examples, counts

    def encode_chunk(self, task: ChunkTask) -> dict[str, EncodedChunk]:
        """Read a chunk and encode its rows, by split."""
        members: dict[int, list[Row]] = {code: [] for code in SPLIT_CODES.values()}
        for row in read_jsonl_rows(task.path, task.chunk):
            if code := task.split_codes[row.line - task.chunk.line]:
                members[code].append(row)
        return {
            split: _encoded_chunk(*self.encode(members[code]), as_jsonl=split in JSONL_SPLITS)
            for split, code in SPLIT_CODES.items()
        }


def chunk_tasks(path: Path, split_codes: bytes) -> list[ChunkTask]:
    """A task for each chunk of a file. `split_codes`: what `split_of_line` returns for the whole file."""
    of_file = chunks(path)
    ends = [chunk.line for chunk in of_file[1:]] + [len(split_codes)]
    return [ChunkTask(path, chunk, split_codes[chunk.line : end]) for chunk, end in zip(of_file, ends, strict=True)]


def _encoded_chunk(examples: list[Example], overlong: Overlong, as_jsonl: bool) -> EncodedChunk:
    lengths = [(example.line, len(example.prompt_ids), len(example.response_ids)) for example in examples]
    tokens = itertools.chain.from_iterable(ids for one in examples for ids in (one.prompt_ids, one.response_ids))
    lines = (json.dumps(prepared_example(example), ensure_ascii=False) + "\n" for example in examples)
    return EncodedChunk(
        documents=np.array(lengths, np.int32).reshape(-1, 3),
        tokens=np.fromiter(tokens, np.int32),
        categories=Counter(example.row.category for example in examples),
        responses=[example.row.response for example in examples],
        jsonl="".join(lines) if as_jsonl else "",
        overlong=overlong,
    )


def prepared_example(example: Example) -> PreparedExample:
    """An example as validation.jsonl and test.jsonl hold it."""
    row = example.row
    return {
        "id": row.line,
        "category": row.category,
        "instruction": row.instruction,
        "context": row.context,
        "response": row.response,
        "prompt": example.prompt,
        "prompt_token_ids": example.prompt_ids,
        "response_token_ids": example.response_ids,
    }
