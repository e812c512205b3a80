"""The report in a browser without network: on a desktop and on a phone, light and dark."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.browser import Browser
from support.project import Project

from trnlora.evaluation.harness import RESULTS as HARNESS
from trnlora.recorded import parse_lock
from trnlora.reporting.card import card
from trnlora.reporting.charts import CHARTS, COLORS, SCATTER
from trnlora.reporting.results import flat, load_results

SECTIONS = {
    "run": "What was run",
    "results": "Results",
    "curves": "Training",
    "speed": "Speed, memory and time",
    "data": "Data",
    "answers": "Answers",
    "all": "All values",
}

pytestmark = pytest.mark.slow  # each test has its own DVC project; some use a browser


def report(project: Project, *arguments: str) -> str:
    return project.run(".venv/bin/python", "tools/report.py", *arguments)


def open_report(project: Project, browser: Browser, width: int, scheme: str = "light") -> None:
    browser.resize(width)
    browser.color_scheme(scheme)
    browser.driver.get((project.root / "reports/report.html").as_uri())


def metrics_shown_by_dvc(project: Project) -> dict[str, Any]:
    """`dvc metrics show` of the working tree, by file and dotted key."""
    files = json.loads(project.dvc("metrics", "show", "--json").splitlines()[-1])[""]["data"]
    found = {file: shown["data"] for file, shown in files.items() if "data" in shown}  # the other stages have not run
    return {f"{file}:{key}": value for file, values in found.items() for key, value in flat(values)}


def shares(image: Image.Image, *colors: str) -> list[float]:
    """The share of an image in each color (#rrggbb), without antialiased pixels."""
    pixels = image.width * image.height
    counts = {color: count for count, color in image.getcolors(pixels) or []}
    return [counts.get(tuple(bytes.fromhex(color[1:])), 0) / pixels for color in colors]


def brightness(image: Image.Image) -> float:
    """Mean brightness, 0 to 255."""
    return sum(value * count for value, count in enumerate(image.convert("L").histogram())) / (
        image.width * image.height
    )


def test_every_section_is_visible_offline(run_project: Project, browser: Browser, tmp_path: Path) -> None:
    """On a desktop and on a phone: headings, numbers and curves are visible, and no element is wider than the page."""
    assert "report in reports/report.html" in report(run_project, "--compare", "HEAD")
    page = (run_project.root / "reports/report.html").read_text("utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    metrics = json.loads((run_project.root / "metrics/eval_vllm.json").read_text("utf-8"))
    exact_match, loss = f"{metrics['tuned']['exact_match']:.1%}", f"{metrics['base']['loss']:.6f}"
    browser.console()
    for width, scheme in ((1280, "light"), (390, "dark")):
        open_report(run_project, browser, width, scheme)
        headings = {
            section.get_attribute("id"): section.find_element("css selector", "h2").text
            for section in browser.find_all("section")
        }
        assert headings == SECTIONS
        boxes = "h1, h2, h3, .tile, dd, .scroll, figure, figure img, .filters > *, .answer, .text, details"
        assert browser.outside(boxes) == []
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
        too_wide = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.driver.execute_script(too_wide) == 0  # tables
        results = browser.find("#results").text
        for text in ("exact match", "closed_qa", "ROUGE-L", "tuned, HEAD", exact_match, loss):
            assert text in results

        dark = brightness(browser.picture("h1", tmp_path / f"heading-{width}.png")) < 128
        assert dark == (scheme == "dark")
        figures = browser.find_all("figure")
        assert [figure.text.split(",")[0] for figure in figures] == [
            *(chart.title.split(",")[0] for chart in CHARTS), SCATTER
        ]  # fmt: skip
        for number, chart in enumerate(CHARTS, 1):
            image = browser.picture(f"figure:nth-of-type({number}) img", tmp_path / f"chart-{number}-{width}.png")
            assert image.width > 300
            assert shares(image, COLORS[0])[0] > 1e-4, chart.title
    assert browser.console() == []
    assert "broken" not in browser.driver.title


def test_several_runs_beside_each_other(run_project: Project, browser: Browser, tmp_path: Path) -> None:
    """Their curves in colors of their own, the params that differ, and a point of each: score over loss."""
    project = run_project
    before = {path: path.read_text("utf-8") for path in (project.root / "plots/training").rglob("loss.tsv")}
    metrics = project.root / "metrics/finetune_lora.json"
    trained = json.loads(metrics.read_text("utf-8"))
    for number, name in enumerate(("first", "second"), 1):
        project.set_params(train={"lr": number * 1.0e-3}, lora={"r": 4 * number})
        for path, text in before.items():
            head, *lines = text.splitlines()
            rows = [line.split("\t") for line in lines]
            scaled = [f"{step}\t{float(value) * (1 + number / 5)}" for step, value in rows]
            path.write_text("\n".join([head, *scaled]) + "\n", "utf-8")
        changed = {"validation_loss": trained["validation_loss"] * (1 + number / 5)}
        metrics.write_text(json.dumps(trained | changed), "utf-8")
        project.dvc("commit", "--force", "--quiet")
        project.commit(name)
        project.run("git", "tag", name)
    report(project, "--compare", "first", "--compare", "HEAD~2", "--compare", "first")
    summary = (project.root / "reports/summary.md").read_text("utf-8")
    assert "| param | workspace | first | HEAD~2 |\n|---|---|---|---|\n| lora.r | 8 | 4 | 16 |\n" in summary
    assert "| tuned, first | tuned, HEAD~2 |\n" in summary
    browser.console()
    for width in (1280, 390):
        open_report(project, browser, width)
        for number, chart in enumerate((*CHARTS, None), 1):
            image = browser.picture(f"figure:nth-of-type({number}) img", tmp_path / f"chart-{number}-{width}.png")
            if chart is None or chart.curves[0] == "train/loss":
                assert min(shares(image, *COLORS[:3])) > 1e-4, chart
        assert browser.find_all("figure")[-1].text == SCATTER
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
        table = browser.find("#run table").text
        assert re.search(r"^param workspace first HEAD~2$", table, re.M)
        assert re.search(r"^train\.lr 0\.002 0\.001 0\.01$", table, re.M)
    assert browser.console() == []


def test_what_the_harness_measured(run_project: Project, browser: Browser) -> None:
    """Base and tuned beside each other on the page and in the summary, and a note if they are of another adapter."""
    recorded = parse_lock((run_project.root / "dvc.lock").read_text("utf-8"))["flatten_adapter"].outs
    values = {"base": {"acc": 0.7917, "acc_stderr": 0.0592}, "tuned": {"acc": 0.6458, "acc_stderr": 0.0698}}
    path = run_project.root / HARNESS
    for adapter in (recorded["artifacts/adapter"], "0" * 32 + ".dir"):
        found = {"harness": "0.4.13", "adapter": adapter, "limit": 48, "tasks": {"facts": {"samples": 48} | values}}
        path.write_text(json.dumps(found), "utf-8")
        printed = report(run_project, "--compare", "HEAD")
        note = "stale: metrics/lm_eval.json is of another adapter; `make lm-eval` writes it again"
        assert (note in printed) == (adapter != recorded["artifacts/adapter"])
    assert "| facts acc | 0.792 | 0.646 | 48 |" in (run_project.root / "reports/summary.md").read_text("utf-8")
    for width in (1280, 390):
        open_report(run_project, browser, width)
        assert browser.find("#notes p").text == note
        head, row = browser.find("#harness").text.splitlines()
        assert head == "task base tuned change"
        assert row == "facts acc of 48 0.792 ± 0.059 0.646 ± 0.070 -0.146"
        assert browser.outside("#harness") == []


def test_numbers_are_those_of_dvc(run_project: Project, browser: Browser) -> None:
    """Every metric of the working tree is on the page with dvc's value. So are those of the other commit."""
    path = run_project.root / "metrics/eval_vllm.json"
    metrics = json.loads(path.read_text("utf-8"))
    metrics["tuned"]["exact_match"] = 0.25  # so that the commit and the working tree differ
    path.write_text(json.dumps(metrics), "utf-8")
    report(run_project, "--compare", "HEAD")
    open_report(run_project, browser, 1280)
    script = "return [...document.querySelectorAll('[data-metric]')].map(e => ({...e.dataset, text: e.textContent}))"
    cells = browser.driver.execute_script(script)
    here, there = (
        {cell["metric"]: cell["value"] for cell in cells if cell["rev"] == revision}
        for revision in ("workspace", "HEAD")
    )
    assert here == {key: repr(value) for key, value in metrics_shown_by_dvc(run_project).items()}
    committed = {
        f"{file}:{key}": value
        for file in {cell["metric"].split(":")[0] for cell in cells}
        for key, value in flat(json.loads(run_project.run("git", "show", f"HEAD:{file}")))
    }
    assert len(there) > 20
    assert there == {key: repr(committed[key]) for key in there}
    exact = {(cell["rev"], cell["text"]) for cell in cells if cell["metric"].endswith(":tuned.exact_match")}
    assert ("workspace", "25.0%") in exact
    assert ("HEAD", f"{committed['metrics/eval_vllm.json:tuned.exact_match']:.1%}") in exact


def test_answers_are_filtered_and_differences_marked(run_project: Project, browser: Browser) -> None:
    report(run_project)
    open_report(run_project, browser, 1280)

    def seen() -> list[str]:
        return [a.find_element("css selector", "header span").text for a in browser.find_all(".answer:not([hidden])")]

    def choose(tag: str) -> list[str]:
        browser.find(f'button[data-tag="{tag}"]').click()
        return seen()

    assert len(seen()) == 10
    browser.find("#more").click()
    assert len(seen()) == 24
    assert not browser.find("#more").is_displayed()
    assert choose("right → wrong") == ["row 97"]
    assert choose("right → right") == ["row 99"]
    assert choose("tuned cut off") == ["row 98"]
    assert not browser.find('button[data-tag="base cut off"]').is_enabled()
    lacks, wrong = (browser.find_all(f'.answer[data-tags*="tuned cut off"] mark.{kind}') for kind in ("lacks", "wrong"))
    assert [mark.text for mark in lacks] == ["b"]  # of "a < b"
    assert wrong[-1].text == "c"  # of "a < c"; the base answer's marks come first
    browser.find('button[data-tag=""]').click()
    browser.find("input[type=search]").send_keys("question 99")
    assert seen() == ["row 99"]
    assert browser.console() == []


def test_summary_lists_changes(run_project: Project) -> None:
    """With another commit: changed params and scores. Without one: answers that became correct."""
    run_project.run("git", "tag", "before")
    run_project.set_params(train={"lr": 5.0e-3})
    run_project.dvc("commit", "--force", "--quiet")
    report(run_project, "--compare", "before")
    text = (run_project.root / "reports/summary.md").read_text("utf-8")
    assert "| train.lr | 0.005 | 0.01 |" in text
    assert re.search(r"^\| exact match \| [\d.]+% \| ([\d.]+%) \| \1 \| ±0.0 pt \|$", text, re.M)
    assert re.search(r"^\| · closed_qa \| [\d.]+% \| ([\d.]+%) \| \1 \| ±0.0 pt \|$", text, re.M)
    report(run_project)
    text = (run_project.root / "reports/summary.md").read_text("utf-8")
    assert text.count("<details>") == 3
    assert "wrong → right" in text


def test_metrics_are_printed_as_tables(run_project: Project) -> None:
    """tools/show_metrics.py: base and tuned side by side, nested keys included, and not among the other metrics."""
    printed = run_project.run(".venv/bin/python", "tools/show_metrics.py")
    metrics = json.loads((run_project.root / "metrics/eval_vllm.json").read_text("utf-8"))
    base, tuned = (metrics[model]["exact_match_by_category"]["closed_qa"] for model in ("base", "tuned"))
    assert re.search(rf"│ exact_match_by_category.closed_qa +│ {base:.4g} +│ {tuned:.4g} +│", printed)
    assert re.search(rf"│ eval_vllm +│ prompts +│ {metrics['prompts']} +│", printed)
    assert "base.loss" not in printed


def test_a_run_without_losses_in_vllm_is_shown_by_every_tool(
    run_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As eval.engine: device leaves them: the trainer's loss is shown, and a dash where there is none."""
    file = run_project.root / "metrics/eval_vllm.json"
    metrics = json.loads(file.read_text("utf-8"))
    for name in ("loss_gap_trainer", "loss_gap_peft"):
        del metrics[name]
    for name in ("base", "tuned"):
        del metrics[name]["loss"]
    file.write_text(json.dumps(metrics | {"loss_gap_trainer_peft": 1e-7}), "utf-8")
    run_project.dvc("commit", "--force", "--quiet")
    run_project.commit("On the device")

    report(run_project, "--compare", "HEAD~1")
    trained = json.loads((run_project.root / "metrics/finetune_lora.json").read_text("utf-8"))["validation_loss"]
    page = (run_project.root / "reports/report.html").read_text("utf-8")
    assert f'data-metric="metrics/finetune_lora.json:validation_loss" data-value="{trained!r}">{trained:.4f}' in page
    summary = (run_project.root / "reports/summary.md").read_text("utf-8")
    assert re.search(r"^\| loss, nats per token \| – \| – \| 0\.\d+ \| – \|$", summary, re.M)
    assert re.search(r"^Validation loss with the adapter: \S+ \(trainer\), \S+ \(HF \+ PEFT\)\.$", summary, re.M)
    run_project.run(".venv/bin/python", "tools/show_metrics.py")
    difference = run_project.run(".venv/bin/python", "tools/compare.py", "HEAD~1", "HEAD")
    assert re.search(r"│ eval_vllm tuned\.loss +│ +0\.\d+ │ +– │", difference)
    run_project.run(".venv/bin/python", "tools/check_metrics.py")
    changed = run_project.run(".venv/bin/python", "tools/check_metrics.py", "--against", "HEAD~1", check=False)
    assert "metrics/eval_vllm.json: tuned.loss is None, expected 0." in changed
    monkeypatch.chdir(run_project.root)
    assert "The loss is measured on the validation rows" not in card(load_results(), None)


@pytest.mark.parametrize("tool", ["report", "card", "show_metrics"])
def test_without_metrics_the_error_is_one_line(project: Project, tool: str) -> None:
    done = project.run(".venv/bin/python", f"tools/{tool}.py", check=False)
    assert done == "error: there are no metrics yet: run `make repro`\n"


def test_a_partial_run_is_reported(project: Project) -> None:
    (project.root / "metrics").mkdir()
    (project.root / "metrics/prepare_data.json").write_text('{"rows_read": 3}', "utf-8")
    done = project.run(".venv/bin/python", "tools/report.py", "--compare", "nosuch", check=False)
    assert done == "error: unknown Git revision 'nosuch': name a commit, branch, tag or experiment\n"
    report(project)
    page = (project.root / "reports/report.html").read_text("utf-8")
    assert "The adapter has not been evaluated yet" in page
    assert "The answers are not on this machine" in page
