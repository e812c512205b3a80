"""vLLM on Trainium: the kind that the installed packages imply, each kind's exact command, its files and its graphs."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from support import ROOT

from trnlora import paths
from trnlora.backends.python_environment import with_own_bin
from trnlora.errors import UserError
from trnlora.files import SUMS
from trnlora.params import Params
from trnlora.profiles import load_profile
from trnlora.serving import vllm_neuron
from trnlora.serving.adapters import Adapter, check_adapter, check_own_adapter
from trnlora.serving.neuron_lora import name_adapters_in_compiled, write_zero_adapter
from trnlora.serving.vllm_args import PRIVACY_ENV
from trnlora.serving.vllm_neuron import (
    Launch,
    NeuronServer,
    compiled_folder,
    container_command,
    detect_server,
    find_vllm,
    merged_args,
    merged_environment,
    neuron_launch,
    plugin_args,
)

PARAMS = load_profile("llama3-8b-trn2-nxd", ROOT / "profiles")
PYTHON = "/opt/aws_neuronx_venv_pytorch_inference_vllm_0_16/bin/python"
NXDI = {"vllm": "0.16.0", "vllm-neuron": "0.5.0", "neuronx-distributed-inference": "0.10.18399", "neuronx-cc": "2.26"}
TORCH_NEURON = {"vllm": "0.24.0", "vllm-neuron": "0.24.0.1.1.0", "neuronx-distributed-inference": None}
COMMON = "--dtype bfloat16 --tensor-parallel-size 32 --max-model-len 8192 --max-num-seqs 16"
# Greedy unless a request says otherwise, whatever the model's generation_config.json says.
SAMPLING = [
    *("--generation-config", "vllm", "--override-generation-config"),
    '{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, '
    '"presence_penalty": 0.0, "frequency_penalty": 0.0}',
]
END = "--chat-template {scratch}/chat.jinja --middleware trnlora.serving.access.Access --host 127.0.0.1 --port 8000"


def with_params(params: Params, **sections: dict[str, Any]) -> Params:
    changed = {section: getattr(params, section).model_copy(update=values) for section, values in sections.items()}
    return params.model_copy(update=changed)


@pytest.mark.parametrize(
    ("plugin", "nxdi", "kind"),
    [
        ("0.2.2+lts", "0.6.9230", "plugin"),
        ("0.4.1", "0.8.16251", "plugin"),
        ("0.5.0", "0.10.18399", "plugin"),
        ("0.6.0", "0.9.17334", "plugin"),  # as the release notes of SDK 2.29 and 2.30 list it
        ("0.16.0.1", "0.10.18399", "plugin"),  # as those of 2.31.1 do
        ("0.21.0.1.0.0", None, "merged"),
        ("0.24.0.1.1.0", None, "merged"),
    ],
)
def test_the_kind_of_server_follows_from_the_packages(plugin: str, nxdi: str | None, kind: str) -> None:
    versions = {"vllm-neuron": plugin, "vllm": "0.16.0", "neuronx-distributed-inference": nxdi}
    assert detect_server(versions) == NeuronServer(kind)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, r"neuron\.vllm_python has no vllm-neuron"),
        ({"vllm": "0.9.0.dev0+neuron"}, r"neuron\.vllm_python has no vllm-neuron"),  # AWS's fork, up to SDK 2.26
        (NXDI | {"vllm-neuron": "0.2.0"}, "vllm-neuron 0.2.0 .* does not serve adapters"),
        (NXDI | {"vllm-neuron": "0.3.1"}, "vllm-neuron 0.3.1 .* does not serve adapters"),
    ],
)
def test_an_environment_that_cannot_serve_is_refused(versions: dict[str, str | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect_server(versions)


def test_a_python_that_does_not_run_is_refused() -> None:
    with pytest.raises(UserError, match="/nowhere/python is not an executable Python interpreter"):
        find_vllm(with_params(PARAMS, neuron={"vllm_python": "/nowhere/python"}))


@pytest.fixture
def project(tmp_path: Path, adapter: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tiny Llama and its adapter, where vllm_python has the packages in NXDI."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/model").symlink_to(tiny_llama)
    (tmp_path / "artifacts/adapter").symlink_to(adapter)
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm_neuron, "installed", lambda python, packages: NXDI)
    return tmp_path


@pytest.fixture
def tuned(project: Path) -> Adapter:
    lora = PARAMS.lora.model_copy(update={"target_modules": ["qkv_proj"]})
    return check_own_adapter(paths.ADAPTER, paths.MODEL, lora, "tuned")


def launch(project: Path, tuned: Adapter, params: Params = PARAMS) -> Launch:
    return neuron_launch(params, tuned, "127.0.0.1", 8000, project / "scratch/chat.jinja")


def test_plugin(project: Path, tuned: Adapter) -> None:
    """Arguments: multi-LoRA tutorial and README.md of vllm-neuron 0.5.0; files: NxDI, lora_serving/config.py."""
    server = launch(project, tuned)
    scratch = project / "scratch"
    config = {
        "max_prompt_length": 8192,
        "override_neuron_config": {"lora_ckpt_json": f"{scratch}/lora.json"},
    }
    assert server.command == [
        *f"{PYTHON} -m vllm.entrypoints.openai.api_server --model artifacts/model {COMMON}".split(),
        *SAMPLING,
        *["--no-enable-prefix-caching", "--no-enable-chunked-prefill", "--num-gpu-blocks-override", "16"],
        *["--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "16"],
        *("--additional-config", json.dumps(config)),
        *("--lora-modules", f"tuned={project}/artifacts/adapter", f"base={scratch}/base"),
        *f"--served-model-name no-adapter {END.format(scratch=scratch)}".split(),
    ]
    assert server.models == ["base", "tuned"]
    assert server.env["VLLM_NEURON_FRAMEWORK"] == "neuronx-distributed-inference"
    assert server.env["NEURON_RT_NUM_CORES"] == "32"
    assert server.env["NEURON_LOGICAL_NC_CONFIG"] == "2"
    assert server.env["NEURON_COMPILED_ARTIFACTS"] == str(server.compiled)
    folders = {"tuned": f"{project}/artifacts/adapter"[1:], "base": f"{scratch}/base"[1:]}
    assert json.loads((scratch / "lora.json").read_text("utf-8")) == {
        "lora-ckpt-dir": "/",
        "lora-ckpt-paths": folders,
        "lora-ckpt-paths-cpu": folders,
    }


def test_the_base_model_is_an_adapter_of_zeros_in_the_form_of_the_trained_one(tuned: Adapter, tmp_path: Path) -> None:
    write_zero_adapter(tuned.folder, tmp_path / "zero")
    zero = check_adapter(tmp_path / "zero", paths.MODEL, "base")
    assert (zero.r, zero.modules) == (tuned.r, tuned.modules)
    assert not any(tensor.any() for tensor in load_file(tmp_path / "zero/adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("profile", "python", "common"),
    [
        ("llama3-8b-trn2-nxd", PYTHON, COMMON),
        ("llama3-8b-trn2", sys.executable, COMMON.replace("-size 32", "-size 4")),
    ],
)
def test_merged(
    project: Path, tuned: Adapter, monkeypatch: pytest.MonkeyPatch, profile: str, python: str, common: str
) -> None:
    """Arguments and variables: vllm-neuron/docs, as vllm_neuron.py names them."""
    monkeypatch.setattr(vllm_neuron, "installed", lambda python, packages: TORCH_NEURON)
    params = load_profile(profile, ROOT / "profiles")
    for number in range(16):
        (project / f"infiniband/rdmap{number}").mkdir(parents=True)
    monkeypatch.setattr(vllm_neuron, "EFA_DEVICES", project / "infiniband")
    with pytest.raises(UserError, match=r"set flatten\.merged_model: true"):
        launch(project, tuned, params)
    paths.MERGED.mkdir()
    (paths.MERGED / "config.json").write_text("{}")
    server = launch(project, tuned, params)
    buckets = {"num_batched_tokens_buckets": [2048], "kv_segment_size_buckets": [2048]}
    assert server.command == [
        *f"{python} -m vllm.entrypoints.cli.main serve artifacts/merged {common}".split(),
        *SAMPLING,
        *["--max-num-batched-tokens", "2048", "--enable-prefix-caching", "--additional-config"],
        *(json.dumps({"neuron_config": buckets}), "--served-model-name", "tuned"),
        *END.format(scratch=project / "scratch").split(),
    ]
    assert server.models == ["tuned"]
    assert server.compiled == Path("/var/tmp/neuron-compile-cache/vllm")
    assert server.env == PRIVACY_ENV | {
        "NEURON_LOGICAL_NC_CONFIG": "2",
        "VLLM_NEURON_COMPILATION_TIMEOUT": "1200",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1200",
        "VLLM_CACHE_ROOT": "/var/tmp/neuron-compile-cache/vllm",
    }
    assert list((project / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("length", "segment"), [(16384, 2048), (2049, 2048), (2048, 1024), (1024, 512), (513, 512), (512, None), (64, None)]
)
def test_the_merged_model_starts_with_every_length(length: int, segment: int | None) -> None:
    """Prompts are computed in segments shorter than the longest, or at once without prefix caching."""
    args = merged_args(with_params(PARAMS, serve={"max_model_len": length}), paths.MERGED)
    config = args["additional_config"]["neuron_config"]
    assert args["max_num_batched_tokens"] == (segment or length)
    assert config["num_batched_tokens_buckets"] == [segment or length]
    assert config.get("kv_segment_size_buckets") == ([segment] if segment else None)
    assert args["enable_prefix_caching"] == (segment is not None)


def test_settings_of_the_merged_models_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own are kept, graphs are on local disk, and a machine without EFA, or with one device, starts."""
    monkeypatch.setattr(vllm_neuron, "EFA_DEVICES", tmp_path)
    (tmp_path / "rdmap0").mkdir()
    monkeypatch.setenv("VLLM_NEURON_COMPILATION_TIMEOUT", "6000")
    env = merged_environment(with_params(PARAMS, neuron={"compile_cache": "s3://bucket/cache"}))
    assert env["VLLM_CACHE_ROOT"] == "/var/tmp/neuron-compile-cache/vllm"
    assert env["VLLM_NEURON_COMPILATION_TIMEOUT"] == "6000"
    assert env["NEURON_SKIP_EFA_AFFINITY"] == "1"


