"""Selecting rows by category and dividing them into splits."""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import question

from trnlora.data.formats import Row, detect
from trnlora.data.rows import RowsFile
from trnlora.data.split import (
    SplitKey,
    copies_of_row,
    keep_categories,
    prompts_of_test_rows,
    split_key,
    split_of_row,
    split_rows,
    with_near_prompts,
    without_duplicates,
)
from trnlora.errors import UserError


def row(number: int, category: str = "talk", split: str | None = None, prompt: int | None = None) -> Row:
    return question(number, f"Say {number if prompt is None else prompt}.", "", f"It is {number}.", category, split)


def keys(rows: Iterable[Row], seed: int = 17) -> list[SplitKey]:
    return [split_key(one, seed) for one in rows]


def test_categories() -> None:
    rows = keys([row(1, "talk"), row(2, "list"), row(3, "talk")])
    assert keep_categories(rows, None) == rows
    assert [kept.id for kept in keep_categories(rows, ["talk"])] == [1, 3]
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
    assert sorted(member.id for members in splits.values() for member in members) == list(range(len(rows)))
    assert all(members == sorted(members, key=lambda member: member.id) for members in splits.values())
    # No prompt is in two splits. The fractions refer to distinct prompts.
    prompts_of = {name: {prompts[member.id] for member in members} for name, members in splits.items()}
    assert not prompts_of["train"] & prompts_of["test"]
    assert not prompts_of["train"] & prompts_of["validation"]
    assert not prompts_of["validation"] & prompts_of["test"]
    distinct = len(set(prompts))
    assert len(prompts_of["test"]) == max(1, round(0.2 * distinct))
    assert len(prompts_of["validation"]) == max(1, round(0.25 * (distinct - len(prompts_of["test"]))))
    # The order of the rows does not matter.
    shuffled.shuffle(rows)
    again = split_rows(rows, 0.2, 0.25)
    assert {name: {member.id for member in members} for name, members in splits.items()} == {
        name: {member.id for member in members} for name, members in again.items()
    }


def test_the_seed_changes_what_is_drawn() -> None:
    rows = [row(number) for number in range(50)]
    splits = [split_rows(keys(rows, seed), 0.2, 0.2) for seed in (0, 0, 1)]
    drawn = [{name: [member.id for member in members] for name, members in one.items()} for one in splits]
    assert drawn[0] == drawn[1]
    assert drawn[0]["test"] != drawn[2]["test"]
    assert drawn[0]["validation"] != drawn[2]["validation"]


def test_the_column_split_is_respected() -> None:
    rows = keys(row(number, split="test" if number % 3 == 0 else "train") for number in range(30))
    splits = split_rows(rows, 0.9, 0.1)
    assert [member.id for member in splits["test"]] == list(range(0, 30, 3))
    assert len(splits["validation"]) == 2


def test_a_split_without_rows() -> None:
    with pytest.raises(UserError, match=r"no rows are left for the test split \(of 2\)"):
        split_rows(keys([row(1, split="train"), row(2, split="train")]), 0.2, 0.1)
    with pytest.raises(UserError, match=r"no rows are left for the train split \(of 1\)"):
        split_rows(keys([row(1)]), 0.2, 0.1)


def test_the_split_of_every_row() -> None:
    splits = {"train": keys([row(1), row(4)]), "validation": keys([row(2)]), "test": keys([row(5)])}
    assert split_of_row(splits, 6) == bytes([0, 1, 2, 0, 1, 3, 0])


def test_prompts_that_differ_in_white_space_and_case_stay_together() -> None:
    rows = [
        question(number, f"Say  A{number // 2}\n" if number % 2 else f"say a{number // 2}", "", f"{number}")
        for number in range(100)
    ]
    plain = keys(rows)
    near = with_near_prompts(plain)
    assert len({key.test_hash for key in near}) == 50
    splits = split_rows(near, 0.2, 0.2)
    for members in splits.values():
        assert all({key.id, key.id ^ 1} <= {each.id for each in members} for key in members)
    assert with_near_prompts(near[::-1])[::-1] == near  # whatever the order
    assert with_near_prompts(plain[::2]) == plain[::2]  # and nothing changes where no prompts are near


@pytest.mark.parametrize(
    ("prompt", "leaks"), [("1?", True), (" 1?\n", True), ("A B", True), ("a", False), ("1 ?", False)]
)
def test_train_rows_with_the_prompt_of_a_test_row(prompt: str, leaks: bool) -> None:
    rows = [
        question(1, prompt, "", "x", split="train"), question(2, "1?", "", "y", split="test"),
        question(3, "a b", "", "y", split="test"), question(4, "a", "context", "y", split="test"),
        question(5, "new", "", "y", split="train"),
    ]  # fmt: skip
    assert list(prompts_of_test_rows(with_near_prompts(keys(rows)))) == ([1] if leaks else [])


def test_a_weight_that_uses_no_row_is_refused() -> None:
    form = detect({"prompt": "", "completion": ""}, "auto", {}, "f line 1")
    file = RowsFile(Path("a.jsonl"), form, 0, "a.jsonl", "line", "", weight=0.01)
    with pytest.raises(UserError, match=r"weight 0.01 of the 10 training rows of a.jsonl uses none of them: raise it"):
        copies_of_row(keys(row(number) for number in range(1, 11)), [file], 10)


def test_rows_that_repeat_a_prompt_and_its_answer() -> None:
    rows = [question(1, "a", "", "b"), question(2, "a", "", "c"), question(3, "a", "", "b"), question(4, "a", "x", "b")]
    assert [key.id for key in without_duplicates(keys(rows))] == [1, 2, 4]


@pytest.mark.parametrize(
    ("weight", "rows", "copies"),
    [(1.0, None, [20]), (2.0, None, [0, 20]), (0.25, None, [5]), (2.5, None, [0, 10, 10]), (1.5, 10, [5, 5])],
)
def test_how_often_a_row_is_used(weight: float, rows: int | None, copies: list[int]) -> None:
    """copies: the number of rows of the source that are used once, twice, …"""
    form = detect({"prompt": "", "completion": ""}, "auto", {}, "f line 1")
    plain = RowsFile(Path("a.jsonl"), form, 0, "a.jsonl", "line", "", source=0)
    weighted = RowsFile(Path("b.jsonl"), form, 10, "b.jsonl", "line", "", source=1, weight=weight, rows=rows)
    train = keys(row(number) for number in range(1, 31))
    used = copies_of_row(train, [plain, weighted], 30)
    assert used[1:11] == bytes(10 * [1])
    assert [used[11:].count(times) for times in range(1, len(copies) + 1)] == copies
    assert used == copies_of_row(train[::-1], [plain, weighted], 30)  # drawn by the prompts, not by their order
