"""The checks before vLLM starts, then the real vLLM: the server, its signals, and the evaluation stage."""

import contextlib
import http.client
import itertools
import json
import os
import pty
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file
from support import ROOT
from support.adapters import lora_params, write_adapter
from support.evaluation import EvalWorker
from support.records import write_record
from support.server import Server, assert_one_line, free_port, script

from trnlora.errors import UserError
from trnlora.files import check_unlocked, write_sums
from trnlora.model.targets import peft_modules
from trnlora.params import Params
from trnlora.profiles import profile_values
from trnlora.serving.adapters import Adapter, check_adapter, check_own_adapter
from trnlora.serving.client import base_url
from trnlora.serving.process import reason
from trnlora.serving.server import relay
from trnlora.serving.vllm_args import PRIVACY_ENV, engine_args, max_lora_rank, serve_command
from trnlora.serving.vllm_neuron import neuron_launch

R = 16  # conftest.py's `workdir`
LORA = lora_params(r=R, lora_alpha=2 * R, target_modules=["qkv_proj"])
SERVED = ["tuned", "first", "second"]  # conftest.py's `server`


def params(**sections: dict[str, Any]) -> Params:
    values = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))
    for section, keys in sections.items():
        values[section] |= keys
    return Params.model_validate(values)


@pytest.fixture
def broken(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


# The adapter folder


def test_an_adapter_saved_by_peft_passes(adapter: Path, tiny_llama: Path) -> None:
    checked = check_own_adapter(adapter, tiny_llama, LORA, "tuned")
    assert checked == check_adapter(adapter, tiny_llama, "tuned")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text("utf-8")) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), "utf-8")

    return edit


def edit_tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def rename(new: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(FIRST)})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (shutil.rmtree, "is missing: run `dvc repro flatten_adapter`"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            r"unexpected: \['adapter_model.safetensors'\]",
        ),
        (lambda folder: (folder / "dp_rank_00_tp_rank_00_pp_rank_00.pt").touch(), "unexpected: .'dp_rank_00"),
        (edit_config(lora_alpha=None), "lora_alpha is missing: run `dvc repro flatten_adapter`"),
        (edit_config(peft_type=None), "peft_type is missing"),
        (edit_config(task_type=None), "lacks task_type"),
        (edit_config(r=8), "has r 8, but lora.r is 16"),
        (edit_config(target_modules=["qkv_proj"]), "target_modules q_proj, k_proj, v_proj"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"junk"), "is not a valid safetensors file"),
        (edit_tensors(rename(FIRST.replace("q_proj", "qkv_proj"))), r"qkv_proj\.lora_A\.weight matches no"),
        (edit_tensors(rename(FIRST.replace("layers.0", "layers.2"))), r"layers\.2\.\S+ matches no"),
        (edit_tensors(rename(FIRST.removeprefix("base_model.model."))), "matches no"),
        (edit_tensors(lambda tensors: tensors.pop(FIRST)), "lacks 1 tensors, the first is lora_A of q_proj in layer 0"),
        (edit_tensors(lambda t: t.update({FIRST: t[FIRST][:8].copy()})), r"has shape \[8, 192\], not \[16, 192\]"),
    ],
)
def test_an_adapter_that_vllm_would_not_apply_is_refused(
    break_it: Callable[[Path], None], message: str, broken: Path, tiny_llama: Path
) -> None:
    break_it(broken)
    with pytest.raises(UserError, match=message) as caught:
        check_own_adapter(broken, tiny_llama, LORA, "tuned")
    assert "\n" not in str(caught.value)


# vLLM's arguments


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (2, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_max_lora_rank_is_rounded_up_to_a_value_that_vllm_accepts(r: int, rank: int) -> None:
    assert engine_args(params(lora={"r": r}))["max_lora_rank"] == rank


def test_a_rank_that_vllm_cannot_serve_is_refused() -> None:
    with pytest.raises(UserError, match=r"LoRA rank 513 is above 512"):  # of an adapter from elsewhere
        max_lora_rank(513)


def test_the_server_gets_the_arguments_that_were_evaluated() -> None:
    args = engine_args(params())
    adapters = [Adapter("tuned", Path("artifacts/adapter"), R, frozenset(peft_modules(LORA.target_modules)))]
    command = serve_command(params(), "127.0.0.1", 8000, Path("template.jinja"), adapters)
    starts = [number for number, word in enumerate(command) if word.startswith("--")]
    flags = {command[a].removeprefix("--"): command[a + 1 : b] for a, b in itertools.pairwise([*starts, len(command)])}
    for name, value in args.items():
        expected = [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
        if isinstance(value, dict):
            expected = [json.dumps(value)]
        assert flags[name.replace("_", "-")] == expected
    assert flags["served-model-name"] == ["base"]
    assert flags["lora-modules"] == ["tuned=artifacts/adapter"]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("server", "http://server:8000"),
    ],
)
def test_a_client_reaches_the_address_that_the_server_binds(host: str, url: str) -> None:
    assert base_url(host, 8000) == url