def test_the_new_plugin_is_refused_on_trn1(project: Path, tuned: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_neuron, "installed", lambda python, packages: TORCH_NEURON)
    with pytest.raises(UserError, match=r"vllm-neuron 0\.24\.0\.1\.1\.0 runs on trn2 and newer, not on trn1"):
        launch(project, tuned, with_params(PARAMS, convert={"hw_backend": "trn1"}))


def folder(
    tuned: Adapter, params: Params = PARAMS, count: int = 1, versions: dict[str, str | None] | None = None
) -> Path:
    adapters = {f"adapter-{number}": tuned for number in range(count)}
    args = plugin_args(params, adapters, Path(f"/tmp/{os.urandom(4).hex()}/lora.json"))
    return compiled_folder(params, args, adapters, versions or dict(NXDI))


def test_the_same_engine_finds_its_graphs_again(project: Path, tuned: Adapter) -> None:
    assert folder(tuned) == folder(tuned)
    assert folder(tuned).parent == Path("/var/tmp/neuron-compile-cache/served")
    elsewhere = with_params(PARAMS, neuron={"compile_cache": "cache"})
    assert folder(tuned, elsewhere) == project / "cache/served" / folder(tuned).name
    # The plugin reads and writes a folder: those of a cache on S3 are on local disk.
    on_s3 = with_params(PARAMS, neuron={"compile_cache": "s3://bucket/cache"})
    assert folder(tuned, on_s3) == folder(tuned)
    # Sampling is not part of the graphs.
    assert tuned.record
    hot = tuned.record.generation.model_copy(update={"temperature": 0.7})
    assert folder(replace(tuned, record=tuned.record.model_copy(update={"generation": hot}))) == folder(tuned)


