"""The launch files: shellcheck on their scripts, and a check of the commands that they run. No cluster is needed.

launch/sky.yaml was checked by hand with SkyPilot's own schema (its package needs a hundred others): see docs/scale.md.
"""

import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from support import ROOT
from support.server import free_port

SKY = yaml.safe_load((ROOT / "launch/sky.yaml").read_text("utf-8"))
SCRIPTS = {
    "slurm": (ROOT / "launch/slurm.sbatch").read_text("utf-8"),
    "sky-setup": "#!/usr/bin/env bash\n" + SKY["setup"],
    "sky-run": "#!/usr/bin/env bash\n" + SKY["run"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_no_problem(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-"], input=SCRIPTS[name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def run_script(tmp_path: Path, script: str, *arguments: str, **env: str) -> list[str]:
    """Run it with a `dvc` and `python` that only print their arguments and the rendezvous."""
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    for name in ("dvc", "python"):
        (binaries / name).write_text(f'#!/bin/sh\necho {name} "$@" "$PET_NNODES $PET_NODE_RANK $PET_MASTER_ADDR"\n')
        (binaries / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-s", "--", *arguments], input=script, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.strip() for line in done.stdout.splitlines()]


def test_slurm_runs_dvc(tmp_path: Path) -> None:
    for number, arguments in enumerate([(), ("exp", "run", "-S", "train.dp_size=4")]):
        root = tmp_path / str(number)
        env = {"SLURM_SUBMIT_DIR": str(root), "SLURM_CPUS_ON_NODE": "192"}
        assert run_script(root, SCRIPTS["slurm"], *arguments, **env) == [" ".join(["dvc", *(arguments or ["repro"])])]


def test_sky_gives_every_node_its_part(tmp_path: Path) -> None:
    env = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6"}
    first = run_script(tmp_path / "0", SCRIPTS["sky-run"], SKYPILOT_NODE_RANK="0", **env)
    assert first == ["dvc repro 2 0 10.0.0.5", "dvc push 2 0 10.0.0.5"]
    second = run_script(tmp_path / "1", SCRIPTS["sky-run"], SKYPILOT_NODE_RANK="1", **env)
    assert second == [
        "dvc repro prepare_data convert_nxd 2 1 10.0.0.5",
        "python stages/finetune_lora.py 2 1 10.0.0.5",
    ]


class Upstream(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(self.server.server_port).encode())  # type: ignore[attr-defined]

    def log_message(self, *unused: object) -> None:
        pass


def test_the_proxy_spreads_requests_and_skips_a_dead_server(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin")
    if nginx is None:
        pytest.skip("no nginx here: apt-get install nginx-light")
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    config, proxy = (ROOT / "launch/nginx.conf").read_text("utf-8"), free_port()
    for written, used in (("8000", servers[0].server_port), ("8001", servers[1].server_port), ("8080", proxy)):
        assert f"127.0.0.1:{written}" in config
        config = config.replace(f"127.0.0.1:{written}", f"127.0.0.1:{used}")
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid;\n{config}", "utf-8")
    running = subprocess.Popen([nginx, "-c", tmp_path / "nginx.conf", "-g", "daemon off;"], stderr=subprocess.DEVNULL)

    def ask() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{proxy}/health", timeout=5) as answer:
            return int(answer.read())

    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", proxy)) == 0:
                    break
            time.sleep(0.05)
        assert {ask() for _ in range(10)} == {server.server_port for server in servers}
        servers[0].shutdown()
        servers[0].server_close()
        assert {ask() for _ in range(10)} == {servers[1].server_port}
    finally:
        running.terminate()
        running.wait()
        for server in servers:
            server.shutdown()
