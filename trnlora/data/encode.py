"""Rendering conversations with the prompt template and tokenizing them."""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from trnlora.data.examples import PreparedExample
from trnlora.data.formats import Message, Row
from trnlora.data.packing import with_labels
from trnlora.data.rows import Chunk, RowsFile, chunks, read_rows
from trnlora.data.special_tokens import MARK, apply_policy, has_special_tokens, special_ids, special_token_pattern
from trnlora.data.split import SPLIT_CODES
from trnlora.data.templates import Conversation, PromptTemplate, conversation, template_tokens, tokenize
from trnlora.errors import UserError

JSONL_SPLITS = ("validation", "test")  # written as JSONL too, for evaluation


@dataclass(frozen=True)
class Example:
    """A row, rendered and tokenized.

    messages: the row's, without turns that do not fit. prompt: the text up to the last answer. labelled: the spans
    (start, end) of `tokens` that are trained on, in order; the last one is the last answer, whose last token is EOS
    unless it is truncated.
    """

    row: Row
    messages: tuple[Message, ...]
    prompt: str
    tokens: list[int]
    labelled: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def id(self) -> int:
        return self.row.id

    @property
    def labels(self) -> int:
        """The number of tokens that are trained on."""
        return sum(end - start for start, end in self.labelled)


@dataclass
class Counts:
    """How many rows were longer than seq_len, by what was done with them; and the ids of special ones."""

    dropped: int = 0
    truncated: int = 0
    with_special_tokens: list[int] = field(default_factory=list)  # rows whose text spells a special token
    unreachable: list[int] = field(default_factory=list)  # whose reference is another text when it is decoded


@dataclass(frozen=True)
class ChunkTask:
    """A chunk of a file, and the `split_of_row` codes of its lines, the first of which is byte 0."""

    chunk: Chunk
    split_codes: bytes


@dataclass(frozen=True)
class EncodedChunk:
    """What a chunk adds to one split: the token ids of its documents end to end, their lengths, and counts."""

    documents: np.ndarray  # (documents, 3) int32: the row's id, number of tokens, number of tokens with a label
    tokens: np.ndarray  # (tokens of all documents,) int32, as `packing.with_labels` has them
    categories: Counter[str]
    responses: list[str]
    jsonl: str  # the examples as lines of JSON; empty unless the split is one of JSONL_SPLITS
    counts: Counts


