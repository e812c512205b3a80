"""The side-by-side page in a real browser, with a real vLLM server that the tool starts with two adapters."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import ROOT
from support.browser import Browser
from test_adapters import two, workdir  # noqa: F401 (fixtures)
from test_serving import free_port, script

NAMES = ["base", "first", "second"]


class Ui:
    def __init__(self, root: Path, adapters: list[Path], log: Path) -> None:
        self.server_port, self.port, self.log = free_port(), free_port(), log
        command = [sys.executable, str(ROOT / "tools/ui.py"), "--port", str(self.server_port)]
        command += ["--ui-port", str(self.port), "--adapters", f"first={adapters[0]}", f"second={adapters[1]}"]
        with log.open("w") as out:
            self.process = psutil.Popen(command, cwd=root, env=os.environ, stdout=out, stderr=subprocess.STDOUT)
        while "open http://127.0.0.1" not in log.read_text("utf-8"):
            assert self.process.poll() is None, log.read_text("utf-8")
            time.sleep(0.2)
        time.sleep(1)


@pytest.fixture(scope="module")
def ui(workdir: Path, two: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:  # noqa: F811
    running = Ui(workdir, two, tmp_path_factory.mktemp("ui") / "ui.log")
    yield running
    if running.process.is_running():
        running.process.terminate()
        running.process.wait()


def wait(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_question_is_answered_side_by_side_and_errors_are_sentences(ui: Ui, browser: Browser, tmp_path: Path) -> None:
    browser.console()
    for width in (1280, 390):
        browser.resize(width)
        browser.driver.get(f"http://127.0.0.1:{ui.port}/")
        wait(lambda: browser.find("#ask").is_enabled())
        assert [box.get_attribute("value") for box in browser.find_all("#models input")] == NAMES
        browser.find("#instruction").send_keys("Which city?")
        browser.find("#context").send_keys("Rosa lives in Nairobi.")
        prompt = "### Instruction:\nWhich city?\n\n### Context:\nRosa lives in Nairobi.\n\n### Response:\n"
        wait(lambda: browser.find("#prompt").get_property("textContent") == prompt)  # noqa: B023
        browser.find("#ask").click()
        wait(lambda: len([p for p in browser.find_all(".answer .soft") if "tokens/s" in p.text]) == 3)
        answers = {box.get_attribute("data-model"): box.find_element("css selector", "pre").text
                   for box in browser.find_all(".answer")}  # fmt: skip
        assert sorted(answers) == NAMES
        assert len(set(answers.values())) == 3
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert len(browser.screenshot(tmp_path / f"ui-{width}.png")) > 10_000
    assert browser.console() == []

    browser.find("#max_tokens").clear()
    browser.find("#max_tokens").send_keys("99999")
    browser.find("#ask").click()
    refused = "refused the request (400): "
    wait(lambda: [refused in error.text for error in browser.find_all(".answer .error")] == [True] * 3)


@pytest.mark.slow
def test_chat_answers_the_lines_that_are_piped_in(ui: Ui, workdir: Path) -> None:  # noqa: F811
    command = [sys.executable, str(ROOT / "tools/chat.py"), "--port", str(ui.server_port), "--model", "first"]
    lines = "Which city?\n/new\nWhich city?\n/model base\n/new\nWhich city?\n/model nobody\n"
    done = subprocess.run(command, cwd=workdir, input=lines, capture_output=True, text=True, check=True)
    once, again = done.stdout.split("the server has no model 'nobody': it has base, first, second")[0], done.stderr
    assert once.strip()
    assert again == ""
    missing = script("tools/chat.py", "--port", str(ui.server_port), "--model", "nobody", cwd=workdir)
    assert missing.stderr == "error: the server has no model 'nobody': it has base, first, second\n"


@pytest.mark.slow
def test_a_stop_leaves_no_server(ui: Ui) -> None:
    """Must be the last test that uses `ui`, because it stops it."""
    family = ui.process.children(recursive=True)
    assert len(family) >= 2
    ui.process.send_signal(signal.SIGTERM)
    ui.process.wait(timeout=60)
    assert not [process for process in family if process.is_running()]
