"""reports/report.html and reports/summary.md."""

from collections.abc import Sequence
from pathlib import Path

from trnlora.files import atomic_outputs, partial_path
from trnlora.metrics import stages
from trnlora.recorded import FEW
from trnlora.reporting.answers import AnswerRow, answer_rows, count_tags
from trnlora.reporting.charts import charts, legend
from trnlora.reporting.provenance import what_was_run, where_shown
from trnlora.reporting.results import Results, notes_of, params_that_differ
from trnlora.reporting.summary import summary
from trnlora.reporting.templating import render
from trnlora.reporting.values import FORMS, LOSSES, SCORES, categories, cell, change


def write_report(folder: Path, now: Results, others: Sequence[Results] = ()) -> tuple[Path, Path]:
    """Write report.html and summary.md to `folder` and return their paths. others: the runs to compare with."""
    answers = answer_rows(now, others)
    run, here = what_was_run(now), where_shown()
    texts = {
        folder / "summary.md": summary(now, others, run, here, answers),
        folder / "report.html": page(now, others, run, here, answers),
    }
    with atomic_outputs([], [*texts]):
        for path, text in texts.items():
            partial_path(path).write_text(text, encoding="utf-8")
    markdown, html = texts
    return html, markdown


def page(
    now: Results, others: Sequence[Results], run: dict[str, str], here: dict[str, str], answers: list[AnswerRow]
) -> str:
    """The report as one HTML page that needs no network. run, here: `what_was_run` and `where_shown`."""
    return render(
        "report.html.jinja",
        {
            "now": now,
            "others": others,
            "run": run,
            "here": here,
            "notes": notes_of(now, *others),
            "few": FEW,
            "rows_by_category": rows_by_category(now),
            "scores": SCORES,
            "losses": LOSSES,
            "categories": categories(now),
            "charts": charts([now, *others]),
            "legend": legend([now, *others]),
            "stages": stage_seconds(now),
            "answers": answers,
            "answer_filters": count_tags(answers),
            "total_answers": len(now.answers or []),
            "params_differ": params_that_differ(now, *others),
            "cell": cell,
            "change": change,
            "forms": FORMS,
        },
    )


def rows_by_category(now: Results) -> dict[str, float]:
    """The number of rows of each category."""
    counts = {
        name: now.number("prepare_data", f"rows_by_category.{name}")
        for name in now.below("prepare_data", "rows_by_category")
    }
    return {name: count for name, count in counts.items() if count is not None}


def stage_seconds(now: Results) -> list[tuple[str, float]]:
    """(stage, seconds) of the stages that have run."""
    return [(stage, seconds) for stage in stages() if (seconds := now.number(stage, "seconds")) is not None]