# tools/serve.py and tools/smoke.py without a server


def test_dry_run_prints_command_and_environment_but_no_key(workdir: Path) -> None:
    done = script("tools/serve.py", "--dry-run", "--host", "0.0.0.0", cwd=workdir, VLLM_API_KEY="s3cret")
    assert done.returncode == 0, done.stderr
    assert all(f"{name}={value}" in done.stdout for name, value in PRIVACY_ENV.items())
    assert "--served-model-name base --lora-modules tuned=artifacts/adapter" in done.stdout
    assert "--middleware trnlora.serving.access.Access" in done.stdout
    assert "--host 0.0.0.0 --port 8000" in done.stdout
    assert "VLLM_API_KEY: set" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr


@pytest.fixture
def neuron_workdir(workdir: Path, tmp_path: Path) -> Path:
    """The model and adapter of `workdir`, params for Trainium, and a Python that has vllm-neuron's metadata."""
    (tmp_path / "artifacts").symlink_to(workdir / "artifacts")
    packages = {"vllm": "0.16.0", "vllm_neuron": "0.5.0", "neuronx_distributed_inference": "0.10.18399"}
    for name, version in packages.items():
        (tmp_path / "site" / f"{name}-{version}.dist-info").mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / "site" / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    values = profile_values("llama3-8b-trn2-nxd", ROOT / "profiles")
    values["lora"] |= {"r": R, "target_modules": ["qkv_proj"]}
    values["neuron"]["vllm_python"] = str(python)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    return tmp_path


def test_dry_run_on_neuron_prints_the_command_and_lora_json(neuron_workdir: Path) -> None:
    done = script("tools/serve.py", "--dry-run", cwd=neuron_workdir)
    assert done.returncode == 0, done.stderr
    env, command, lora_json, key = done.stdout.splitlines()
    assert "VLLM_NEURON_FRAMEWORK=neuronx-distributed-inference" in env.split()
    # libneuronpjrt-path and neuronx-cc are found in the environment of the Python that is started.
    assert any(setting.startswith(f"PATH={neuron_workdir}:") for setting in env.split())
    assert any(setting.startswith(f"PYTHONPATH={ROOT}") for setting in env.split())
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=0" in env.split()
    assert command.startswith(f"{neuron_workdir}/python -m vllm.entrypoints.openai.api_server --model artifacts/model")
    scratch = re.search(r'"lora_ckpt_json": "(\S+)/lora\.json"', command)
    assert scratch
    adapters = json.loads(lora_json.removeprefix("lora.json: "))
    folders = {"tuned": f"{neuron_workdir}/artifacts/adapter"[1:], "base": f"{scratch[1]}/base"[1:]}
    assert adapters == {"lora-ckpt-dir": "/", "lora-ckpt-paths": folders, "lora-ckpt-paths-cpu": folders}
    assert key.startswith("(VLLM_API_KEY: not set")


