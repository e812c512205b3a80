"""Scores of answers against references. Pure functions of strings: no model, no download, fast to import.

nltk's METEOR, `word_tokenize` and `sent_tokenize` need data files and are not used; `wordpunct_tokenize` is a regular
expression. Every score is in 0..1, higher is better.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from nltk.tokenize import wordpunct_tokenize
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from nltk.translate.chrf_score import sentence_chrf
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
CHRF_ORDER = 6


class WordTokenizer(Tokenizer):
    """Lower-cased runs of letters and digits of any script.

    On ASCII text these are the tokens of rouge-score's own tokenizer. That one drops all other characters, so a correct
    answer in Korean would score 0.
    """

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L f-measure, without stemming. Keys: rouge1, rouge2, rougeL."""
    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=WordTokenizer())
    rows = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: fmean(row[name].fmeasure for row in rows) for name in ROUGE_TYPES}


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 over wordpunct tokens: n-gram counts are summed over all answers before the precisions are taken.

    An order without any match counts as 0.1 matches (method 1 of Chen and Cherry 2014), so a model without a single
    common 4-gram gets a small score instead of 0 and a warning.
    """
    return float(
        corpus_bleu(
            [[wordpunct_tokenize(reference)] for reference in references],
            [wordpunct_tokenize(answer) for answer in answers],
            smoothing_function=SmoothingFunction().method1,
        )
    )


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean over the answers of chrF2: character n-grams up to 6, recall weighted twice, whitespace ignored.

    Orders above the reference's length are ignored. nltk counts them as 0, and a correct "no" would score 0.33.
    """
    return fmean(
        sentence_chrf(reference, answer, max_len=min(CHRF_ORDER, len("".join(reference.split())) or 1), beta=2.0)
        for answer, reference in zip(answers, references, strict=True)
    )


def is_exact(answer: str, reference: str) -> bool:
    """Equal character by character after `str.strip()` of both: case, punctuation and inner spaces count."""
    return answer.strip() == reference.strip()


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers that `is_exact`."""
    return fmean(is_exact(answer, reference) for answer, reference in zip(answers, references, strict=True))


def exact_match_by_category(
    answers: Sequence[str], references: Sequence[str], categories: Sequence[str]
) -> dict[str, float]:
    """`exact_match` within each category; categories in alphabetical order."""
    hits = defaultdict(list)
    for answer, reference, category in zip(answers, references, categories, strict=True):
        hits[category].append(is_exact(answer, reference))
    return {category: fmean(hits[category]) for category in sorted(hits)}


def scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """All of the above except the categories, and the mean length of an answer in whitespace-separated words.

    Keys: rouge1, rouge2, rougeL, bleu, chrf, exact_match, response_words.
    """
    return {
        **rouge(answers, references),
        "bleu": bleu(answers, references),
        "chrf": chrf(answers, references),
        "exact_match": exact_match(answers, references),
        "response_words": fmean(len(answer.split()) for answer in answers),
    }


def truncated_fraction(finish_reasons: Sequence[str | None]) -> float:
    """Fraction of answers that ended at `eval.max_tokens` instead of the end-of-sequence token."""
    return fmean(reason == "length" for reason in finish_reasons)


def changed_fraction(before: Sequence[str], after: Sequence[str]) -> float:
    """Fraction of answers that differ, compared as `is_exact` does."""
    return fmean(not is_exact(b, a) for b, a in zip(before, after, strict=True))
