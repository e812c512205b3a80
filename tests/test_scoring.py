"""Scores, compared with values calculated by hand."""

import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trnlora.evaluation import scoring


def test_rouge_by_hand() -> None:
    # unigrams: 2 of 3 and 2 of 4 in common; bigrams: 1 of 2 and 1 of 3; longest common subsequence: 2
    found = scoring.rouge(["the cat sat"], ["The cat ran fast."])
    assert found == pytest.approx({"rouge1": 4 / 7, "rouge2": 2 / 5, "rougeL": 4 / 7})


def test_rouge_is_the_mean_over_answers() -> None:
    assert scoring.rouge(["yes", "no"], ["yes", "perhaps"])["rouge1"] == 0.5


def test_rouge_l_depends_on_the_order_and_rouge_1_does_not() -> None:
    found = scoring.rouge(["b a"], ["a b"])
    assert found == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.5}


def test_rouge_reads_non_latin_scripts() -> None:
    found = scoring.rouge(["서울은 수도이다"], ["서울은 한국의 수도이다"])
    assert found["rouge1"] == pytest.approx(0.8)  # P 2/2, R 2/3


def test_bleu_by_hand() -> None:
    # precisions 4/5, 3/4, 2/3, 1/2; same length, so no brevity penalty
    assert scoring.bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(0.2**0.25)


def test_bleu_sums_counts_over_the_corpus() -> None:
    # 1-grams 9/10, 2-grams 7/8, 3-grams 5/6, 4-grams 3/4
    found = scoring.bleu(["a b c d e", "a b c d f"], ["a b c d f", "a b c d f"])
    assert found == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)


def test_bleu_penalizes_brevity() -> None:
    assert scoring.bleu(["a b c d"], ["a b c d e f g h"]) == pytest.approx(0.36787944)  # exp(1 - 8/4)


def test_bleu_without_a_common_4_gram_is_small_and_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < scoring.bleu(["a b c x"], ["a b c y"]) < 0.5
        assert scoring.bleu(["x"], ["y"]) == 0.0


def test_chrf_by_hand() -> None:
    # order 1: P 1, R 2/3, F2 = 5/7; order 2: P 1, R 1/2, F2 = 5/9; order 3: nothing in common
    assert scoring.chrf(["ab"], ["abc"]) == pytest.approx((5 / 7 + 5 / 9) / 3)


def test_chrf_of_a_short_correct_answer_is_1() -> None:
    assert scoring.chrf(["no"], ["no"]) == pytest.approx(1)
    assert scoring.chrf(["n o"], ["no"]) == pytest.approx(1)  # whitespace does not count


@pytest.mark.parametrize(
    ("answer", "reference", "exact"),
    [(" yes\n", "yes", True), ("Yes", "yes", False), ("yes.", "yes", False), ("a  b", "a b", False), ("", "a", False)],
)
def test_exact_match(answer: str, reference: str, exact: bool) -> None:
    assert scoring.is_exact(answer, reference) is exact
    assert scoring.exact_match([answer, "z"], [reference, "z"]) == (1 + exact) / 2


def test_exact_match_by_category() -> None:
    found = scoring.exact_match_by_category(["1", "x", "3", "4"], ["1", "2", "3", "4"], ["b", "b", "b", "a"])
    assert list(found.items()) == [("a", 1.0), ("b", pytest.approx(2 / 3))]


def test_fractions_and_length() -> None:
    assert scoring.truncated_fraction(["stop", "length", "length", None]) == 0.5
    assert scoring.changed_fraction(["a", "b", "c", "d"], ["a\n", "b", "c", "e"]) == 0.25
    assert scoring.scores(["one two", "three"], ["x", "y"])["response_words"] == 1.5


def test_lists_of_different_lengths_are_refused() -> None:
    for score in (scoring.rouge, scoring.chrf, scoring.exact_match, scoring.changed_fraction):
        with pytest.raises(ValueError, match="zip"):
            score(["a"], ["a", "b"])


@given(st.lists(st.tuples(st.text(max_size=20), st.text(min_size=1, max_size=20)), min_size=1, max_size=4))
def test_all_scores_are_between_0_and_1(pairs: list[tuple[str, str]]) -> None:
    answers, references = map(list, zip(*pairs, strict=True))
    found = scoring.scores(answers, references)
    del found["response_words"]
    assert all(0 <= value <= 1 + 1e-9 for value in found.values()), found


def test_the_import_loads_no_model_library() -> None:
    libraries = ("torch", "transformers", "vllm")
    code = f"import sys, trnlora.evaluation.scoring; print([m for m in {libraries} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
