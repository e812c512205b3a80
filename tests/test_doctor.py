"""make doctor: what it finds on this machine, and what it reports as missing."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support import ROOT

from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.preflight.doctor import (
    check_disk,
    check_loggers,
    check_matmul_precision,
    check_memory,
    check_port,
    check_repository,
    check_vllm,
    check_vllm_on_cpu,
    checks,
)
from trnlora.profiles import load_profile
from trnlora.serving import vllm_neuron


def doctor(*arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/doctor.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def profile(name: str, **sections: dict[str, Any]) -> Params:
    """A profile with some of its keys changed."""
    params = load_profile(name, ROOT / "profiles")
    changed = {section: getattr(params, section).model_copy(update=values) for section, values in sections.items()}
    return params.model_copy(update=changed)


def test_passes_on_this_machine() -> None:
    done = doctor("--repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


def test_a_logger_that_is_not_installed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    params = profile("smollm2-135m-cpu", train={"loggers": ["wandb"]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = [check for check in checks(params) if getattr(check, "func", None) is check_loggers]
    assert len(refused) == 1
    with pytest.raises(UserError, match=r"train\.loggers names wandb, not installed here: run "):
        refused[0]()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A project whose requirements.lock, DVC lock, tp_size and memory needs do not fit this machine."""
    params = yaml.safe_load((ROOT / "profiles/smollm2-135m-cpu.yaml").read_text("utf-8"))
    params["convert"]["tp_size"] = 5
    params["train"]["dp_size"] = params["train"]["global_batch_size"] = 10_000
    lock = (ROOT / "requirements.lock").read_text("utf-8").replace("\ndvc==", "\ndvc==0.", 1)
    source = params["model"]["source"]
    config = {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    }  # fmt: skip
    files = {
        "requirements.lock": lock,
        ".dvc/tmp/rwlock": '{"half": ',
        "metrics/fetch_model.json": json.dumps({"source": source, "weights_gib": 0.5}),
        "artifacts/model/config.json": json.dumps(config),
        "params.yaml": yaml.safe_dump(params),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    author = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "."], cwd=tmp_path, check=True)
    return tmp_path


def test_names_every_problem(broken: Path) -> None:
    """One line for each failed check, and exit code 1."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        params = yaml.safe_load((broken / "params.yaml").read_text("utf-8"))
        params["serve"]["port"] = taken.getsockname()[1]
        (broken / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
        done = doctor(cwd=broken)
    assert done.returncode == 1
    wrong = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    expected = [
        "run `make setup`",
        "rwlock is unreadable",
        "data.source: there is no data/tasks.jsonl",
        "num_attention_heads % tp_size",
        "of memory available",
        "cannot bind",
    ]
    assert len(wrong) == len(expected), done.stdout
    for line, part in zip(wrong, expected, strict=True):
        assert part in line
    assert done.stderr == (
        "error: params.yaml cannot run on this machine: fix the lines with ✗, then run `make doctor`\n"
    )


@pytest.mark.parametrize("text", ["", "schema: '2.0'\nst", "stages: {}\n", "schema: '2.0'\nstages:\n  fetch_model:\n"])
def test_a_lock_file_that_a_killed_dvc_left_is_named(broken: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(broken)
    Path(".dvc/tmp/rwlock").unlink()
    assert check_repository().endswith("DVC not locked")
    shutil.copyfile(ROOT / "dvc.lock", "dvc.lock")
    assert check_repository().endswith("DVC not locked")
    Path("dvc.lock").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"^dvc\.lock is not whole, .*`git checkout dvc\.lock`, or delete it"):
        check_repository()


@pytest.mark.parametrize("text", ["", '{"write": {}, "rea'])
def test_a_lock_of_outputs_that_a_killed_dvc_left_is_named(
    broken: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(broken)
    Path(".dvc/tmp/rwlock").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"^\.dvc/tmp/rwlock is unreadable, .*: delete it when no dvc is running"):
        check_repository()


def test_names_what_a_trn2_profile_lacks_on_this_machine() -> None:
    done = doctor("--profile", "llama3-8b-trn2-nxd", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert re.search(r"^✗ backend \w+ lacks the Neuron driver .*; neuron.python /opt/aws", done.stdout, re.M)
    assert re.search(r"^✗ cannot reach the hub", done.stdout, re.M)
    assert re.search(r"^✓ HF_TOKEN is", done.stdout, re.M)
    assert re.search(r"^. [\d.]+ GiB of memory available, about 12[34]\b", done.stdout, re.M)  # 2 · 15 · dp 2 + 64


@pytest.mark.parametrize(
    ("name", "repro", "engine", "checked"),
    [
        ("llama3-8b-trn2-nxd", True, "device", True),
        ("llama3-8b-trn2-nxd", True, "host", False),
        ("llama3-8b-trn2-nxd", False, "host", True),  # `make serve`
        ("llama3-8b-trn2", False, "host", True),
        ("llama3-8b-trn2", True, "host", False),
        ("smollm2-135m-cpu", False, "host", False),
    ],
)
def test_the_vllm_of_the_device_is_checked_where_it_is_used(name: str, repro: bool, engine: str, checked: bool) -> None:
    params = profile(name, eval={"engine": engine}, neuron={"vllm_python": sys.executable})
    found = [check for check in checks(params, repro) if getattr(check, "func", None) is check_vllm]
    assert len(found) == checked
    for check in found:
        with pytest.raises(UserError, match=r"neuron\.vllm_python has no vllm-neuron"):
            check()


def test_the_vllm_of_the_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"vllm": "0.16.0", "vllm-neuron": "0.5.0", "neuronx-distributed-inference": "0.10.18399"}
    monkeypatch.setattr(vllm_neuron, "installed", lambda python, packages: versions)
    found = check_vllm(profile("llama3-8b-trn2-nxd", neuron={"vllm_python": "/x/python"}))
    assert found.startswith("vLLM of /x/python serves base and adapter: vllm 0.16.0, vllm-neuron 0.5.0")
    merged = {"vllm": "0.29.0", "vllm-neuron": "0.29.0.1.2.0", "neuronx-distributed-inference": None}
    monkeypatch.setattr(vllm_neuron, "installed", lambda python, packages: merged)
    assert "serves the merged model" in check_vllm(profile("llama3-8b-trn2"))
    with pytest.raises(UserError, match=r"does not load adapters: set flatten\.merged_model: true, so that"):
        check_vllm(profile("llama3-8b-trn2", flatten={"merged_model": False}))


def test_the_vllm_of_the_device_is_refused_on_trn1(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"vllm": "0.16.0", "vllm-neuron": "0.5.0", "neuronx-distributed-inference": "0.10.18399"}
    monkeypatch.setattr(vllm_neuron, "installed", lambda python, packages: versions)
    trn1 = profile("llama3-8b-trn1")
    with pytest.raises(
        UserError, match=r"neuronx-distributed-inference 0\.10\.18399 supports trn2 and newer, not trn1"
    ):
        check_vllm(trn1)


def test_memory_that_vllm_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host: 2 + 2 · 0.5 + its KV cache; on the device, the KV cache is there."""
    monkeypatch.chdir(tmp_path)
    sizes = {"train": {"dp_size": 1}, "convert": {"tp_size": 1}, "serve": {"kv_cache_gib": 9}}
    for engine, need in (("host", 12), ("device", 3)):
        params = profile("llama3-8b-trn2-nxd", eval={"engine": engine}, **sizes)
        Path("metrics").mkdir(exist_ok=True)
        recorded = {"source": params.model.source, "weights_gib": 0.5}
        Path("metrics/fetch_model.json").write_text(json.dumps(recorded), "utf-8")
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 << 30))
        assert check_memory(params).endswith(f"about {need} needed")


