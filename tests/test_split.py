"""Selecting rows by category and dividing them into splits."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trnlora.data.rows import Row
from trnlora.data.split import SplitKey, keep_categories, split_key, split_of_line, split_rows
from trnlora.errors import UserError


def row(number: int, category: str = "talk", split: str | None = None, prompt: int | None = None) -> Row:
    return Row(number, f"Say {number if prompt is None else prompt}.", "", f"It is {number}.", category, split)


def keys(rows: Iterable[Row], seed: int = 17) -> list[SplitKey]:
    return [split_key(one, seed) for one in rows]


def test_categories() -> None:
    rows = keys([row(1, "talk"), row(2, "list"), row(3, "talk")])
    assert keep_categories(rows, None) == rows
    assert [kept.line for kept in keep_categories(rows, ["talk"])] == [1, 3]
    with pytest.raises(UserError, match=r"^data\.categories: no row has lists, tlak; the rows have list, talk$"):
        keep_categories(rows, ["talk", "tlak", "lists"])
    with pytest.raises(UserError, match="the list is empty; null keeps all; the rows have list, talk"):
        keep_categories(rows, [])


@given(
    prompts=st.lists(st.integers(0, 40), min_size=12, max_size=60).filter(lambda prompts: len(set(prompts)) >= 8),
    seed=st.integers(0, 5),
    shuffled=st.randoms(use_true_random=False),
)
def test_a_drawn_split(prompts: list[int], seed: int, shuffled: random.Random) -> None:
    rows = keys((row(number, prompt=prompt) for number, prompt in enumerate(prompts)), seed)
    splits = split_rows(rows, 0.2, 0.25)
    # Each row once, in the order of the file.
    assert sorted(member.line for members in splits.values() for member in members) == list(range(len(rows)))
    assert all(members == sorted(members, key=lambda member: member.line) for members in splits.values())
    # No prompt is in two splits. The fractions refer to distinct prompts.
    prompts_of = {name: {prompts[member.line] for member in members} for name, members in splits.items()}
    assert not prompts_of["train"] & prompts_of["test"]
    assert not prompts_of["train"] & prompts_of["validation"]
    assert not prompts_of["validation"] & prompts_of["test"]
    distinct = len(set(prompts))
    assert len(prompts_of["test"]) == max(1, round(0.2 * distinct))
    assert len(prompts_of["validation"]) == max(1, round(0.25 * (distinct - len(prompts_of["test"]))))
    # The order of the rows does not matter.
    shuffled.shuffle(rows)
    again = split_rows(rows, 0.2, 0.25)
    assert {name: {member.line for member in members} for name, members in splits.items()} == {
        name: {member.line for member in members} for name, members in again.items()
    }


def test_the_seed_changes_what_is_drawn() -> None:
    rows = [row(number) for number in range(50)]
    splits = [split_rows(keys(rows, seed), 0.2, 0.2) for seed in (0, 0, 1)]
    drawn = [{name: [member.line for member in members] for name, members in one.items()} for one in splits]
    assert drawn[0] == drawn[1]
    assert drawn[0]["test"] != drawn[2]["test"]
    assert drawn[0]["validation"] != drawn[2]["validation"]


def test_the_column_split_is_respected() -> None:
    rows = keys(row(number, split="test" if number % 3 == 0 else "train") for number in range(30))
    splits = split_rows(rows, 0.9, 0.1)
    assert [member.line for member in splits["test"]] == list(range(0, 30, 3))
    assert len(splits["validation"]) == 2


def test_a_split_without_rows() -> None:
    with pytest.raises(UserError, match=r"no rows are left for the test split \(of 2\)"):
        split_rows(keys([row(1, split="train"), row(2, split="train")]), 0.2, 0.1)
    with pytest.raises(UserError, match=r"no rows are left for the train split \(of 1\)"):
        split_rows(keys([row(1)]), 0.2, 0.1)


def test_the_split_of_every_line() -> None:
    splits = {"train": keys([row(1), row(4)]), "validation": keys([row(2)]), "test": keys([row(5)])}
    assert split_of_line(splits, 6) == bytes([0, 1, 2, 0, 1, 3, 0])
