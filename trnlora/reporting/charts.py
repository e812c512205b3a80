"""The training curves as SVG images."""

import base64
import io
from typing import Any, NamedTuple

from trnlora.reporting.results import Results


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
# Readable on the page's white and on its dark background. Text stays text, in the reader's own fonts.
COLORS = ("#12957f", "#d9730d")
GREY = "#7d8590"
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "text.color": GREY,
    "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25,
}  # fmt: skip


def charts(now: Results, other: Results | None) -> list[tuple[str, str]]:
    """(title, SVG as a data URI) of each chart; empty without training curves. The other run's curves are dashed."""
    if not now.curves["train/loss"]:
        return []
    return [(chart.title, draw(chart, now, other)) for chart in CHARTS]


def draw(chart: Chart, now: Results, other: Results | None) -> str:
    """One chart as a data URI of an SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 2.6), layout="constrained")
        for curve, color in zip(chart.curves, COLORS, strict=False):
            _draw_curve(axes, curve, color, now, other)
        if chart.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("optimizer step")
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
        image = io.BytesIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(image.getvalue()).decode()


def _draw_curve(axes: Any, curve: str, color: str, now: Results, other: Results | None) -> None:
    style: dict[str, Any] = {"color": color, "linewidth": 1.6}
    split = curve.split("/")[0]
    if split == "validation":
        style |= {"marker": "o", "markersize": 5}
    if now.curves[curve]:
        axes.plot(*zip(*now.curves[curve], strict=True), label=split, **style)
    if other and other.curves[curve]:
        axes.plot(
            *zip(*other.curves[curve], strict=True),
            label=f"{split}, {other.name}".replace("$", r"\$"),
            alpha=0.6,
            linestyle="--",
            **style,
        )