def test_disk_that_a_merged_model_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 10 GiB, shards, the model, and each again in DVC's cache."""
    monkeypatch.chdir(tmp_path)
    Path("metrics").mkdir()
    for merged, need in ((False, 71), (True, 91)):
        params = profile("smollm2-135m-cpu", flatten={"merged_model": merged})
        recorded = {"source": params.model.source, "weights_gib": 10}
        Path("metrics/fetch_model.json").write_text(json.dumps(recorded), "utf-8")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 30))
        assert check_disk(params) == f"100 GiB of disk free, about {need} needed"


def test_memory_that_training_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the weights per replica, and 1 GiB per process: 2 · 0.5 · 100 + 300."""
    monkeypatch.chdir(tmp_path)
    params = profile("smollm2-135m-cpu", train={"dp_size": 100})
    Path("metrics").mkdir()
    recorded = {"source": params.model.source, "weights_gib": 0.5}
    Path("metrics/fetch_model.json").write_text(json.dumps(recorded), "utf-8")
    with pytest.raises(UserError, match=r"GiB of memory available, about 400\.0 needed"):
        check_memory(params)
    recorded["source"] = "another"
    Path("metrics/fetch_model.json").write_text(json.dumps(recorded), "utf-8")
    assert "known once it is fetched" in check_memory(params)


def test_what_vllm_needs_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine it is there; a bare one is told all that it lacks, in one line, before anything runs."""
    params = profile("smollm2-135m-cpu")
    assert check_vllm_on_cpu in [getattr(check, "func", check) for check in checks(params, repro=True)]
    assert check_vllm_on_cpu(params).startswith("libnuma")

    def not_found(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", not_found)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("trnlora.processor.CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx sse4_2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"needs libnuma\.so\.1 .*libnuma1\), g\+\+ .*, Python's headers .*, AVX2"):
        check_vllm_on_cpu(params)


def test_products_in_bf16_need_their_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trnlora.processor.CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx512f avx512_bf16 avx512vbmi\n")
    assert check_matmul_precision()
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx512f avx512vbmi\n")
    with pytest.raises(UserError, match=r"bf16 needs a processor with AVX512-BF16 or AMX: write highest"):
        check_matmul_precision()
    assert check_matmul_precision not in checks(profile("smollm2-135m-cpu"))
    assert check_matmul_precision in checks(profile("smollm2-135m-cpu", train={"matmul_precision": "bf16"}))


def test_an_arm_processor_without_bfloat16_serves_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's M1 is one. There vLLM would end with an illegal instruction, after the training."""
    bf16 = profile("smollm2-135m-cpu", model={"dtype": "bfloat16"})
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr("trnlora.preflight.doctor.has_bf16", lambda: False)
    with pytest.raises(UserError, match=r"bfloat16 instructions .* set model\.dtype: float32"):
        check_vllm_on_cpu(bf16)
    assert check_vllm_on_cpu(profile("smollm2-135m-cpu"))
    monkeypatch.setattr("trnlora.preflight.doctor.has_bf16", lambda: True)
    assert check_vllm_on_cpu(bf16)


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        params = profile("smollm2-135m-cpu", serve={"host": "127.0.0.1", "port": taken.getsockname()[1]})
        with pytest.raises(UserError, match=r"cannot bind 127\.0\.0\.1"):
            check_port(params)
    assert "is free on 127.0.0.1" in check_port(params)


def test_preflight_does_not_import_torch() -> None:
    """`make repro` always runs doctor first, and importing torch takes seconds."""
    code = (
        "import sys; from trnlora.preflight import describe, doctor, precompile; "
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
