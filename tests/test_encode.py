"""Rendering and tokenizing rows."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from trnlora.data import templates
from trnlora.data.encode import Overlong, RowEncoder
from trnlora.data.rows import Row, read_jsonl_rows
from trnlora.data.statistics import response_statistics


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def test_an_example_is_prompt_and_response_with_eos(tokenizer: Any) -> None:
    rows = read_jsonl_rows(ROOT / "data" / "tasks.jsonl")[:50]
    examples, overlong = RowEncoder(tokenizer, "dolly", 512, "drop").encode(rows)
    assert overlong == Overlong(0, 0)
    for one, its in zip(examples, rows, strict=True):
        assert one.row == its
        assert one.prompt == templates.render_prompt(tokenizer, "dolly", its.instruction, its.context)
        assert tokenizer.decode(one.prompt_ids + one.response_ids) == one.prompt + its.response + tokenizer.eos_token
        assert one.response_ids.count(tokenizer.eos_token_id) == 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(8, 40))
@settings(deadline=None)
def test_overlong_rows(tokenizer: Any, prompt: int, response: int, seq_len: int) -> None:
    one = Row(1, "a " * prompt, "", "b " * response, "talk", None)
    [whole], _ = RowEncoder(tokenizer, "dolly", 10_000, "drop").encode([one])
    fits, prompt_fits = len(whole) <= seq_len, len(whole.prompt_ids) < seq_len

    dropped, counts = RowEncoder(tokenizer, "dolly", seq_len, "drop").encode([one])
    assert dropped == ([whole] if fits else [])
    assert counts == Overlong(dropped=not fits)

    cut, counts = RowEncoder(tokenizer, "dolly", seq_len, "truncate").encode([one])
    assert counts == Overlong(dropped=not prompt_fits, truncated=prompt_fits and not fits)
    if prompt_fits:
        assert len(cut[0]) == min(seq_len, len(whole))
        assert cut[0].prompt_ids == whole.prompt_ids
        assert cut[0].response_ids == whole.response_ids[: seq_len - len(whole.prompt_ids)]
        assert cut[0].row == one  # the reference is not truncated
    else:
        assert cut == []


def test_response_statistics() -> None:
    responses = ["One two. Three four five!", "Six.", '{"qty":3}']
    assert response_statistics(responses) == {"mean_sentences": 1.333, "mean_words": 2.667}
