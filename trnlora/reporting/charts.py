"""The training curves, and scores over losses, as SVG images."""

import base64
import functools
import io
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

    With several runs, each has a color, and a last chart has their scores over their losses.
    """
    drawn = []
    if runs[0].curves["train/loss"]:
        dashed = ", validation dashed" if len(runs) > 1 else ""
        for chart in CHARTS:
            title = chart.title + (dashed if len(chart.curves) > 1 else "")
            drawn.append((title, _svg(functools.partial(_draw_curves, chart, runs))))
    points = [
        (run.name, COLORS[number % len(COLORS)], loss, score)
        for number, run in enumerate(runs)
        if (loss := run.number("finetune_lora", "validation_loss")) is not None
        and (score := run.number("eval_vllm", f"tuned.{SCORES[0].key}")) is not None
    ]
    if len(points) > 1:
        drawn.append((SCATTER, _svg(functools.partial(_draw_points, points))))
    return drawn


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
    for place, run in reversed([*enumerate(runs)]):  # the present run is on top
        for number, curve in enumerate(chart.curves):
            split = curve.split("/")[0]
            color = COLORS[(place if several else number) % len(COLORS)]
            style: dict[str, Any] = {"color": color, "linewidth": 1.6, "label": split}
            if split == "validation":
                style |= {"marker": "o", "markersize": 5}
            if several:
                style["label"] = None if number else _plain(run.name)
                style["linestyle"] = "--" if split == "validation" else "-"
            if run.curves[curve]:
                axes.plot(*zip(*run.curves[curve], strict=True), **style)
    if chart.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    if len(axes.lines) > 1:
        axes.legend(frameon=False, reverse=several)


def _draw_points(points: list[tuple[str, str, float, float]], axes: Any) -> None:
    """points: (name, color, x, y) of each run."""
    for name, color, loss, score in points:
        axes.plot(loss, 100 * score, "o", color=color, markersize=8, alpha=0.8)
        axes.annotate(
            _plain(name), (loss, 100 * score), xytext=(7, 5), textcoords="offset points", annotation_clip=False
        )
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel("validation loss")
    axes.set_ylabel("%")


def _plain(name: str) -> str:
    """A run's name, in which matplotlib finds no formula. A name that begins with _ would be left out of legends."""
    return name.replace("$", r"\$").removeprefix("_")
