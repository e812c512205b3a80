"""The evaluation without vLLM: its gates, its choice of rows, and the metrics and answers that it writes."""

from typing import Any

import pytest
import yaml
from support import ROOT

from trnlora.data.examples import PreparedExample
from trnlora.evaluation.answers import Scored, answer_rows, spread
from trnlora.evaluation.gates import gate
from trnlora.evaluation.run import loss_gaps
from trnlora.params import Eval
from trnlora.serving.engine import Completion

GOOD = {
    "changed_fraction": 0.5,
    "loss_gap_trainer": 1e-3,
    "loss_gap_peft": 0.0,
    "base": {"loss": 2.0},
    "tuned": {"loss": 1.0},
}


def limits() -> Eval:
    values = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))["eval"]
    return Eval.model_validate(values | {"min_changed_fraction": 0.5, "max_loss_gap": 1e-3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"changed_fraction": 0.49}, "too little effect in vLLM: 49.0% of the answers"),
        ({"tuned": {"loss": 2.0}}, "too little effect"),
        ({"loss_gap_trainer": 2e-3}, "from that of the trainer"),
        ({"loss_gap_peft": 2e-3}, "from that of PEFT"),
        ({"loss_gap_peft": float("nan")}, "from that of PEFT"),
    ],
)
def test_gates(change: dict[str, Any], message: str) -> None:
    assert gate(GOOD, limits()) == []
    (failure,) = gate(GOOD | change, limits())
    assert message in failure


def without_losses(change: dict[str, Any]) -> dict[str, Any]:
    """Metrics with eval.engine: device."""
    return {"changed_fraction": 0.5, "loss_gap_trainer_peft": 1e-3, "base": {}, "tuned": {}} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"changed_fraction": 0.49}, "49.0% of the answers changed (eval.min_changed_fraction 50.0%)"),
        ({"changed_fraction": float("nan")}, "too little effect in vLLM"),
        ({"loss_gap_trainer_peft": 2e-3}, "the adapter's loss in training is 0.002000 nats from that of PEFT"),
        ({"loss_gap_trainer_peft": float("nan")}, "from that of PEFT"),
    ],
)
def test_gates_without_a_loss_in_vllm(change: dict[str, Any], message: str) -> None:
    assert gate(without_losses({}), limits()) == []
    (failure,) = gate(without_losses(change), limits())
    assert message in failure


def test_loss_gaps() -> None:
    others = {"trainer": 1.0, "peft": 1.25}
    assert loss_gaps(1.5, others) == {"loss_gap_trainer": 0.5, "loss_gap_peft": 0.25}
    assert loss_gaps(None, others) == {"loss_gap_trainer_peft": 0.25}
    assert loss_gaps(1.5, {}) == loss_gaps(None, {}) == {}  # an adapter from elsewhere


def test_max_prompts_keeps_the_mix_of_a_sorted_file() -> None:
    rows = list(range(10))
    assert spread(rows, 4) == [0, 2, 5, 7]
    assert spread(rows, None) == spread(rows, 10) == spread(rows, 99) == rows


def example(number: int, category: str, response: str) -> PreparedExample:
    return {
        "id": number,
        "category": category,
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": response}],
        "prompt": f"prompt {number}",
        "token_ids": [1, 2],
        "labelled": [[1, 2]],
    }


ROWS = [example(0, "b", "yes"), example(1, "a", "no"), example(2, "b", "one two")]
BASE = Scored(2.0, [Completion("no", 2, "stop"), Completion("no\n", 3, "stop"), Completion("x", 16, "length")], 2.0)
TUNED = Scored(1.0, [Completion("yes", 2, "stop"), Completion("no", 2, "stop"), Completion("one", 2, "stop")], 3.0)


def test_metrics_of_a_model_contain_the_categories() -> None:
    metrics = BASE.metrics(ROWS)
    assert metrics["loss"] == 2.0
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    assert metrics["exact_match_by_category"] == {"a": 1.0, "b": 0.0}
    assert metrics["response_tokens"] == 7
    assert metrics["truncated_fraction"] == pytest.approx(1 / 3)
    assert TUNED.metrics(ROWS)["exact_match_by_category"] == {"a": 1.0, "b": 0.5}


def test_an_engine_without_a_loss_leaves_it_out() -> None:
    metrics = Scored(None, BASE.answers, BASE.seconds).metrics(ROWS)
    assert BASE.metrics(ROWS) == {"loss": 2.0} | metrics
    assert "loss" not in metrics


def test_speed_is_of_all_answers_together() -> None:
    assert BASE.speed() == {"requests_per_s": 1.5, "output_tokens_per_s": 10.5}


def test_answer_rows_keep_both_answers() -> None:
    assert [row["id"] for row in answer_rows(ROWS, BASE, TUNED)] == [0, 1, 2]
    assert answer_rows(ROWS, BASE, TUNED)[2] == {
        "id": 2,
        "category": "b",
        "prompt": "prompt 2",
        "reference": "one two",
        "base": "x",
        "tuned": "one",
        "base_exact": False,
        "tuned_exact": False,
        "base_finish_reason": "length",
        "tuned_finish_reason": "stop",
    }
