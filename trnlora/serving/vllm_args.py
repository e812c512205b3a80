"""How vLLM is started: its arguments and its environment, for eval_vllm and `serve`.

One set of arguments for both, so that what was evaluated is what is served. Nothing here imports vLLM or torch.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trnlora import paths
from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.serving.adapters import Adapter

BASE = "base"  # the names that the server's clients use
TUNED = "tuned"

# vllm/config/lora.py, MaxLoRARanks; the ranks themselves may be any number up to the chosen one.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The linear layers of vLLM's Llama, by PEFT's names of those that it keeps as one.
_VLLM_MODULES = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_VLLM_MODULES |= {"o_proj": "o_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}


def engine_args(params: Params, adapters: Sequence[Adapter] = ()) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`; `serve_command` writes the same ones as command-line flags.

    They have room for what the pipeline trains, and for `adapters`: of other ranks, on other layers, several at once.
    With backend nxd this is an engine on the host's CPU, which eval_vllm uses: the Neuron plugin computes no
    prompt_logprobs, so the loss could not be compared there. `neuron_command` has the server's arguments.
    Raises UserError for a LoRA rank that vLLM cannot serve.
    """
    args: dict[str, Any] = {
        "model": str(paths.MODEL),
        "dtype": params.model.dtype,
        "max_model_len": params.serve.max_model_len,
        "max_num_seqs": params.serve.max_num_seqs,
        "enable_lora": True,
        "max_loras": max(params.serve.max_loras, len(adapters)),
        "max_lora_rank": _max_lora_rank(max([params.lora.r, *(adapter.r for adapter in adapters)])),
        # By default vLLM wraps every linear layer and the LM head for adapters to come. On the CPU each of them then
        # costs a product with zeros for every token, and prompt_logprobs of a batch fail in the wrapped LM head.
        "lora_target_modules": sorted({"qkv_proj", *(_VLLM_MODULES[name] for a in adapters for name in a.modules)}),
    }
    if params.backend != "cuda":
        # In a batch that mixes requests with and without adapter, vLLM's CPU kernels take "no adapter" (-1) as an index
        # from the end: the base's requests are answered with the adapter of the last slot (vllm issue 48421). One slot
        # more than adapters keeps the last one empty, all zeros.
        args["max_loras"] += 1
        # An explicit size instead of a fraction of the memory also spares vLLM its warm-up run.
        args["kv_cache_memory_bytes"] = params.serve.kv_cache_gib << 30
        args["enforce_eager"] = True  # with LoRA, vLLM's CPU platform compiles nothing anyhow
    return args


def environment(params: Params) -> dict[str, str]:
    """Environment variables for vLLM's process: nothing sent home, nothing fetched, errors only.

    What the user has set of VLLM_LOGGING_LEVEL, VLLM_CPU_OMP_THREADS_BIND and OMP_WAIT_POLICY stays.
    """
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # model and tokenizer are local folders
    }
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR"}
    if params.backend != "cuda":
        # Engine and worker in one process: one import of vLLM less, and no waiting processes beside the threads.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # "auto" leaves out one physical core of those there are, which is one of two.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Threads that spin at their barriers are a third faster on an idle machine (332 tokens/s against 248, two
        # cores) and 4 to 10 times slower as soon as another program wants a core.
        defaults["OMP_WAIT_POLICY"] = "PASSIVE"
    return env | {name: os.environ.get(name, value) for name, value in defaults.items()}


