"""Answers as a run would write them."""

import json
from pathlib import Path

from trnlora.data.examples import Answer


def answer(number: int, reference: str, base: str, tuned: str, cut_off: bool = False) -> Answer:
    """A row of artifacts/answers.jsonl."""
    return {
        "id": number,
        "category": "closed_qa" if number % 2 else "rewriting",
        "prompt": f"### Instruction:\nQuestion {number}?\n\n### Response:\n",
        "reference": reference,
        "base": base,
        "tuned": tuned,
        "base_exact": base == reference,
        "tuned_exact": tuned == reference,
        "base_finish_reason": "stop",
        "tuned_finish_reason": "length" if cut_off else "stop",
    }


def write_answers(root: Path, answers: list[Answer]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in answers)
    (root / "artifacts").mkdir(exist_ok=True)
    (root / "artifacts/answers.jsonl").write_text(text, "utf-8")
