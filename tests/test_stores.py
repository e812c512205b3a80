"""A DVC remote on an S3-compatible server: what one machine has made, another one need not make again."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from support.project import Project
from support.repro import ran
from support.server import free_port
from support.stages import digests


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of moto's server with a bucket `store`. Credentials are in the environment, as usual."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    port = free_port()
    server = subprocess.Popen(
        [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{url}/store", method="PUT")).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_a_run_is_pushed_cloned_pulled_and_up_to_date(finished_copy: Project, s3: str, tmp_path: Path) -> None:
    project = finished_copy
    project.env |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    project.dvc("remote", "add", "--default", "store", "s3://store/trnlora")
    project.dvc("remote", "modify", "store", "endpointurl", s3)
    project.commit("The store")
    project.dvc("push")
    made = {name: digests(project.root / "artifacts" / name) for name in ("model", "shards", "lora_adapter", "adapter")}

    elsewhere = Project(tmp_path / "elsewhere")
    elsewhere.env = project.env
    subprocess.run(["git", "clone", "-q", project.root, elsewhere.root], check=True)
    (elsewhere.root / ".venv").symlink_to(sys.prefix)
    elsewhere.dvc("pull", "flatten_adapter", "--with-deps", "--allow-missing")
    for name in ("model", "lora_adapter", "adapter"):
        assert digests(elsewhere.root / "artifacts" / name) == made[name]
    assert not (elsewhere.root / "artifacts/shards").exists()  # push: false
    assert ran(elsewhere.dvc("repro", "--allow-missing", "flatten_adapter")) == []

    # A new learning rate needs the shards. They are made again with the same bytes; no other earlier stage runs.
    elsewhere.set_params(train={"lr": 5.0e-3})
    rerun = ran(elsewhere.dvc("repro", "flatten_adapter"))
    assert rerun == ["check_params", "convert_nxd", "finetune_lora", "flatten_adapter"]
    assert digests(elsewhere.root / "artifacts/shards") == made["shards"]
    elsewhere.commit("Another learning rate")
    shutil.rmtree(elsewhere.root / ".dvc/cache")  # so that the next command reads from the store
    elsewhere.dvc("get", "--rev", "HEAD~1", "--out", "reports/first", ".", "artifacts/adapter")
    assert digests(elsewhere.root / "reports/first") == made["adapter"]


@pytest.mark.long
def test_rows_in_a_bucket_are_imported_and_a_newer_version_is_noticed(finished_copy: Project, s3: str) -> None:
    project = finished_copy
    project.env |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    bucket = boto3.client("s3", endpoint_url=s3)

    def put(last: int) -> None:
        lines = (json.dumps({"prompt": f"{n} + 1?", "completion": str(n + 1)}) + "\n" for n in range(last))
        bucket.put_object(Bucket="store", Key="mine.jsonl", Body="".join(lines).encode())

    def doctor() -> str:
        return project.run(".venv/bin/python", "tools/doctor.py", check=False)

    put(60)
    project.dvc("remote", "add", "store", "s3://store")
    project.dvc("remote", "modify", "store", "endpointurl", s3)
    project.dvc("import-url", "remote://store/mine.jsonl", "data/mine.jsonl")
    assert "data/mine.jsonl.dvc is what remote://store/mine.jsonl has" in doctor()
    project.set_params(data={"source": "path://data/mine.jsonl"})
    assert ran(project.dvc("repro", "prepare_data")) == ["check_params", "prepare_data"]
    assert ran(project.dvc("repro", "prepare_data")) == []
    put(70)
    assert ran(project.dvc("repro", "prepare_data")) == []  # the version that was imported
    assert "data/mine.jsonl.dvc: remote://store/mine.jsonl has changed; `dvc update" in doctor()
    project.dvc("update", "data/mine.jsonl.dvc")
    assert ran(project.dvc("repro", "prepare_data")) == ["prepare_data"]
    metrics = json.loads((project.root / "metrics/prepare_data.json").read_text("utf-8"))
    assert metrics["rows_read"] == 70