def serve_command(params: Params, host: str, port: int, chat_template: Path, adapters: Sequence[Adapter]) -> list[str]:
    """The command of the server: base as `base`, adapters by name. The API key, if any, stays in the environment.

    It is what `vllm serve` runs; the command `vllm` fails in the package vllm-cpu, whose version it asks of `vllm`.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    for name, value in engine_args(params, adapters).items():
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, list) else [] if value is True else [value]
        command += [flag, *map(str, values)]
    return [
        *command,
        *("--served-model-name", BASE),
        *("--lora-modules", *(f"{adapter.name}={adapter.folder}" for adapter in adapters)),
        *("--chat-template", str(chat_template)),
        *("--host", host, "--port", str(port)),
    ]


def neuron_line(versions: Mapping[str, str | None]) -> str:
    """Which arguments the vLLM of a Neuron environment takes, by its packages' versions.

    plugin: vllm-neuron 0.4.1 to 0.5.x (SDK 2.28 to 2.31, NxDI) loads adapters by name from a JSON file.
    fork:   the older fork of vLLM itself (no vllm-neuron) takes --override-neuron-config.
    merged: every other vllm-neuron (up to 0.4.0 multi-LoRA raises NotImplementedError; from 0.21 on, without NxDI,
            none is documented) serves the merged model alone.
    Raises UserError where there is no vLLM.
    """
    plugin = versions.get("vllm-neuron")
    if plugin:
        number = tuple(int(part) for part in re.findall(r"\d+", plugin)[:3])
        return "plugin" if (0, 4, 1) <= number < (0, 6) else "merged"
    if versions.get("vllm"):
        return "fork"
    raise UserError("the environment of neuron.vllm_python has no vllm: name that of vllm-neuron in params.yaml")


def neuron_command(
    params: Params, line: str, host: str, port: int, chat_template: Path, lora_json: Path
) -> tuple[dict[str, str], list[str]]:
    """Environment and command of the server on Trainium, for one of `neuron_line`'s lines.

    Sources: aws-neuron-sdk, libraries/nxd-inference/vllm/quickstart-vllm-online-serving.rst and
    tutorials/trn2-llama3.1-8b-multi-lora-tutorial.ipynb. One replica of tp_size cores serves; raises UserError when
    the line needs the merged model and there is none.
    """
    adapter = paths.ADAPTER.absolute()
    if line == "merged" and not (paths.MERGED / "config.json").exists():
        raise UserError(
            "this vllm-neuron loads no adapters, and there is no merged model: set flatten.merged_model: true and "
            "run `dvc repro flatten_adapter`"
        )
    model = paths.MERGED if line == "merged" else paths.MODEL
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "NEURON_RT_NUM_CORES": str(params.convert.tp_size),
        "NEURON_COMPILED_ARTIFACTS": f"{params.neuron.compile_cache}/served-{line}",
    }
    if params.neuron.compile_cache.startswith("s3://"):
        del env["NEURON_COMPILED_ARTIFACTS"]  # a folder; vLLM then compiles into one of its own beside the model
    if params.convert.hw_backend == "trn2":
        env["NEURON_LOGICAL_NC_CONFIG"] = str(params.neuron.logical_core_size)
    if line == "plugin":
        env["VLLM_NEURON_FRAMEWORK"] = "neuronx-distributed-inference"
    command = [
        params.neuron.vllm_python or sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        *("--model", str(model), "--dtype", params.model.dtype),
        *("--tensor-parallel-size", str(params.convert.tp_size)),
        *("--max-model-len", str(params.serve.max_model_len), "--max-num-seqs", str(params.serve.max_num_seqs)),
        *("--no-enable-prefix-caching", "--no-enable-chunked-prefill"),
    ]  # fmt: skip
    loras = str(params.serve.max_loras)
    if line == "plugin":
        overrides = {"override_neuron_config": {"lora_ckpt_json": str(lora_json)}}
        command += [
            *("--enable-lora", "--max-loras", loras, "--max-cpu-loras", loras),
            *("--max-lora-rank", str(_max_lora_rank(params.lora.r))),
            *("--lora-modules", f"{TUNED}={adapter}", "--additional-config", json.dumps(overrides)),
        ]
    elif line == "fork":
        command += [
            *("--device", "neuron", "--enable-lora", "--max-loras", loras, "--max-lora-rank", str(params.lora.r)),
            *("--lora-modules", f"{TUNED}={adapter}"),
            *("--override-neuron-config", json.dumps({"lora_modules": {TUNED: str(adapter)}})),
        ]
    return env, [
        *command,
        *("--served-model-name", TUNED if line == "merged" else BASE),
        *("--chat-template", str(chat_template), "--host", host, "--port", str(port)),
    ]


def lora_json() -> dict[str, Any]:
    """What NxDI reads of lora_ckpt_json: the adapters of the device's memory and of the host's, by name."""
    adapters = {TUNED: paths.ADAPTER.name}
    return {
        "lora-ckpt-dir": str(paths.ADAPTER.parent.absolute()),
        "lora-ckpt-paths": adapters,
        "lora-ckpt-paths-cpu": adapters,
    }


def neuron_container(env: Mapping[str, str], command: list[str], image: str, folders: list[Path]) -> list[str]:
    """The same server in a container that sees the Neuron devices and `folders`, with no --privileged."""
    devices = [f"--device={path}" for path in sorted(Path("/dev").glob("neuron*"))] or ["--device=/dev/neuron0"]
    return [
        *("docker", "run", "--rm", "--network=host", "--shm-size=16g", *devices),
        *(f"--volume={folder}:{folder}" for folder in folders),
        f"--workdir={Path.cwd()}",
        *(flag for name, value in env.items() for flag in ("--env", f"{name}={value}")),
        *("--env", "VLLM_API_KEY", "--entrypoint", "python", image, *command[1:]),
    ]


def _max_lora_rank(r: int) -> int:
    for rank in _VLLM_RANKS:
        if r <= rank:
            return rank
    raise UserError(f"LoRA rank {r} is above {_VLLM_RANKS[-1]}, the largest rank that vLLM serves")


def base_url(host: str, port: int) -> str:
    """Where a client on this machine reaches a server bound to `host`:`port`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def failure(what: str, reason: Exception | str) -> str:
    """The one line for an engine that did not start or has died; `reason` is what vLLM said."""
    if isinstance(reason, ValidationError):
        reason = "; ".join(detail["msg"] for detail in reason.errors())
    said = " ".join((str(reason) or type(reason).__name__).split()).split("Value error, ")[-1]  # pydantic's prefix
    return f"{what}: {said} (see `serve` in params.yaml; VLLM_LOGGING_LEVEL=INFO shows vLLM's own log)"