@dataclass(frozen=True)
class RowEncoder:
    """Renders and tokenizes rows. Workers get a copy with the tokenizer when they start."""

    tokenizer: Any  # a Hugging Face tokenizer
    template: PromptTemplate
    seq_len: int
    overlong: Literal["drop", "truncate"]
    mask_history: bool  # labels on the last answer only
    special_tokens: Literal["refuse", "as_text", "keep"]
    _template_tokens: dict[Any, list[int]] = field(default_factory=dict, compare=False, repr=False)  # by shape

    def encode(
        self, rows: Sequence[Row], where: Callable[[int], str] = "row {}".format
    ) -> tuple[list[Example], Counts]:
        """Rows as examples; rows of more than `seq_len` tokens are dropped or truncated, and counted.

        `truncate` leaves out turns whose prompt does not fit, then cuts the end of the last answer, EOS included, so
        that the model is not taught to stop in mid-sentence. The answer stays whole as the reference for scores. A row
        whose first prompt alone fills seq_len has no token left to learn from and is dropped either way.

        where: what errors call the row with an id. Raises UserError for a template that loses text or does not separate
        turns, for the text of a special token where special_tokens is `refuse`, and for text that would become one all
        the same under `refuse` and `as_text`.
        """
        examples: list[Example] = []
        counts = Counts()
        if not rows:
            return examples, counts
        pattern = special_token_pattern(self.tokenizer)
        for row in rows:
            if has_special_tokens(pattern, row.messages):
                counts.with_special_tokens.append(row.id)
        rendered = []
        for row in rows:
            with _naming(row, where):
                rendered.append(self._conversation(row.messages))
        tokens = tokenize(self.tokenizer, [one.segments for one in rendered])
        answers = self.tokenizer.batch_decode(
            [ids[-1][:-1] for ids in tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for row, one, ids, answer in zip(rows, rendered, tokens, answers, strict=True):
            if answer.strip() != row.messages[-1].content.strip():
                counts.unreachable.append(row.id)
            with _naming(row, where):
                changed = self._changed_special_token(row.messages, itertools.chain.from_iterable(ids))
                if changed and self.special_tokens != "keep":
                    raise UserError(
                        f"its text would change the special tokens of the prompt ({changed}), which "
                        f"data.special_tokens: {self.special_tokens} does not allow: remove the row, or set it to keep"
                    )
                if changed and row.id not in counts.with_special_tokens:
                    counts.with_special_tokens.append(row.id)
                example: Example | None = self._example(row, row.messages, one, ids)
                if example and len(example) > self.seq_len:
                    example = self._truncated(example) if self.overlong == "truncate" else None
                    counts.truncated += example is not None
                    counts.dropped += example is None
            if example:
                examples.append(example)
        return examples, counts

    def _conversation(self, messages: Sequence[Message]) -> Conversation:
        return conversation(self.template, self.tokenizer, apply_policy(self.special_tokens, self.tokenizer, messages))

    def _changed_special_token(self, messages: Sequence[Message], tokens: Iterable[int]) -> str | None:
        """A special token that the text of a conversation has made or unmade among its tokens; None if there is none.

        Text becomes one where it spells it under `keep`, where the template puts two texts side by side that spell
        one together, and with a tokenizer that normalizes or has an unknown token. Of the added tokens that are not
        special, those that the template writes count.
        """
        shape = tuple((message.role, bool(message.context)) for message in messages)
        expected = self._template_tokens.get(shape)
        if expected is None:
            expected = self._template_tokens[shape] = template_tokens(self.template, self.tokenizer, shape)
        counted = special_ids(self.tokenizer).union(expected)
        found = [token for token in tokens if token in counted]
        if found == expected:
            return None
        ours, its = Counter(expected), Counter(found)
        changed = next((its - ours).elements(), None) or next((ours - its).elements(), found[0])
        return str(self.tokenizer.convert_ids_to_tokens(changed))

    def _example(
        self, row: Row, messages: tuple[Message, ...], rendered: Conversation, ids: list[list[int]]
    ) -> Example:
        ends = list(itertools.accumulate(map(len, ids)))
        parts = rendered.segments
        spans = [(end - len(i), end) for i, end, part in zip(ids, ends, parts, strict=True) if part.end is not None]
        tokens = list(itertools.chain.from_iterable(ids))
        if len(parts) > 2 and MARK not in rendered.prompt:
            together = self.tokenizer(rendered.prompt, add_special_tokens=False)["input_ids"]
            if together != tokens[: spans[-1][0]]:
                raise UserError(
                    "data.prompt_template and the tokenizer give other tokens turn by turn than for the whole "
                    "conversation, which the server tokenizes: choose another data.prompt_template"
                )
        prompt = rendered.prompt.replace(MARK, "")
        return Example(row, messages, prompt, tokens, spans[-1:] if self.mask_history else spans)

    def _truncated(self, example: Example) -> Example | None:
        messages = example.messages
        while example.labelled[-1][0] >= self.seq_len:
            messages = messages[:-2]
            if not any(message.role == "assistant" for message in messages):
                return None
            shorter = self._conversation(messages)
            example = self._example(example.row, messages, shorter, tokenize(self.tokenizer, [shorter.segments])[0])
        start, end = example.labelled[-1]
        spans = [*example.labelled[:-1], (start, min(end, self.seq_len))]
        return Example(example.row, messages, example.prompt, example.tokens[: self.seq_len], spans)

    def encode_chunk(self, task: ChunkTask) -> dict[str, EncodedChunk]:
        """Read a chunk and encode its rows, by split."""
        members: dict[int, list[Row]] = {code: [] for code in SPLIT_CODES.values()}
        for row in read_rows(task.chunk):
            if code := task.split_codes[row.id - task.chunk.first_id]:
                members[code].append(row)
        name = task.chunk.file.row_name
        return {
            split: _encoded_chunk(*self.encode(members[code], name), as_jsonl=split in JSONL_SPLITS)
            for split, code in SPLIT_CODES.items()
        }


@contextlib.contextmanager
def _naming(row: Row, where: Callable[[int], str]) -> Iterator[None]:
    """Put the row's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where(row.id)}: {error}") from None


def chunk_tasks(files: Sequence[RowsFile], split_codes: bytes) -> list[ChunkTask]:
    """A task for each chunk of the files. `split_codes`: what `split_of_row` returns for all of them."""
    found = [chunk for file in files for chunk in chunks(file)]
    ends = [chunk.first_id for chunk in found[1:]] + [len(split_codes)]
    return [ChunkTask(chunk, split_codes[chunk.first_id : end]) for chunk, end in zip(found, ends, strict=True)]


def _encoded_chunk(examples: list[Example], counts: Counts, as_jsonl: bool) -> EncodedChunk:
    lines = (json.dumps(prepared_example(example), ensure_ascii=False) + "\n" for example in examples)
    return EncodedChunk(
        documents=np.array([(one.id, len(one), one.labels) for one in examples], np.int32).reshape(-1, 3),
        tokens=np.concatenate([with_labels(example.tokens, example.labelled) for example in examples] or [_NONE]),
        categories=Counter(example.row.category for example in examples),
        responses=[turn.content for example in examples for turn in example.messages if turn.role == "assistant"],
        jsonl="".join(lines) if as_jsonl else "",
        counts=counts,
    )


_NONE = np.empty(0, np.int32)


def prepared_example(example: Example) -> PreparedExample:
    """An example as validation.jsonl and test.jsonl hold it."""
    return {
        "id": example.id,
        "category": example.row.category,
        "messages": [message._asdict() for message in example.messages],
        "prompt": example.prompt,
        "token_ids": example.tokens,
        "labelled": [list(span) for span in example.labelled],
    }
