"""The answers as the report shows them: differences to the reference marked, and the filters that each passes."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trnlora.data.examples import Answer
from trnlora.reporting.results import Results

MAX_ANSWERS = 400  # on the page; of more, this many at even distances

# By (base answer exact, tuned answer exact)
OUTCOMES = {
    (False, True): "wrong → right",
    (True, False): "right → wrong",
    (True, True): "right → right",
    (False, False): "wrong → wrong",
}
CUT_OFF = {"base": "base cut off", "tuned": "tuned cut off"}


@dataclass(frozen=True)
class AnswerRow:
    """A test row on the page. Texts in HTML are markupsafe.Markup."""

    answer: Answer
    outcome: str  # one of OUTCOMES
    tags: list[str]  # the filters that it passes, its outcome first
    reference_html: Any  # marked: what the tuned answer lacks
    base_html: Any  # marked: what is not in the reference
    tuned_html: Any  # likewise
    others: list[tuple[str, str, Any]]  # (run, its tuned answer, the same in HTML) where that differs from this run's


def answer_rows(now: Results, others: Sequence[Results]) -> list[AnswerRow]:
    """The rows of the page, at most MAX_ANSWERS."""
    answers = now.answers or []
    if len(answers) > MAX_ANSWERS:
        answers = [answers[i * len(answers) // MAX_ANSWERS] for i in range(MAX_ANSWERS)]
    by_run = [(other.name, {answer["id"]: answer["tuned"] for answer in other.answers or []}) for other in others]
    return [
        _row(answer, [(name, tuned[answer["id"]]) for name, tuned in by_run if answer["id"] in tuned])
        for answer in answers
    ]


def _row(answer: Answer, others: list[tuple[str, str]]) -> AnswerRow:
    """others: (run, its tuned answer to the same row)."""
    reference = answer["reference"]
    outcome = OUTCOMES[answer["base_exact"], answer["tuned_exact"]]
    tags = [outcome]
    if answer["base_finish_reason"] == "length":
        tags.append(CUT_OFF["base"])
    if answer["tuned_finish_reason"] == "length":
        tags.append(CUT_OFF["tuned"])
    others = [(name, text) for name, text in others if text.strip() != answer["tuned"].strip()]
    tags += [f"differs from {name}" for name, _ in others]
    reference_html, tuned_html = marked(reference, answer["tuned"])
    return AnswerRow(
        answer=answer,
        outcome=outcome,
        tags=tags,
        reference_html=reference_html,
        base_html=marked(reference, answer["base"])[1],
        tuned_html=tuned_html,
        others=[(name, text, marked(reference, text)[1]) for name, text in others],
    )


def marked(reference: str, answer: str) -> tuple[Any, Any]:
    """Both texts as HTML, compared word by word.

    In the reference, <mark class=lacks> is what the answer lacks; in the answer, <mark class=wrong> is what the
    reference does not have.
    """
    from markupsafe import Markup, escape

    def mark(words: list[str], css: str) -> Any:
        return Markup("<mark class={}>{}</mark>").format(css, "".join(words)) if words else ""

    ours, theirs = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (reference, answer))
    left, right = Markup(), Markup()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        left += escape("".join(ours[a:b])) if kind == "equal" else mark(ours[a:b], "lacks")
        right += escape("".join(theirs[c:d])) if kind == "equal" else mark(theirs[c:d], "wrong")
    return left, right


def count_tags(rows: list[AnswerRow]) -> list[tuple[str, int]]:
    """(filter, number of rows that pass it), the filters that every report has first."""
    tags = [tag for row in rows for tag in row.tags]
    known = [*OUTCOMES.values(), *CUT_OFF.values()]
    return [(tag, tags.count(tag)) for tag in [*known, *(tag for tag in dict.fromkeys(tags) if tag not in known)]]
