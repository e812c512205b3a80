"""Text that spells one of the tokenizer's special tokens, such as <|im_end|> in a question about chat templates.

A tokenizer turns such text into the token itself, so that data could end a turn or begin one. `as_text` tokenizes it as
the plain text that it is: a mark is put into it before the template is rendered, so that the special tokens that the
template writes can be told from it, and taken out again before it is tokenized.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from trnlora.data.formats import MARK, Message
from trnlora.errors import UserError


@functools.lru_cache(maxsize=1)  # reading a tokenizer's special tokens takes longer than encoding a row
def special_token_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """What finds the text of a special token, the longest of several; None if the tokenizer has none."""
    return _pattern(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


@functools.lru_cache(maxsize=1)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of the special tokens."""
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)


def added_token_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """The same for all added tokens: also those that are not special, as <think> in some tokenizers."""
    return _pattern(token.content for token in tokenizer.added_tokens_decoder.values())


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def has_special_tokens(pattern: re.Pattern[str] | None, messages: Sequence[Message]) -> bool:
    """Does a message spell a special token?"""
    return pattern is not None and any(pattern.search(text) for m in messages for text in (m.content, m.context))


def apply_policy(policy: str, tokenizer: Any, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages as they are to be rendered under data.special_tokens.

    as_text: with a mark behind the first character of every special token in them; `tokenize_marked` then keeps it
    text. refuse: raises UserError if there is one.
    """
    pattern = special_token_pattern(tokenizer)
    if policy == "keep" or pattern is None or not has_special_tokens(pattern, messages):
        return messages
    if policy == "refuse":
        raise UserError("it spells a special token of the tokenizer: remove it, or set data.special_tokens to as_text")
    return [
        message._replace(
            content=pattern.sub(_with_mark, message.content), context=pattern.sub(_with_mark, message.context)
        )
        for message in messages
    ]


def _with_mark(found: re.Match[str]) -> str:
    return found[0][0] + MARK + found[0][1:]


def tokenize_marked(tokenizer: Any, pattern: re.Pattern[str], text: str) -> list[int]:
    """The token ids of a text in which only unmarked special tokens are tokens.

    Raises UserError for a tokenizer that does not treat the text between special tokens by itself.
    """
    pieces: list[str] = []
    special: list[str] = []
    done = 0
    for match in pattern.finditer(text):
        pieces.append(text[done : match.start()])
        special.append(match[0])
        done = match.end()
    pieces.append(text[done:])
    if _joined(tokenizer, pieces, special) != tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise UserError(
            "data.special_tokens: as_text is not possible with this tokenizer, which treats text after a special token "
            "in a way of its own: set it to refuse or keep"
        )
    return _joined(tokenizer, [piece.replace(MARK, "") for piece in pieces], special)


def _joined(tokenizer: Any, pieces: Sequence[str], special: Sequence[str]) -> list[int]:
    """The ids of pieces of plain text, and of the special token behind each but the last."""
    ids: list[int] = []
    for piece, token in zip(pieces, [*special, None], strict=True):
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if token is not None:
            ids.append(tokenizer.convert_tokens_to_ids(token))
    return ids
