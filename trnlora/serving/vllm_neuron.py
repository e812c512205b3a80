"""vLLM's server on Trainium: which arguments the installed vLLM takes, its command and its environment.

Sources: aws-neuron-sdk, libraries/nxd-inference/vllm/quickstart-vllm-online-serving.rst and
tutorials/trn2-llama3.1-8b-multi-lora-tutorial.ipynb.
"""

import enum
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.backends.nxd_environment import installed
from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Params
from trnlora.serving.adapters import BASE, TUNED
from trnlora.serving.vllm_args import PRIVACY_ENV, max_lora_rank

LORA_JSON = "lora.json"  # the file with the contents of `lora_json`


class NeuronServer(enum.Enum):
    """How a vLLM for Neuron takes adapters."""

    PLUGIN = "plugin"  # vllm-neuron 0.4.1 to 0.5.x (SDK 2.28 to 2.31, NxDI): by name, from a JSON file
    FORK = "fork"  # AWS's older fork of vLLM, without vllm-neuron: with --override-neuron-config
    # Any other vllm-neuron serves the merged model only: up to 0.4.0 multi-LoRA raises NotImplementedError, and from
    # 0.21 on, without NxDI, multi-LoRA is not documented.
    MERGED = "merged"


def detect_server(versions: Mapping[str, str | None]) -> NeuronServer:
    """The kind of server that an environment has, from its versions of `vllm` and `vllm-neuron`.

    Raises UserError if there is no vLLM.
    """
    plugin = versions.get("vllm-neuron")
    if plugin:
        version = tuple(int(part) for part in re.findall(r"\d+", plugin)[:3])
        return NeuronServer.PLUGIN if (0, 4, 1) <= version < (0, 6) else NeuronServer.MERGED
    if versions.get("vllm"):
        return NeuronServer.FORK
    raise UserError("the environment of neuron.vllm_python has no vllm: set it to a Python that has vllm-neuron")


@dataclass(frozen=True)
class _Model:
    """The part of a server's command line that depends on its kind."""

    folder: Path
    name: str  # the name of this model for clients
    lora_flags: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)


def _plugin(params: Params, lora_json: Path) -> _Model:
    max_loras = str(params.serve.max_loras)
    config = {"override_neuron_config": {"lora_ckpt_json": str(lora_json)}}
    flags = [
        *("--enable-lora", "--max-loras", max_loras, "--max-cpu-loras", max_loras),
        *("--max-lora-rank", str(max_lora_rank(params.lora.r))),
        *("--lora-modules", f"{TUNED}={paths.ADAPTER.absolute()}", "--additional-config", json.dumps(config)),
    ]
    return _Model(paths.MODEL, BASE, flags, {"VLLM_NEURON_FRAMEWORK": "neuronx-distributed-inference"})


def _fork(params: Params, lora_json: Path) -> _Model:
    config = {"lora_modules": {TUNED: str(paths.ADAPTER.absolute())}}
    flags = [
        *("--device", "neuron", "--enable-lora"),
        *("--max-loras", str(params.serve.max_loras), "--max-lora-rank", str(params.lora.r)),
        *("--lora-modules", f"{TUNED}={paths.ADAPTER.absolute()}"),
        *("--override-neuron-config", json.dumps(config)),
    ]
    return _Model(paths.MODEL, BASE, flags)


def _merged(params: Params, lora_json: Path) -> _Model:
    if not (paths.MERGED / "config.json").exists():
        raise UserError(
            "this vllm-neuron does not load adapters, and there is no merged model: set flatten.merged_model: true and "
            "run `dvc repro flatten_adapter`"
        )
    return _Model(paths.MERGED, TUNED)


_MODELS = {NeuronServer.PLUGIN: _plugin, NeuronServer.FORK: _fork, NeuronServer.MERGED: _merged}


def neuron_launch(params: Params, host: str, port: int, chat_template: Path) -> tuple[dict[str, str], list[str]]:
    """Environment and command of the server that neuron.vllm_python has; writes LORA_JSON next to `chat_template`.

    Raises UserError if there is no vLLM, if it needs the merged model and there is none, or if NxDI lacks the model.
    """
    versions = installed(params.neuron.vllm_python or sys.executable, ("vllm", "vllm-neuron")) or {}
    server, family = detect_server(versions), ModelConfig.from_folder(paths.MODEL).family
    if server is not NeuronServer.MERGED and not family.served_by_nxdi:
        raise UserError(
            f"this vLLM serves models with NxDI, which has no {family.architecture}: set neuron.vllm_python to an "
            "environment with vllm-neuron 0.21 or newer and flatten.merged_model to true"
        )
    file = chat_template.with_name(LORA_JSON)
    file.write_text(json.dumps(lora_json()), encoding="utf-8")
    return neuron_command(params, server, host, port, chat_template, file)


def neuron_command(
    params: Params, server: NeuronServer, host: str, port: int, chat_template: Path, lora_json: Path
) -> tuple[dict[str, str], list[str]]:
    """Environment and command of a server with one replica on convert.tp_size cores.

    lora_json: the file LORA_JSON, which the plugin reads. Raises UserError if the server needs the merged model and
    there is none.
    """
    model = _MODELS[server](params, lora_json)
    command = [
        *(params.neuron.vllm_python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model.folder), "--dtype", params.model.dtype),
        *("--tensor-parallel-size", str(params.convert.tp_size)),
        *("--max-model-len", str(params.serve.max_model_len), "--max-num-seqs", str(params.serve.max_num_seqs)),
        *("--no-enable-prefix-caching", "--no-enable-chunked-prefill"),
        *model.lora_flags,
        *("--served-model-name", model.name),
        *("--chat-template", str(chat_template), "--host", host, "--port", str(port)),
    ]
    return _environment(params, server) | model.env, command


def _environment(params: Params, server: NeuronServer) -> dict[str, str]:
    env = PRIVACY_ENV | {"NEURON_RT_NUM_CORES": str(params.convert.tp_size)}
    if not params.neuron.compile_cache.startswith("s3://"):
        # A local folder. Without it, vLLM compiles into a folder next to the model.
        env["NEURON_COMPILED_ARTIFACTS"] = f"{params.neuron.compile_cache}/served-{server.value}"
    if params.convert.hw_backend == "trn2":
        env["NEURON_LOGICAL_NC_CONFIG"] = str(params.neuron.logical_core_size)
    return env


def lora_json() -> dict[str, Any]:
    """The contents of NxDI's lora_ckpt_json: the adapters in device memory and in host memory, by name."""
    adapters = {TUNED: paths.ADAPTER.name}
    return {
        "lora-ckpt-dir": str(paths.ADAPTER.parent.absolute()),
        "lora-ckpt-paths": adapters,
        "lora-ckpt-paths-cpu": adapters,
    }


def container_command(env: Mapping[str, str], command: list[str], image: str, folders: list[Path]) -> list[str]:
    """The same server in a container that sees the Neuron devices and `folders`, without --privileged."""
    devices = [f"--device={path}" for path in sorted(Path("/dev").glob("neuron*"))] or ["--device=/dev/neuron0"]
    return [
        *("docker", "run", "--rm", "--network=host", "--shm-size=16g", *devices),
        *(f"--volume={folder}:{folder}" for folder in folders),
        f"--workdir={Path.cwd()}",
        *(flag for name, value in env.items() for flag in ("--env", f"{name}={value}")),
        *("--env", "VLLM_API_KEY", "--entrypoint", "python", image, *command[1:]),
    ]
