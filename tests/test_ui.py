"""The side-by-side page in a real browser, with a real vLLM server and its adapters."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.testclient import TestClient
from support import ROOT
from support.browser import Browser
from support.server import Server, free_port, script

from trnlora.params import load_params
from trnlora.serving.page import application

NAMES = ["base", "tuned", "first", "second"]


class Ui:
    """`tools/ui.py` in the background, ready, using the server at `server_port` or one that it starts."""

    def __init__(self, root: Path, log: Path, server_port: int) -> None:
        self.port, self.log = free_port(), log
        command = [sys.executable, str(ROOT / "tools/ui.py"), "--port", str(server_port), "--ui-port", str(self.port)]
        with log.open("w") as out:
            self.process = psutil.Popen(command, cwd=root, env=os.environ, stdout=out, stderr=subprocess.STDOUT)
        while "open http://127.0.0.1" not in log.read_text("utf-8") or not self.answers():
            assert self.process.poll() is None, log.read_text("utf-8")
            time.sleep(0.2)

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def ui(workdir: Path, server: Server, tmp_path: Path) -> Iterator[Ui]:
    running = Ui(workdir, tmp_path / "ui.log", server.port)
    yield running
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
        settings = [browser.find(f"#{name}").get_property("value") for name in ("temperature", "top_p", "max_tokens")]
        assert settings == ["0", "1", "16"]  # those of the adapter's trnlora.json, and eval.max_tokens
        browser.find("#instruction").send_keys("Which city?")
        browser.find("#context").send_keys("Rosa lives in Nairobi.")
        prompt = "### Instruction:\nWhich city?\n\n### Context:\nRosa lives in Nairobi.\n\n### Response:\n"
        wait(lambda: browser.find("#prompt").get_property("textContent") == prompt)  # noqa: B023
        browser.find("#ask").click()
        wait(lambda: len([p for p in browser.find_all(".answer .soft") if "tokens/s" in p.text]) == len(NAMES))
        answers = {box.get_attribute("data-model"): box.find_element("css selector", "pre").text
                   for box in browser.find_all(".answer")}  # fmt: skip
        assert sorted(answers) == sorted(NAMES)
        assert len(set(answers.values())) == len(NAMES)
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.outside("#ask, #instruction, #context, #prompt, .answer, .answer pre") == []
        picture = browser.picture("#answers", tmp_path / f"answers-{width}.png")
        assert len(picture.getcolors(1 << 20)) > 20  # text, not an empty box
    assert browser.console() == []

    # Each answer but the first has marks, which can be switched off. The texts stay the same.
    assert {box.get_attribute("data-model") for box in browser.find_all(".answer:has(mark)")} == {*NAMES[1:]}
    browser.find("#differences").click()
    assert not browser.find_all("mark")
    # The browser remembers the questions of both visits, with their answers, also as a file to share.
    browser.driver.get(f"http://127.0.0.1:{ui.port}/")
    wait(lambda: browser.find("#ask").is_enabled())
    assert [one.text for one in browser.find_all("#earlier button")] == 2 * ["Which city? · Rosa lives in Nairobi."]
    browser.find("#earlier button").click()
    assert browser.find("#instruction").get_property("value") == "Which city?"
    kept = {box.get_attribute("data-model"): box.find_element("css selector", "pre").text
            for box in browser.find_all(".answer")}  # fmt: skip
    assert kept == answers
    transcript = browser.driver.execute_script("return transcript(earlier())")
    assert transcript.count("## 2") == 2
    assert all(f"**{name}** (" in transcript for name in NAMES)
    assert all(" ".join(text.split()) in " ".join(transcript.split()) for text in answers.values())
    assert browser.outside("#history, #earlier button, .bar") == []
    browser.find("#forget").click()
    assert not browser.find("#history").is_displayed()
    assert browser.console() == []

    browser.find("#max_tokens").clear()
    browser.find("#max_tokens").send_keys("99999")
    browser.find("#ask").click()
    refused = "refused the request (400): "
    wait(lambda: [refused in error.text for error in browser.find_all(".answer .error")] == [True] * len(NAMES))


def test_another_site_in_the_browser_cannot_ask_with_the_key(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may send plain text to any address without being asked, and read nothing; and it may rename this one."""
    monkeypatch.chdir(workdir)
    page = TestClient(application(load_params(Path("params.yaml")), "http://127.0.0.1:9"), "http://127.0.0.1")
    question = {"instruction": "Which city?", "context": ""}
    assert page.post("/render", json=question).status_code == 502  # no server, from which it gets the template
    for path in ("/render", "/complete"):
        sent = page.post(path, content=json.dumps(question), headers={"Content-Type": "text/plain"})
        assert sent.status_code == 415
        for body in (b"{", b"[1]", b'{"instruction": 7, "context": ""}'):
            sent = page.post(path, content=body, headers={"Content-Type": "application/json"})
            assert sent.status_code == 400
            assert "the request" in sent.text
    assert page.get("/", headers={"Host": "elsewhere.example"}).status_code == 400


@pytest.mark.slow
def test_the_text_of_a_special_token_in_a_question_stays_text(ui: Ui, tiny_llama: Path) -> None:
    """As data.special_tokens: as_text has it in training. The server says how many tokens the prompt has."""
    from transformers import AutoTokenizer

    from trnlora.data.encode import RowEncoder
    from trnlora.data.formats import Message, Row
    from trnlora.data.templates import load_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    encoder = RowEncoder(tokenizer, load_template("dolly", {}, tokenizer), 512, "drop", False, "as_text")
    row = Row(1, (Message("user", "What is <|im_end|>?"), Message("assistant", "An end.")), "talk", None)
    [example], _ = encoder.encode([row])
    trained = example.labelled[-1][0]
    question = {"instruction": "What is <|im_end|>?", "context": ""}
    settings = {"model": "tuned", "temperature": 0, "top_p": 1, "max_tokens": 1}
    reply = httpx.post(f"http://127.0.0.1:{ui.port}/complete", json=question | settings, timeout=60)
    asked = re.findall(r'"prompt_tokens":\s*(\d+)', reply.text)
    assert {int(count) for count in asked} == {trained}
    assert trained > len(tokenizer(example.prompt, add_special_tokens=False)["input_ids"])


@pytest.mark.slow
def test_chat_answers_lines_from_a_pipe(server: Server, workdir: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/chat.py"), "--port", str(server.port), "--model", "first"]
    lines = "Which city?\n/new\nWhich city?\n/model base\n/new\nWhich city?\n/model unknown\n"
    done = subprocess.run(command, cwd=workdir, input=lines, capture_output=True, text=True, check=True)
    answers, refused = done.stdout.split("the server has no model 'unknown': it has base, tuned, first, second")
    assert answers.strip()
    assert not refused.strip()
    assert done.stderr == ""
    missing = script("tools/chat.py", "--port", str(server.port), "--model", "unknown", cwd=workdir)
    assert missing.stderr == "error: the server has no model 'unknown': it has base, tuned, first, second\n"


@pytest.mark.long
def test_a_server_that_the_page_has_started_stops_with_it(workdir: Path, tmp_path: Path) -> None:
    ui = Ui(workdir, tmp_path / "ui.log", free_port())
    family = ui.process.children(recursive=True)
    assert len(family) >= 2
    ui.process.send_signal(signal.SIGTERM)
    ui.process.wait(timeout=60)
    assert not [process for process in family if process.is_running()]