@pytest.mark.parametrize(
    "change",
    [
        {"convert": {"tp_size": 16}},
        {"convert": {"hw_backend": "trn1"}},
        {"neuron": {"logical_core_size": 1}},
        {"serve": {"max_model_len": 4096}},
        {"serve": {"max_num_seqs": 8}},
        {"serve": {"max_loras": 4}},
        {"lora": {"r": 32}},
        {"model": {"dtype": "float16"}},
        {"versions": {"vllm": "0.16.1"}},
        {"versions": {"vllm-neuron": "0.5.1"}},
        {"versions": {"neuronx-distributed-inference": "0.10.1"}},
        {"versions": {"neuronx-cc": "2.27"}},
        {"adapter": {"r": 8}},
        {"adapter": {"modules": frozenset({"q_proj"})}},
        {"count": 3},
        {"model files": None},
    ],
    ids=str,
)
def test_whatever_shapes_the_graphs_changes_their_folder(project: Path, tuned: Adapter, change: dict[str, Any]) -> None:
    before = folder(tuned)
    changed = dict(change)
    adapter = replace(tuned, **changed.pop("adapter", {}))
    versions = NXDI | changed.pop("versions", {})
    count = changed.pop("count", 1)
    if "model files" in changed:
        changed.pop("model files")
        (project / "artifacts/model").unlink()
        (project / "artifacts/model").mkdir()
        (project / "artifacts/model" / SUMS).write_text("0  model.safetensors\n", "utf-8")
    assert folder(adapter, with_params(PARAMS, **changed), count, versions) != before


