"""The arguments and the environment that vLLM is started with, for eval_vllm and for the server.

Both use the same arguments, so what was evaluated is what is served. Nothing here imports vLLM or torch.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trnlora import paths
from trnlora.errors import UserError
from trnlora.model.targets import fused_layers, peft_modules
from trnlora.params import MAX_LORA_RANKS, Params
from trnlora.serving.access import Access
from trnlora.serving.adapters import BASE, Adapter, common_generation
from trnlora.training.adapter_record import Generation

if TYPE_CHECKING:  # it imports vLLM; here only so that eval_vllm depends on it (`make deps`)
    from trnlora.serving import cpu_lora  # noqa: F401

# No usage statistics and no downloads: model and tokenizer are local folders.
PRIVACY_ENV = {"DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

ROOT = Path(__file__).parents[2]  # of this project
# Corrects vLLM's LoRA kernels on a CPU. Only vLLM's workers can import it.
CPU_LORA = "trnlora.serving.cpu_lora.WorkerExtension"


def engine_args(params: Params, adapters: Sequence[Adapter] = ()) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`; `serve_command` passes the same ones as command-line flags.

    They leave room for what the pipeline trains and for `adapters`, which may have other ranks and layers. On Trainium
    they are those of an engine on the host's CPU, for eval.engine: host. Those on Trainium are in vllm_neuron.py.

    Raises UserError for a LoRA rank that vLLM cannot serve, and for adapters that record different sampling defaults.
    """
    modules = set(peft_modules(params.lora.target_modules)).union(*(adapter.modules for adapter in adapters))
    args: dict[str, Any] = {
        "model": str(paths.MODEL),
        "dtype": params.model.dtype,
        "max_model_len": params.serve.max_model_len,
        "max_num_seqs": params.serve.max_num_seqs,
        **sampling_args(common_generation(adapters)),
        "enable_lora": True,
        "max_loras": max(params.serve.max_loras, len(adapters)),
        "max_lora_rank": max_lora_rank(max([params.lora.r, *(adapter.r for adapter in adapters)])),
        # By default vLLM prepares every linear layer and the LM head for adapters. On the CPU each of them then costs a
        # product with zeros per token, and prompt_logprobs of a batch fail in the LM head.
        "lora_target_modules": sorted(fused_layers(modules)),
    }
    if params.backend != "cuda":
        args["worker_extension_cls"] = CPU_LORA
        # A size in bytes instead of a fraction of the memory: vLLM then skips its warm-up run.
        args["kv_cache_memory_bytes"] = params.serve.kv_cache_gib << 30
        args["enforce_eager"] = True  # with LoRA, vLLM's CPU platform compiles nothing anyway
    return args


def sampling_args(generation: Generation) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that make `generation` the sampling of requests that do not say it.

    By default, vLLM takes them from the model's generation_config.json: a repetition penalty or a limit on the length
    of answers there would apply to what was evaluated without. With `vllm`, it takes nothing from there but the tokens
    that end an answer (vllm/config/model.py, get_diff_sampling_param and try_get_generation_config).
    """
    return {"generation_config": "vllm", "override_generation_config": generation.model_dump()}


def max_lora_rank(r: int) -> int:
    """The smallest --max-lora-rank that has room for rank `r`. Raises UserError if there is none."""
    for rank in MAX_LORA_RANKS:
        if r <= rank:
            return rank
    raise UserError(f"LoRA rank {r} is above {MAX_LORA_RANKS[-1]}, the largest rank that vLLM serves")


def environment(params: Params) -> dict[str, str]:
    """Environment variables of vLLM's process: `PRIVACY_ENV`, and a log with errors only.

    The user's own VLLM_LOGGING_LEVEL, VLLM_CPU_OMP_THREADS_BIND and OMP_WAIT_POLICY are kept.
    """
    env = dict(PRIVACY_ENV)
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR"}
    if params.backend != "cuda":
        # Engine and worker in one process: vLLM is imported once less, and no idle process competes with the threads.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # The default, "auto", leaves one physical core unused, which may be one of two.
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Threads that spin at barriers are a third faster on an idle machine (332 tokens/s instead of 248 on two
        # cores), but 4 to 10 times slower as soon as another program uses a core.
        defaults["OMP_WAIT_POLICY"] = "PASSIVE"
    return env | {name: os.environ.get(name, value) for name, value in defaults.items()}


def serve_command(params: Params, host: str, port: int, chat_template: Path, adapters: Sequence[Adapter]) -> list[str]:
    """The command of the server: the base model as `base`, adapters by name. The API key stays in the environment.

    It runs the module behind `vllm serve`: the command `vllm` itself fails in the package vllm-cpu, because it looks up
    the version of a package called `vllm`.
    """
    return [
        *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
        *flags(engine_args(params, adapters)),
        *("--served-model-name", BASE),
        *("--lora-modules", *(f"{adapter.name}={adapter.folder}" for adapter in adapters)),
        *("--chat-template", str(chat_template)),
        *access_flags(host, port),
    ]


def access_flags(host: str, port: int) -> list[str]:
    """The flags of every server: its address, and what it answers there."""
    return ["--middleware", f"{Access.__module__}.{Access.__name__}", "--host", host, "--port", str(port)]


def server_environment(runtime_adapters: bool) -> dict[str, str]:
    """The environment variables of every server: they decide what it answers, whatever the user's own say.

    runtime_adapters: clients may load adapters. vLLM then loads any folder that a client names, unchecked;
    tools/load_adapter.py checks it first.
    """
    return {
        # Access is imported by vLLM's process, whose Python need not have this project.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if runtime_adapters else "0",
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "0",  # with 1, every unknown name is the base model
        "VLLM_USE_RUST_FRONTEND": "0",  # it has no middleware
    }


def flags(args: Mapping[str, Any]) -> list[str]:
    """Keyword arguments of `vllm.LLM` as the server's command-line flags."""
    words: list[str] = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in values)]
    return words


def failure(what: str, reason: Exception | str) -> str:
    """One line for an engine that did not start or has stopped; `reason` is vLLM's message or exception."""
    if isinstance(reason, ValidationError):
        reason = "; ".join(detail["msg"] for detail in reason.errors())
    text = " ".join((str(reason) or type(reason).__name__).split()).split("Value error, ")[-1]  # pydantic's prefix
    return f"{what}: {text} (see `serve` in params.yaml; VLLM_LOGGING_LEVEL=INFO shows vLLM's own log)"
