"""The training curves, and scores over losses, as SVG images."""

import base64
import functools
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trnlora.reporting.results import Results
from trnlora.reporting.values import SCORES


class Chart(NamedTuple):
    """A chart of curves over optimizer steps."""

    title: str
    curves: tuple[str, ...]
    logarithmic: bool


CHARTS = (
    Chart("Loss, nats per labelled token", ("train/loss", "validation/loss"), True),
    Chart("Gradient norm", ("train/grad_norm",), False),
    Chart("Learning rate", ("train/lr",), False),
    Chart("Training speed, mean tokens/s", ("train/tokens_per_second",), False),
)
SCATTER = f"{SCORES[0].title.capitalize()} by validation loss"
# Readable on the page's white and on its dark background. Text stays text, in the reader's own fonts.
COLORS = ("#12957f", "#d9730d", "#4c7fd1", "#b8559f", "#93882a", "#c24d45")
GREY = "#7d8590"
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "text.color": GREY,
    "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25,
}  # fmt: skip


def charts(runs: Sequence[Results]) -> list[tuple[str, str]]:
    """(title, SVG as a data URI) of each chart; empty without training curves. The first run is the present one.

    With several runs, each has a color, that of `legend`, and a last chart has their scores over their losses.
    """
    drawn = []
    if runs[0].curves["train/loss"]:
        dashed = ", validation dashed" if len(runs) > 1 else ""
        for chart in CHARTS:
            title = chart.title + (dashed if len(chart.curves) > 1 else "")
            drawn.append((title, _svg(functools.partial(_draw_curves, chart, runs))))
    points = [
        (color, loss, score)
        for run, (_, color) in zip(runs, legend(runs), strict=True)
        if (loss := run.number("finetune_lora", "validation_loss")) is not None
        and (score := run.number("eval_vllm", f"tuned.{SCORES[0].key}")) is not None
    ]
    if len(points) > 1:
        drawn.append((SCATTER, _svg(functools.partial(_draw_points, points))))
    return drawn


def legend(runs: Sequence[Results]) -> list[tuple[str, str]]:
    """(name, color) of each run, where there are several."""
    return [(run.name, COLORS[number % len(COLORS)]) for number, run in enumerate(runs)]


def _svg(draw: Callable[[Any], None]) -> str:
    """What `draw` draws into a figure's axes, as a data URI of an SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 2.6), layout="constrained")
        draw(axes)
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(image.getvalue()).decode()


def _draw_curves(chart: Chart, runs: Sequence[Results], axes: Any) -> None:
    several = len(runs) > 1
    for run, (_, of_run) in reversed([*zip(runs, legend(runs), strict=True)]):  # the present run is on top
        for curve, of_curve in zip(chart.curves, COLORS, strict=False):
            split = curve.split("/")[0]
            style: dict[str, Any] = {"color": of_run if several else of_curve, "linewidth": 1.6, "label": split}
            if split == "validation":
                style |= {"marker": "o", "markersize": 5, "linestyle": "--" if several else "-"}
            if run.curves[curve]:
                axes.plot(*zip(*run.curves[curve], strict=True), **style)
    if chart.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    if len(axes.lines) > 1 and not several:
        axes.legend(frameon=False)


def _draw_points(points: list[tuple[str, float, float]], axes: Any) -> None:
    """points: (color, x, y) of each run."""
    for (color, loss, score), marker in zip(points, itertools.cycle("os^Dv*"), strict=False):
        # Not filled, so that runs with the same values are all seen.
        axes.plot(loss, 100 * score, marker, color=color, markersize=9, markerfacecolor="none", markeredgewidth=2)
    axes.margins(0.2)
    axes.set_xlabel("validation loss")
    axes.set_ylabel("%")