def test_a_model_without_checksums_is_refused(project: Path, tuned: Adapter) -> None:
    (project / "artifacts/model").unlink()
    with pytest.raises(UserError, match=r"artifacts/model/SHA256SUMS is missing"):
        folder(tuned)


def test_compiled_graphs_name_the_adapters_of_this_start(tmp_path: Path) -> None:
    """tests/neuron/test_nxdi.py reads the result with NxDI."""
    name_adapters_in_compiled(tmp_path, {"tuned": tmp_path / "tuned"})  # nothing compiled yet
    assert list(tmp_path.iterdir()) == []
    lora = {"max_loras": 2, "lora_ckpt_json": "/gone/lora.json", "lora_ckpt_paths": {"base": "/gone/base"}}
    file = tmp_path / "neuron_config.json"
    file.write_text(json.dumps({"hidden_size": 1, "neuron_config": {"seq_len": 2, "lora_config": lora}}), "utf-8")
    name_adapters_in_compiled(tmp_path, {"tuned": tmp_path / "tuned"})
    named = {"tuned": f"{tmp_path}/tuned"}
    expected = {"max_loras": 2, "lora_ckpt_json": None, "lora_ckpt_paths": named, "lora_ckpt_paths_cpu": named}
    assert json.loads(file.read_text("utf-8")) == {
        "hidden_size": 1,
        "neuron_config": {"seq_len": 2, "lora_config": expected},
    }


def test_the_container_sees_the_devices_and_is_not_privileged(project: Path, tuned: Adapter) -> None:
    server = launch(project, tuned)
    run = container_command(server.env, server.command, "pytorch-inference-neuronx:0.16", [Path("/p"), Path("/tmp/x")])
    assert run[:3] == ["docker", "run", "--rm"]
    devices = [str(path) for path in sorted(Path("/dev").glob("neuron*"))] or ["/dev/neuron0"]
    assert [word for word in run if word.startswith("--device")] == [f"--device={path}" for path in devices]
    assert {"--volume=/p:/p", "--volume=/tmp/x:/tmp/x"} <= set(run)
    assert not any("privileged" in word for word in run)
    at = run.index("pytorch-inference-neuronx:0.16")
    assert run[at - 2 : at] == ["--entrypoint", "python"]
    assert run[at + 1 :] == server.command[1:]


def test_the_folder_of_the_python_is_first_on_path() -> None:
    assert with_own_bin("/venv/bin/python", "/usr/bin:/bin") == "/venv/bin:/usr/bin:/bin"
    assert with_own_bin("/venv/bin/python", "/venv/bin:/bin") == "/venv/bin:/bin"
    assert with_own_bin("/venv/bin/python", "") == "/venv/bin"


def test_a_container_of_the_native_sdk_needs_no_vllm_here(
    project: Path, tuned: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trnlora.serving.vllm_neuron.installed", lambda python, packages: None)
    (project / "artifacts/merged").mkdir()
    (project / "artifacts/merged/config.json").write_text("{}", "utf-8")
    native = load_profile("llama3-8b-trn2-3xl", ROOT / "profiles")
    server = neuron_launch(native, tuned, "127.0.0.1", 8000, project / "chat.jinja", in_container=True)
    assert server.command[:5] == ["python", "-m", "vllm.entrypoints.cli.main", "serve", "artifacts/merged"]
    with pytest.raises(UserError, match=r"neuron\.vllm_python .* is not an executable Python"):
        neuron_launch(PARAMS, tuned, "127.0.0.1", 8000, project / "chat.jinja", in_container=True)
