"""The report as people see it: in a browser without network, at two widths, its numbers against `dvc metrics show`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.browser import Browser
from support.project import Project

from trnlora.reporting.results import flat

SECTIONS = ["run", "results", "curves", "speed", "data", "answers", "all"]
ANSWERS = 24


def answer(number: int, reference: str, base: str, tuned: str, cut: bool = False) -> dict[str, Any]:
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
        "tuned_finish_reason": "length" if cut else "stop",
    }


def write_answers(root: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "artifacts").mkdir(exist_ok=True)
    (root / "artifacts/answers.jsonl").write_text(text, "utf-8")


@pytest.fixture
def run_project(project: Project) -> Project:
    """The project with this repository's metrics and curves, committed, and some answers in the working tree."""
    for source in [*(ROOT / "metrics").rglob("*.json"), *(ROOT / "plots").rglob("*.*")]:
        target = project.root / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    project.commit("Results")
    rows = [answer(number, "Nairobi", "In Paris.", "Nairobi") for number in range(ANSWERS - 3)]
    rows += [
        answer(97, "one two three", "one two three", "one 2 three"),
        answer(98, "a < b", "<script>document.title = 'broken'</script>", "a < c", cut=True),
        answer(99, "`x`", "`x`", "`x`"),
    ]
    write_answers(project.root, rows)
    return project


def report(project: Project, *arguments: str) -> str:
    return project.run(".venv/bin/python", "tools/report.py", *arguments)


def metrics_shown_by_dvc(project: Project) -> dict[str, Any]:
    """`dvc metrics show` of the working tree, by file and dotted key."""
    files = json.loads(project.dvc("metrics", "show", "--json").splitlines()[-1])[""]["data"]
    found = {file: shown["data"] for file, shown in files.items() if "data" in shown}  # the others have not run
    return {f"{file}:{key}": value for file, values in found.items() for key, value in flat(values)}


def test_every_section_is_seen_without_network_and_the_numbers_are_dvcs(
    run_project: Project, browser: Browser, tmp_path: Path
) -> None:
    path = run_project.root / "metrics/eval_vllm.json"
    metrics = json.loads(path.read_text("utf-8"))
    metrics["tuned"]["exact_match"] = 0.25  # so that the commit and the working tree differ
    path.write_text(json.dumps(metrics), "utf-8")
    assert "report in reports/report.html" in report(run_project, "--compare", "HEAD")

    page = (run_project.root / "reports/report.html").read_text("utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    browser.console()
    for width in (1280, 390):
        browser.resize(width)
        browser.driver.get((run_project.root / "reports/report.html").as_uri())
        assert [section.get_attribute("id") for section in browser.find_all("section")] == SECTIONS
        for section in browser.find_all("section"):
            assert section.size["height"] > 50
            assert section.find_element("css selector", "h2").is_displayed()
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert len(browser.screenshot(tmp_path / f"report-{width}.png")) > 50_000
        images = "return [...document.images].every(image => image.complete && image.naturalWidth > 100)"
        assert browser.driver.execute_script(images)
        assert len(browser.find_all("figure")) == 4
    assert browser.console() == []
    assert "broken" not in browser.driver.title

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


def test_the_answers_are_filtered_and_their_differences_marked(run_project: Project, browser: Browser) -> None:
    report(run_project)
    browser.resize(1280)
    browser.driver.get((run_project.root / "reports/report.html").as_uri())

    def seen() -> list[str]:
        return [a.find_element("css selector", "header span").text for a in browser.find_all(".answer:not([hidden])")]

    def choose(tag: str) -> list[str]:
        browser.find(f'button[data-tag="{tag}"]').click()
        return seen()

    assert len(seen()) == 10
    browser.find("#more").click()
    assert len(seen()) == ANSWERS
    assert not browser.find("#more").is_displayed()
    assert choose("right → wrong") == ["row 97"]
    assert choose("right → right") == ["row 99"]
    assert choose("tuned cut") == ["row 98"]
    assert not browser.find('button[data-tag="base cut"]').is_enabled()
    reference, tuned = (browser.find_all(f'.answer[data-tags*="tuned cut"] mark.{kind}') for kind in ("lacks", "wrong"))
    assert [mark.text for mark in reference] == ["b"]  # of "a < b"
    assert tuned[-1].text == "c"  # of "a < c"; the base's come before
    browser.find('button[data-tag=""]').click()
    browser.find("input[type=search]").send_keys("question 99")
    assert seen() == ["row 99"]
    assert browser.console() == []


def test_the_summary_tells_what_changed(run_project: Project) -> None:
    """Against an experiment that DVC keeps with its answers: params, scores, and answers that differ."""
    run_project.run("git", "tag", "before")
    run_project.set_params(train={"lr": 5.0e-3})
    report(run_project, "--compare", "before")
    text = (run_project.root / "reports/summary.md").read_text("utf-8")
    assert "| train.lr | 0.01 | 0.005 |" in text
    assert re.search(r"^\| exact match \| [\d.]+% \| ([\d.]+%) \| \1 \| ±0.0 pt \|$", text, re.M)
    report(run_project)
    text = (run_project.root / "reports/summary.md").read_text("utf-8")
    assert text.count("<details>") == 3
    assert "wrong → right" in text


def test_what_is_missing_is_said_in_one_line(project: Project) -> None:
    done = project.run(".venv/bin/python", "tools/report.py", check=False)
    assert done == "error: there are no metrics yet: run `make repro`\n"
    (project.root / "metrics").mkdir()
    (project.root / "metrics/prepare_data.json").write_text('{"rows_read": 3}', "utf-8")
    done = project.run(".venv/bin/python", "tools/report.py", "--compare", "nosuch", check=False)
    assert done == "error: unknown Git revision 'nosuch': name a commit, branch, tag or experiment\n"
    report(project)  # of a run that is half done
    page = (project.root / "reports/report.html").read_text("utf-8")
    assert "The adapter is not evaluated yet" in page
    assert "The answers are not on this machine" in page
