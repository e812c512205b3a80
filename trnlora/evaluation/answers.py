"""The models' answers to the test rows, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from trnlora.data.examples import Answer, PreparedExample, reference
from trnlora.evaluation import scoring
from trnlora.serving.engine import Completion

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """One model's evaluation: the base model's or the adapter's."""

    loss: float | None  # nats per labelled token of the validation rows; None: this engine gives none
    answers: list[Completion]  # in the order of the test rows
    seconds: float  # for all answers

    def texts(self) -> list[str]:
        return [answer.text for answer in self.answers]

    def metrics(self, rows: Sequence[PreparedExample]) -> dict[str, Any]:
        """The loss, if there is one, and the scores of the answers to `rows`; exact_match_by_category is nested."""
        references, categories = [reference(row) for row in rows], [row["category"] for row in rows]
        return {
            **({} if self.loss is None else {"loss": self.loss}),
            **scoring.scores(self.texts(), references),
            "response_tokens": fmean(answer.tokens for answer in self.answers),
            "truncated_fraction": scoring.truncated_fraction([answer.finish_reason for answer in self.answers]),
            "exact_match_by_category": scoring.exact_match_by_category(self.texts(), references, categories),
        }

    def speed(self) -> dict[str, float]:
        """Throughput of the answers, requests all at once."""
        return {
            "requests_per_s": len(self.answers) / self.seconds,
            "output_tokens_per_s": sum(answer.tokens for answer in self.answers) / self.seconds,
        }


def spread(rows: Sequence[T], count: int | None) -> list[T]:
    """`count` rows at even distances, so that a file sorted by category keeps its mix of categories; None: all."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def answer_rows(rows: Sequence[PreparedExample], base: Scored, tuned: Scored) -> list[Answer]:
    """The rows of artifacts/answers.jsonl."""
    return [
        {
            "id": row["id"],
            "category": row["category"],
            "prompt": row["prompt"],
            "reference": reference(row),
            "base": of_base.text,
            "tuned": of_tuned.text,
            "base_exact": scoring.is_exact(of_base.text, reference(row)),
            "tuned_exact": scoring.is_exact(of_tuned.text, reference(row)),
            "base_finish_reason": of_base.finish_reason,
            "tuned_finish_reason": of_tuned.finish_reason,
        }
        for row, of_base, of_tuned in zip(rows, base.answers, tuned.answers, strict=True)
    ]
