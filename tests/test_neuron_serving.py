"""vLLM's server on Trainium: the kind that the installed versions imply, and each kind's exact command and files."""

import json
from pathlib import Path

import pytest

from trnlora import paths
from trnlora.errors import UserError
from trnlora.profiles import load_profile
from trnlora.serving.vllm_neuron import NeuronServer, container_command, detect_server, lora_json, neuron_command

ROOT = Path(__file__).parents[1]
PARAMS = load_profile("llama3-8b-trn2-nxd", ROOT / "profiles")
COMMON = (
    "/opt/aws_neuronx_venv_pytorch_inference_vllm_0_16/bin/python -m vllm.entrypoints.openai.api_server "
    "--model {model} --dtype bfloat16 --tensor-parallel-size 32 --max-model-len 8192 --max-num-seqs 16 "
    "--no-enable-prefix-caching --no-enable-chunked-prefill"
)
END = "--chat-template chat.jinja --host 127.0.0.1 --port 8000"


@pytest.mark.parametrize(
    ("plugin", "vllm", "kind"),
    [
        ("0.2.0", "0.11.0", "merged"),  # raises NotImplementedError for LoRA
        ("0.4.1", "0.13.0", "plugin"),
        ("0.5.0", "0.16.0", "plugin"),
        ("0.5.2+2.31", "0.16.0", "plugin"),
        ("0.21.0.1.0.0", "0.21.0", "merged"),
        ("0.24.0.1.1.0", "0.24.0", "merged"),
        (None, "0.9.0.dev0+neuron", "fork"),
    ],
)
def test_the_kind_of_server_follows_from_the_versions(plugin: str | None, vllm: str, kind: str) -> None:
    assert detect_server({"vllm-neuron": plugin, "vllm": vllm}) == NeuronServer(kind)


def test_an_environment_without_vllm_is_refused() -> None:
    with pytest.raises(UserError, match=r"neuron\.vllm_python has no vllm"):
        detect_server({})


def command(server: NeuronServer) -> tuple[dict[str, str], list[str]]:
    return neuron_command(PARAMS, server, "127.0.0.1", 8000, Path("chat.jinja"), Path("/tmp/lora.json"))


def test_plugin() -> None:
    env, words = command(NeuronServer.PLUGIN)
    adapter = paths.ADAPTER.absolute()
    overrides = '{"override_neuron_config": {"lora_ckpt_json": "/tmp/lora.json"}}'
    assert words == [
        *COMMON.format(model="artifacts/model").split(),
        *["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "1", "--max-lora-rank", "16"],
        *("--lora-modules", f"tuned={adapter}", "--additional-config", overrides),
        *f"--served-model-name base {END}".split(),
    ]
    assert env["VLLM_NEURON_FRAMEWORK"] == "neuronx-distributed-inference"
    assert env["NEURON_RT_NUM_CORES"] == "32"
    assert env["NEURON_LOGICAL_NC_CONFIG"] == "2"
    assert env["NEURON_COMPILED_ARTIFACTS"] == "/var/tmp/neuron-compile-cache/served-plugin"
    assert lora_json() == {
        "lora-ckpt-dir": str(adapter.parent),
        "lora-ckpt-paths": {"tuned": "adapter"},
        "lora-ckpt-paths-cpu": {"tuned": "adapter"},
    }


def test_fork() -> None:
    _, words = command(NeuronServer.FORK)
    adapter = paths.ADAPTER.absolute()
    assert words == [
        *COMMON.format(model="artifacts/model").split(),
        *f"--device neuron --enable-lora --max-loras 1 --max-lora-rank 16 --lora-modules tuned={adapter}".split(),
        *("--override-neuron-config", json.dumps({"lora_modules": {"tuned": str(adapter)}})),
        *f"--served-model-name base {END}".split(),
    ]


def test_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"set flatten\.merged_model: true"):
        command(NeuronServer.MERGED)
    paths.MERGED.mkdir(parents=True)
    (paths.MERGED / "config.json").write_text("{}")
    _, words = command(NeuronServer.MERGED)
    assert words == f"{COMMON.format(model='artifacts/merged')} --served-model-name tuned {END}".split()


def test_the_container_sees_the_devices_and_is_not_privileged() -> None:
    env, words = command(NeuronServer.PLUGIN)
    run = container_command(env, words, "pytorch-inference-neuronx:0.16", [Path("/project"), Path("/tmp/x")])
    assert run[:3] == ["docker", "run", "--rm"]
    devices = [str(path) for path in sorted(Path("/dev").glob("neuron*"))] or ["/dev/neuron0"]
    assert [word for word in run if word.startswith("--device")] == [f"--device={path}" for path in devices]
    assert {"--volume=/project:/project", "--volume=/tmp/x:/tmp/x"} <= set(run)
    assert not any("privileged" in word for word in run)
    at = run.index("pytorch-inference-neuronx:0.16")
    assert run[at - 2 : at] == ["--entrypoint", "python"]
    assert run[at + 1 :] == words[1:]