def test_dry_run_of_backend_neuron_prints_the_merged_models_server(neuron_workdir: Path) -> None:
    """vllm-neuron without NxD Inference. The whole command is in tests/test_neuron_serving.py."""
    shutil.rmtree(next((neuron_workdir / "site").glob("neuronx_distributed_inference-*")))
    values = profile_values("llama3-8b-trn2", ROOT / "profiles")
    values["lora"] |= {"r": R, "target_modules": ["qkv_proj"]}
    values["neuron"] |= {"vllm_python": str(neuron_workdir / "python"), "compile_cache": str(neuron_workdir / "cache")}
    (neuron_workdir / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    assert_one_line(script("tools/serve.py", "--dry-run", cwd=neuron_workdir), "there is no merged model", "dvc repro")
    artifacts = (neuron_workdir / "artifacts").readlink()
    (neuron_workdir / "artifacts").unlink()
    (neuron_workdir / "artifacts/merged").mkdir(parents=True)
    (neuron_workdir / "artifacts/merged/config.json").write_text("{}")
    for name in ("model", "adapter", "adapter.SHA256SUMS"):
        (neuron_workdir / "artifacts" / name).symlink_to(artifacts / name)
    done = script("tools/serve.py", "--dry-run", cwd=neuron_workdir)
    assert done.returncode == 0, done.stderr
    env, command, _ = done.stdout.splitlines()
    assert f"VLLM_CACHE_ROOT={neuron_workdir}/cache/vllm" in env.split()
    assert any(setting.startswith(f"PATH={neuron_workdir}:") for setting in env.split())
    assert f"{neuron_workdir}/python -m vllm.entrypoints.cli.main serve artifacts/merged " in command
    assert " --tensor-parallel-size 4 " in command
    assert "--served-model-name tuned" in command
    image = script("tools/serve.py", "--dry-run", "--container", "image:1", cwd=neuron_workdir)
    assert f"--volume={neuron_workdir}/cache/vllm:{neuron_workdir}/cache/vllm" in image.stdout


def test_cores_that_another_process_holds_are_not_served_on(neuron_workdir: Path, tmp_path: Path) -> None:
    """As neuron-ls of a trn2.48xlarge names a training run."""
    process = {"pid": 4711, "command": "python -u stages/finetune_lora.py"}
    devices = [{"nc_count": 4, "logical_neuroncore_config": 2, "neuron_processes": [process]}] * 16
    (tmp_path / "devices.json").write_text(json.dumps(devices), "utf-8")
    tool = tmp_path / "neuron-ls"
    tool.write_text(f"#!/bin/sh\ncat {tmp_path}/devices.json\n", "utf-8")
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = script("tools/serve.py", cwd=neuron_workdir, PATH=path)
    assert_one_line(done, "0 of 64 Neuron cores are free and 32 are needed", "process 4711 (python -u stages/finetune")
    assert script("tools/serve.py", "--dry-run", cwd=neuron_workdir, PATH=path).returncode == 0


def test_a_container_sees_the_compiled_graphs_and_has_its_own_path(neuron_workdir: Path) -> None:
    image = script("tools/serve.py", "--dry-run", "--container", "image:1", cwd=neuron_workdir)
    assert "docker run --rm" in image.stdout
    assert " image:1 -m vllm.entrypoints.openai.api_server --model artifacts/model" in image.stdout
    compiled = re.search(r"NEURON_COMPILED_ARTIFACTS=(\S+)", image.stdout)
    assert compiled
    assert f"--volume={compiled[1]}:{compiled[1]}" in image.stdout
    assert f"--volume={ROOT}:{ROOT}" in image.stdout
    assert f" PYTHONPATH={ROOT} " in image.stdout  # where it finds trnlora.serving.access
    assert " PATH=" not in image.stdout


def test_trn1_is_refused_by_an_nxdi_that_no_longer_supports_it(neuron_workdir: Path) -> None:
    params = yaml.safe_load((neuron_workdir / "params.yaml").read_text("utf-8"))
    params["convert"]["hw_backend"], params["neuron"]["logical_core_size"] = "trn1", 1
    (neuron_workdir / "params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    done = script("tools/serve.py", "--dry-run", cwd=neuron_workdir)
    assert_one_line(done, "neuronx-distributed-inference 0.10.18399 supports trn2 and newer, not trn1", "SDK 2.28")
    of_2_28 = neuron_workdir / "site/neuronx_distributed_inference-0.10.18399.dist-info/METADATA"
    of_2_28.write_text(of_2_28.read_text("utf-8").replace("0.10.18399", "0.8.16251"), "utf-8")
    assert script("tools/serve.py", "--dry-run", cwd=neuron_workdir).returncode == 0


def test_serve_on_neuron_refuses_a_family_that_nxdi_does_not_have(
    neuron_workdir: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (neuron_workdir / "artifacts").unlink()
    model = neuron_workdir / "artifacts" / "model"
    model.mkdir(parents=True)
    config = json.loads((tiny_llama / "config.json").read_text("utf-8"))
    granite = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config | granite), "utf-8")
    params = Params.model_validate(yaml.safe_load((neuron_workdir / "params.yaml").read_text("utf-8")))
    monkeypatch.chdir(neuron_workdir)
    tuned = Adapter("tuned", Path("artifacts/adapter"), R, frozenset())
    with pytest.raises(UserError, match="NxDI, which has no GraniteForCausalLM"):
        neuron_launch(params, tuned, "127.0.0.1", 8000, neuron_workdir / "chat.jinja")
    assert not (neuron_workdir / "lora.json").exists()


def test_serve_on_neuron_refuses_replicas_and_other_adapters(neuron_workdir: Path) -> None:
    done = script("tools/serve.py", "--dry-run", "--replicas", "2", cwd=neuron_workdir)
    assert_one_line(done, "on Trainium there is one replica per address")
    other = ("--adapters", f"other={neuron_workdir}/artifacts/adapter")
    done = script("tools/serve.py", "--dry-run", *other, cwd=neuron_workdir)
    assert_one_line(done, "on Trainium only the pipeline's adapter is served")


def test_serve_refuses_other_machines_without_a_key(workdir: Path) -> None:
    assert_one_line(script("tools/serve.py", "--host", "0.0.0.0", cwd=workdir), "0.0.0.0", "VLLM_API_KEY")
    assert_one_line(script("tools/serve.py", "--host", "0.0.0.0", cwd=workdir, VLLM_API_KEY=""), "VLLM_API_KEY")


def test_serve_names_a_port_in_use(workdir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_one_line(script("tools/serve.py", "--port", port, cwd=workdir), port, "in use", "PORT=")


def test_serve_names_what_is_missing(workdir: Path, tmp_path: Path) -> None:
    assert_one_line(script("tools/serve.py", cwd=tmp_path), "params.yaml is missing")
    shutil.copy(workdir / "params.yaml", tmp_path)
    assert_one_line(script("tools/serve.py", cwd=tmp_path), "artifacts/adapter is missing", "dvc repro")
    shutil.copytree(workdir / "artifacts" / "adapter", tmp_path / "artifacts" / "adapter")
    assert_one_line(script("tools/serve.py", cwd=tmp_path), "artifacts/adapter.SHA256SUMS is missing or damaged")
    shutil.copy(workdir / "artifacts" / "adapter.SHA256SUMS", tmp_path / "artifacts")
    assert_one_line(script("tools/serve.py", cwd=tmp_path), "artifacts/model/config.json is missing")


def test_smoke_without_a_server_ends_in_one_line(workdir: Path) -> None:
    done = script("tools/smoke.py", "--question", "?", "--port", str(free_port()), cwd=workdir)
    assert_one_line(done, "no server answers", "make serve")


def test_the_first_exception_in_the_output_is_the_reason() -> None:
    assert reason(["x", "ValueError: no room\n", "RuntimeError: Engine core initialization failed.\n"]) == "no room"
    pydantic = [
        "a.ValidationError: 1 validation error for M\n",
        "  Value error, too long [type=value_error]\n",
        "  See…\n",
    ]
    assert reason(pydantic).strip() == "Value error, too long"
    assert reason(["Killed\n"]) == "Killed"
    dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above).\n"
    assert reason(["RuntimeError: no kernel\n", dead]) == "no kernel"
    assert reason(["INFO: Shutting down\n", dead]).startswith("its engine was killed")


# What vLLM 0.32 printed when its engine was killed, shortened. Before that, one request failed and one succeeded.
DIED = """\
(APIServer pid=7) ERROR 11-24 11:38:40 [serving.py:9] Traceback (most recent call last):
(APIServer pid=7) ERROR 11-24 11:38:40 [serving.py:9]   File "serving.py", line 7, in create
(APIServer pid=7) ERROR 11-24 11:38:40 [serving.py:9] ValueError: not this one
INFO:     127.0.0.1:35918 - "POST /v1/completions HTTP/1.1" 200 OK
INFO:     127.0.0.1:35918 - "POST /v1/completions HTTP/1.1" 400 Bad Request
(APIServer pid=7) ERROR 11-24 11:38:42 [async_llm.py:906] AsyncLLM output_handler failed.
(APIServer pid=7) ERROR 11-24 11:38:42 [async_llm.py:906] Traceback (most recent call last):
(APIServer pid=7) ERROR 11-24 11:38:42 [async_llm.py:906]   File "async_llm.py", line 849, in output_handler
(APIServer pid=7) ERROR 11-24 11:38:42 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore …
INFO:     Shutting down
nanobind: leaked 4 instances!
"""


def test_relay_shows_the_last_line_of_a_traceback_and_nothing_after_the_engine_died(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log").write_text(DIED, "utf-8")
    kept: deque[str] = deque()
    ready = threading.Event()
    ready.set()
    with subprocess.Popen(["cat", tmp_path / "log"], stdout=subprocess.PIPE, text=True) as server:
        relay(server, kept, ready, threading.Event(), False)
    lines = DIED.splitlines()
    assert capsys.readouterr().out.splitlines() == lines[2:6]
    assert reason([*kept]).startswith("its engine was killed")


# The real server


@pytest.mark.slow
def test_both_models_answer_and_differ(server: Server) -> None:
    assert [model["id"] for model in server.request("/v1/models")["data"]] == ["base", *SERVED]
    prompt = "### Instruction:\nName the capital of France.\n\n### Response:\n"
    completions = [server.complete(model, prompt) for model in ("base", "tuned")]
    chats = [server.chat(model, "Name the capital of France.") for model in ("base", "tuned")]
    assert completions[0] != completions[1]
    # The dolly template makes the prompt above from this question, so the chat endpoint must give the same answers.
    assert [chat["choices"][0]["message"]["content"] for chat in chats] == completions


@pytest.mark.slow
def test_the_base_answers_the_same_while_the_adapter_is_used(server: Server) -> None:
    prompts = [f"### Instruction:\nCount to {n}.\n\n### Response:\n" for n in range(8)]
    expected = [server.complete("base", prompt, 64) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        tuned = [pool.submit(server.complete, "tuned", prompt, 64) for prompt in prompts]
        base = [pool.submit(server.complete, "base", prompt, 64) for prompt in prompts]
        assert [future.result() for future in base] == expected
        assert all(future.result() != text for future, text in zip(tuned, expected, strict=True))


@pytest.mark.slow
def test_a_stage_may_replace_what_the_server_has_loaded(server: Server, workdir: Path) -> None:
    """It is locked only until the server is ready."""
    assert server.process.is_running()
    for name in ("model", "adapter"):
        check_unlocked(workdir / "artifacts" / name)


@pytest.mark.slow
def test_smoke_prints_both_answers(server: Server, workdir: Path) -> None:
    done = script("tools/smoke.py", "--question", "Name a [bold]river.", "--port", str(server.port), cwd=workdir)
    assert done.returncode == 0, done.stderr
    assert "Name a [bold]river." in done.stdout
    assert re.search(r"base \(\d+\.\d\d s\).*tuned \(\d+\.\d\d s\)", done.stdout)


CLIENTS = 16


def send(port: int, path: str, content: bytes) -> tuple[int, Any]:
    """Status and parsed reply of one POST."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def hang_up(port: int, content: bytes, after: str) -> None:
    """Reset the connection of a streaming request when it is half sent, just sent, or after the first tokens."""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(f"{head}\r\n\r\n".encode() + (content[:20] if after == "half" else content))
        if after == "tokens":
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")


class Load:
    """One client that sends random requests one after another, and their results."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.draw = random.Random(seed)
        self.answered: Counter[str] = Counter()
        self.lost: list[str] = []

    def run(self, until: float) -> None:
        good = {"chat": self.chat, "completion": self.completion, "hang up": self.hang_up}
        while time.monotonic() < until:
            kind = self.draw.choice([*good, *BAD])
            try:
                good[kind]() if kind in good else self.refused(kind)
                self.answered[kind] += 1
            except Exception as error:
                self.lost.append(f"{kind}: {error!r}")

    def body(self, **more: Any) -> dict[str, Any]:
        model = self.draw.choice(["base", "tuned"])
        return {"model": model, "max_tokens": self.draw.randint(1, 48), "temperature": 0} | more

    def chat(self) -> None:
        messages = [{"role": "user", "content": f"Count to {self.draw.randint(1, 99)}."}]
        status, reply = send(self.port, "/v1/chat/completions", json.dumps(self.body(messages=messages)).encode())
        assert status == 200, reply
        assert reply["choices"][0]["finish_reason"] in ("stop", "length")

    def completion(self) -> None:
        prompt = "word " * self.draw.randint(1, 400)
        status, reply = send(self.port, "/v1/completions", json.dumps(self.body(prompt=prompt)).encode())
        assert status == 200, reply
        assert reply["choices"][0]["finish_reason"] in ("stop", "length")

    def refused(self, kind: str) -> None:
        content, allowed = BAD[kind]
        status, reply = send(self.port, "/v1/completions", content)
        assert status in allowed, (status, reply)
        assert reply["error"]["message"] if "error" in reply else reply["detail"]  # in vLLM's format or FastAPI's
        assert "Traceback" not in json.dumps(reply)

    def hang_up(self) -> None:
        content = json.dumps(self.body(prompt="Count.", stream=True, max_tokens=400)).encode()
        hang_up(self.port, content, self.draw.choice(["half", "sent", "tokens"]))


def completion(**body: Any) -> bytes:
    return json.dumps({"model": "tuned", "prompt": "Hello", "max_tokens": 4} | body).encode()


BAD: dict[str, tuple[bytes, set[int]]] = {
    "over-long prompt": (completion(prompt="word " * 3000), {400}),
    "over-long answer": (completion(max_tokens=100_000), {400}),
    "token outside the vocabulary": (completion(prompt=[999_999]), {400}),
    "unknown model": (completion(model="unknown"), {404}),
    "bad JSON": (completion()[:-1], {400, 422}),
    "not JSON": (b"\xff\xfe\x00", {400, 422}),
    "no prompt": (b'{"model": "tuned"}', {400, 422}),
    "wrong type": (completion(max_tokens="many"), {400, 422}),
    "out of range": (completion(temperature=-1), {400, 422}),
    "empty": (b"", {400, 422}),
}


@pytest.mark.parametrize(
    "seconds", [pytest.param(10, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.long)]
)
def test_parallel_clients_good_and_bad(server: Server, workdir: Path, seconds: int) -> None:
    """16 clients: no valid request fails; the others get a proper 4xx."""
    clients = [Load(server.port, seed) for seed in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda client: client.run(time.monotonic() + seconds), clients))
    total = sum((client.answered for client in clients), Counter())
    print(f"{CLIENTS} clients, {seconds} s, {total.total()} requests: {dict(total)}")
    assert [line for client in clients for line in client.lost] == []
    assert total.keys() == {"chat", "completion", "hang up", *BAD}
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=60) as reply:
        assert reply.status == 200
    assert script("tools/smoke.py", "--question", "?", "--port", str(server.port), cwd=workdir).returncode == 0
    assert "Traceback" not in server.log.read_text("utf-8")


@pytest.mark.slow
def test_the_server_exports_what_the_dashboard_queries(server: Server) -> None:
    """After a few requests, /metrics has every metric and label that launch/grafana-vllm.json queries."""
    exported = server.metrics()
    dashboard = json.loads((ROOT / "launch/grafana-vllm.json").read_text("utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    assert len(asked) >= 12
    for name in asked:
        assert re.search(rf"^{name}{{[^}}]*model_name=", exported, re.M), name
    assert re.search(r'^vllm:request_success_total{[^}]*finished_reason="length"', exported, re.M)
    assert re.search(r'^vllm:num_requests_running{[^}]*engine="0"', exported, re.M)


@pytest.mark.slow
def test_a_conversation_has_the_token_ids_of_training(server: Server, tiny_llama: Path) -> None:
    """What the chat endpoint gives the model for the last of several answers, against what training gave it."""
    from transformers import AutoTokenizer

    from trnlora.data.encode import RowEncoder
    from trnlora.data.formats import Message, Row
    from trnlora.data.templates import chat_messages, load_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    data = params().data
    template = load_template(data.prompt_template, data.template_kwargs, tokenizer)
    encoder = RowEncoder(tokenizer, template, 512, "drop", data.mask_history, data.special_tokens)
    turns = (
        Message("system", "Be brief."),
        Message("user", "What is it?", "A lamp — 등불."),
        Message("assistant", "A lamp."),
        Message("user", "And two of them?"),
        Message("assistant", "Lamps."),
    )
    [example], _ = encoder.encode([Row(1, turns, "talk", None)])
    asked = {"messages": chat_messages(template.name, turns[:-1]), "max_tokens": 1, "return_token_ids": True}
    body = json.dumps({"model": "tuned", **asked}).encode()
    status, reply = send(server.port, "/v1/chat/completions", body)
    assert status == 200, reply
    assert reply["prompt_token_ids"] == example.tokens[: example.labelled[-1][0]]


@pytest.mark.long
def test_serving_load_prints_a_line_for_each_number_of_clients(server: Server, workdir: Path) -> None:
    options = ("--requests", "2", "--input-len", "16", "--output-len", "8")
    url = f"http://127.0.0.1:{server.port}"
    done = script("bench/serving_load.py", "--url", url, "--clients", "1", "3", *options, cwd=workdir)
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert "tokens/s" in header
    figures = [[float(figure) for figure in line.split()] for line in lines]
    assert [row[0] for row in figures] == [1, 3]
    for _, requests, tokens, ttft_p50, ttft_p99, itl_p50, itl_p99 in figures:
        assert 0 < requests < tokens
        assert 0 < ttft_p50 <= ttft_p99
        assert 0 <= itl_p50 <= itl_p99  # 0.0 if a busy machine delivers several tokens at once
    refused = script("bench/serving_load.py", "--url", "http://127.0.0.1:9", cwd=workdir)
    assert_one_line(refused, "no server answers at http://127.0.0.1:9", "make serve")


@pytest.mark.long
def test_replicas_share_one_address(workdir: Path, tmp_path: Path) -> None:
    """Two engines: both receive requests and give the same answer."""
    two = Server(workdir, tmp_path, "--replicas", "2")
    try:
        prompt = "### Instruction:\nName the capital of France.\n\n### Response:\n"
        with ThreadPoolExecutor(8) as clients:
            answers = set(clients.map(lambda _: two.complete("tuned", prompt), range(16)))
        assert len(answers) == 1
        done = re.findall(r'^vllm:request_success_total{[^}]*engine="(\d)"[^}]*} ([\d.]+)$', two.metrics(), re.M)
        served = {engine: sum(float(count) for of, count in done if of == engine) for engine in ("0", "1")}
        assert sum(served.values()) == 16
        assert min(served.values()) > 0
        assert len(two.process.children(recursive=True)) >= 3  # vLLM's API server and its engines
    finally:
        two.stop()


@pytest.mark.slow
def test_a_server_that_cannot_start_ends_in_one_line(workdir: Path, tmp_path: Path) -> None:
    text = (workdir / "params.yaml").read_text("utf-8").replace("max_model_len: 1024", "max_model_len: 9999")
    (tmp_path / "params.yaml").write_text(text, "utf-8")
    done = script("tools/serve.py", "--params", tmp_path / "params.yaml", "--port", str(free_port()), cwd=workdir)
    assert_one_line(done, "vLLM did not start", "max_model_len (9999) is greater than the derived max_model_len")


# The real evaluation stage


def test_eval_names_what_is_missing_before_it_starts_vllm(evaluated: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(evaluated, tmp_path / "copy", symlinks=True))
    (copy / "metrics" / "flatten_adapter.json").write_text('{"peft_validation_loss": null}')
    assert_one_line(script("stages/eval_vllm.py", cwd=copy), "flatten_adapter.json has no number peft_validation_loss")
    (copy / "artifacts" / "prepared" / "test.jsonl").write_text("")
    write_sums(copy / "artifacts" / "prepared")
    assert_one_line(script("stages/eval_vllm.py", cwd=copy), "artifacts/prepared/test.jsonl has no rows")


@pytest.mark.slow
def test_eval_scores_base_and_adapter(evaluated: Path) -> None:
    (evaluated / "artifacts" / "answers.rejected.jsonl").write_text("of an earlier run\n")
    # with a terminal, for its progress bars
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (40, 120))
    command = [sys.executable, str(ROOT / "stages" / "eval_vllm.py")]
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    with subprocess.Popen(command, cwd=evaluated, env=env, stdout=subprocess.DEVNULL, stderr=inside) as process:
        os.close(inside)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(terminal, 4096):
                shown += chunk
    os.close(terminal)
    assert process.returncode == 0, shown.decode()
    assert b"tuned answers: 100%" in shown
    assert b"Warning" not in shown
    metrics = json.loads((evaluated / "metrics" / "eval_vllm.json").read_text("utf-8"))
    assert metrics["prompts"] == 10
    assert metrics["loss_gap_peft"] < 1e-4  # fp32: the same loss up to rounding
    assert metrics["changed_fraction"] >= 0.5
    assert abs(metrics["base"]["loss"] - metrics["tuned"]["loss"]) > 1e-3
    answers = [json.loads(line) for line in (evaluated / "artifacts" / "answers.jsonl").read_text("utf-8").splitlines()]
    assert len(answers) == 10
    assert answers[0]["id"] == 2  # the line in tasks.jsonl
    assert all(row["tuned_finish_reason"] in ("stop", "length") for row in answers)
    categories = {row["category"] for row in answers}
    for model in ("base", "tuned"):
        assert metrics[model]["exact_match_by_category"].keys() == categories
    truncated = sum(row["tuned_finish_reason"] == "length" for row in answers) / 10
    assert metrics["tuned"]["truncated_fraction"] == pytest.approx(truncated)
    assert metrics["tuned"]["response_tokens"] <= 16
    points = json.loads((evaluated / "plots" / "exact_match_by_category.json").read_text("utf-8"))
    assert {(point["category"], point["model"]) for point in points} == {
        (category, model) for category in categories for model in ("base", "tuned")
    }
    assert not (evaluated / "artifacts" / "answers.rejected.jsonl").exists()


@pytest.mark.slow
def test_eval_refuses_an_adapter_without_effect(
    evaluated: Path, eval_worker: EvalWorker, tiny_llama: Path, tmp_path: Path
) -> None:
    """In an engine that has just evaluated an adapter that has an effect and is also called `tuned`."""
    copy = Path(shutil.copytree(evaluated, tmp_path / "copy", symlinks=True))
    done = eval_worker.evaluate(copy)
    assert done.returncode == 0, done.stderr
    (copy / "artifacts" / "answers.jsonl").unlink()
    (copy / "metrics" / "eval_vllm.json").unlink()

    other = Path(shutil.copytree(copy, tmp_path / "other", symlinks=True))
    shutil.rmtree(other / "artifacts" / "adapter")
    write_adapter(tiny_llama, other / "artifacts" / "adapter", scale=0.0)
    (other / "artifacts" / "adapter" / "README.md").unlink()
    write_record(other / "artifacts" / "adapter", tiny_llama, prepared=other / "artifacts" / "prepared")
    write_sums(other / "artifacts" / "adapter", other / "artifacts" / "adapter.SHA256SUMS")
    done = eval_worker.evaluate(other)
    assert_one_line(done, "too little effect", "0.0% of the answers changed", "from that of PEFT", "rejected.jsonl")
    assert len((other / "artifacts" / "answers.rejected.jsonl").read_text("utf-8").splitlines()) == 10
    assert not (other / "artifacts" / "answers.jsonl").exists()
    assert not (other / "metrics" / "eval_vllm.json").exists()


@pytest.mark.slow
def test_eval_whose_engine_refuses_ends_in_one_line(evaluated: Path, eval_worker: EvalWorker, tmp_path: Path) -> None:
    """A prompt longer than serve.max_model_len, in the middle of the evaluation."""
    copy = Path(shutil.copytree(evaluated, tmp_path / "copy", symlinks=True))
    path = copy / "artifacts" / "prepared" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows[0]["token_ids"] *= 100
    rows[0]["labelled"][-1] = [len(rows[0]["token_ids"]) - 1, len(rows[0]["token_ids"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    write_sums(path.parent)
    write_record(copy / "artifacts" / "adapter", copy / "artifacts" / "model", prepared=path.parent)
    write_sums(copy / "artifacts" / "adapter", copy / "artifacts" / "adapter.SHA256SUMS")
    (copy / "artifacts" / "answers.jsonl").unlink(missing_ok=True)
    done = eval_worker.evaluate(copy)
    assert "base: loss" in done.stdout
    assert_one_line(done, "vLLM failed (base answers): ", "1024", "`serve` in params")
    assert not (copy / "artifacts" / "answers.jsonl").exists()


@pytest.mark.slow
def test_eval_that_cannot_start_vllm_ends_in_one_line(evaluated: Path, tmp_path: Path) -> None:
    text = (evaluated / "params.yaml").read_text("utf-8").replace("kv_cache_gib: 1", "kv_cache_gib: 60000")
    (tmp_path / "params.yaml").write_text(text, "utf-8")
    done = script("stages/eval_vllm.py", "--params", tmp_path / "params.yaml", cwd=evaluated)
    assert_one_line(
        done, "vLLM did not start: Available memory", "less than requested memory for kv", "`serve` in params"
    )
