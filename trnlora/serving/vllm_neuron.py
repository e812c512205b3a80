"""vLLM on Trainium: which kind is installed, and what it is started with, as a server and for the evaluation.

Sources: aws-neuron-sdk, libraries/nxd-inference/vllm/quickstart-vllm-online-serving.rst,
libraries/nxd-inference/developer_guides/vllm-user-guide-v1.rst and
libraries/nxd-inference/tutorials/trn2-llama3.1-8b-multi-lora-tutorial.ipynb for the plugin with NxD Inference;
vllm-neuron/docs for the one without: getting-started/quickstart-online-serving.md and setup-guide.md,
guides/features-guide.md and reference-configuration.md, tutorials/tutorial-llama3-70b.md.
"""

import enum
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.backends.python_environment import installed
from trnlora.errors import UserError
from trnlora.files import SUMS, sha256
from trnlora.model.config import ModelConfig
from trnlora.params import Params
from trnlora.serving.access import NO_ADAPTER
from trnlora.serving.adapters import BASE, TUNED, Adapter, common_generation
from trnlora.serving.neuron_lora import name_adapters_in_compiled, write_lora_json, write_zero_adapter
from trnlora.serving.vllm_args import PRIVACY_ENV, access_flags, flags, max_lora_rank, sampling_args
from trnlora.training.adapter_record import GREEDY, Generation

LORA_JSON = "lora.json"  # the file that `write_lora_json` writes
PACKAGES = ("vllm", "vllm-neuron", "neuronx-distributed-inference", "neuronx-cc")
# Plugins for NxD Inference that cannot serve several adapters: 0.2.0 raises NotImplementedError. 0.2.2+lts can.
_WITHOUT_LORA = ("0.2.0", "0.3.")
# From this version of NxD Inference on (SDK 2.29), "models are now only supported on Trn2 and newer hardware"
# (aws-neuron-sdk, release-notes/components/nxd-inference.rst).
_TRN2_ONLY = (0, 9)
# How many tokens of a prompt vllm-neuron without NxD Inference can compute at a time; vLLM's default is the last.
# Source: reference-configuration.md, kv_segment_size_buckets.
_SEGMENTS = (512, 1024, 2048)
EFA_DEVICES = Path("/sys/class/infiniband")
# The compiler's own default, for compiled graphs where neuron.compile_cache is not a local folder.
_LOCAL_CACHE = "/var/tmp/neuron-compile-cache"


class NeuronServer(enum.Enum):
    """How a vLLM for Neuron takes adapters."""

    PLUGIN = "plugin"  # with NxD Inference (vllm-neuron 0.4.1 to 0.5.x, SDK 2.28 to 2.31): by name, from a JSON file
    MERGED = "merged"  # without it (vllm-neuron 0.21 and later): its documentation names no LoRA


@dataclass(frozen=True)
class NeuronVLLM:
    """The vLLM of neuron.vllm_python."""

    python: str
    server: NeuronServer
    versions: dict[str, str | None]  # of PACKAGES


def detect_server(versions: Mapping[str, str | None]) -> NeuronServer:
    """The kind of server that an environment has, from its versions of PACKAGES.

    By packages and not by a range of versions: the plugin for NxD Inference was also released as 0.6.0 and 0.16.0.x
    (aws-neuron-sdk, release-notes/2.29.0.rst to 2.31.1.rst). Raises UserError if it cannot serve.
    """
    plugin = versions.get("vllm-neuron")
    if not versions.get("vllm") or not plugin:
        raise UserError(
            "the environment of neuron.vllm_python has no vllm-neuron: set it to a Python that has it "
            "(ls -d /opt/aws_neuronx*vllm*)"
        )
    if not versions.get("neuronx-distributed-inference"):
        return NeuronServer.MERGED
    if plugin.startswith(_WITHOUT_LORA):
        raise UserError(f"vllm-neuron {plugin} of neuron.vllm_python does not serve adapters: use 0.4.1 or newer")
    return NeuronServer.PLUGIN


def find_vllm(params: Params) -> NeuronVLLM:
    """The vLLM of neuron.vllm_python. Raises UserError if there is none, or none for this hardware."""
    python = params.neuron.vllm_python or sys.executable
    versions = installed(python, PACKAGES)
    if versions is None:
        raise UserError(
            f"neuron.vllm_python {python} is not an executable Python interpreter: name that of your vLLM environment "
            "in params.yaml (ls -d /opt/aws_neuronx*vllm*)"
        )
    found = NeuronVLLM(python, detect_server(versions), versions)
    if params.convert.hw_backend == "trn1":
        _check_trn1(found)
    return found


def _check_trn1(found: NeuronVLLM) -> None:
    fix = (
        "set neuron.vllm_python to an environment of SDK 2.28, the last one for trn1, or serve the adapter on another "
        "machine; eval.engine: host answers on this machine's CPU"
    )
    if found.server is NeuronServer.MERGED:
        raise UserError(f"vllm-neuron {found.versions['vllm-neuron']} runs on trn2 and newer, not on trn1: {fix}")
    nxdi = found.versions["neuronx-distributed-inference"] or ""
    if tuple(int(part) for part in re.findall(r"\d+", nxdi)[:2]) >= _TRN2_ONLY:
        raise UserError(f"neuronx-distributed-inference {nxdi} supports trn2 and newer, not trn1: {fix}")


def check_served(server: NeuronServer) -> None:
    """Raise UserError if the server cannot take the model: NxDI lacks its family, or there is no merged model."""
    family = ModelConfig.from_folder(paths.MODEL).family
    if server is NeuronServer.PLUGIN and not family.served_by_nxdi:
        raise UserError(
            f"this vLLM serves models with NxDI, which has no {family.architecture}: set neuron.vllm_python to an "
            "environment with vllm-neuron 0.21 or newer and flatten.merged_model to true"
        )
    if server is NeuronServer.MERGED and not (paths.MERGED / "config.json").exists():
        raise UserError(
            "this vllm-neuron does not load adapters, and there is no merged model: set flatten.merged_model: true and "
            "run `dvc repro flatten_adapter`"
        )


def model_args(params: Params, model: Path, generation: Generation) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for a model without adapters, on convert.tp_size cores.

    generation: the sampling of requests that do not say it.
    """
    return {
        "model": str(model),
        "dtype": params.model.dtype,
        "tensor_parallel_size": params.convert.tp_size,
        "max_model_len": params.serve.max_model_len,
        "max_num_seqs": params.serve.max_num_seqs,
        **sampling_args(generation),
    }


def plugin_args(params: Params, adapters: Mapping[str, Adapter], lora_json: Path) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for the base model and `adapters` (by name, all in device memory), with NxDI.

    lora_json: the file of `write_lora_json`.
    """
    count = max(params.serve.max_loras, len(adapters))
    return {
        **model_args(params, paths.MODEL, common_generation(adapters.values())),
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        # Without prefix caching, a block is a whole sequence: "Set num_gpu_blocks_override to exactly max_num_seqs"
        # (vllm-neuron 0.4.1 and 0.5.0, README.md, known issue 2). The plugin adds vLLM's null block itself.
        "num_gpu_blocks_override": params.serve.max_num_seqs,
        "enable_lora": True,
        "max_loras": count,
        "max_cpu_loras": count,
        "max_lora_rank": max_lora_rank(max([params.lora.r, *(adapter.r for adapter in adapters.values())])),
        "additional_config": {
            # The longest prompt, which must be the context length that the graphs are compiled for: NxDI's default is
            # max_model_len, and another value would be another shape. Here, and not in override_neuron_config, the
            # plugin's API server reads it too: it refuses a longer prompt, which would end the engine, and an engine
            # whose graphs have another length does not start (vllm-neuron 0.5.0, platform.py, platform_overrides.py,
            # worker/neuronx_distributed_model_runner.py).
            "max_prompt_length": params.serve.max_model_len,
            "override_neuron_config": {"lora_ckpt_json": str(lora_json)},
        },
    }


def plugin_environment(params: Params, compiled: Path) -> dict[str, str]:
    """Environment variables of vLLM with NxDI. compiled: the folder of its compiled graphs."""
    return {
        **_environment(params),
        "VLLM_NEURON_FRAMEWORK": "neuronx-distributed-inference",
        "NEURON_RT_NUM_CORES": str(params.convert.tp_size),
        # Without it, the plugin deletes and compiles <model>/neuron-compiled-artifacts/<hash> at every start.
        "NEURON_COMPILED_ARTIFACTS": str(compiled),
    }


def merged_args(params: Params, model: Path, generation: Generation = GREEDY) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for a model, with vllm-neuron without NxD Inference.

    It computes a prompt in segments of one size, which prefix caching needs; a prompt shorter than a segment is padded.
    The sizes are given because it does not start with vLLM's defaults where max_model_len is 2048 or less: a prompt
    must then be computed at once, without prefix caching, while that is on by default.
    """
    length = params.serve.max_model_len
    segment = max((size for size in _SEGMENTS if size < length), default=None)
    buckets = {"num_batched_tokens_buckets": [segment or length]}
    if segment:
        buckets["kv_segment_size_buckets"] = [segment]
    return {
        **model_args(params, model, generation),
        "max_num_batched_tokens": segment or length,
        "enable_prefix_caching": segment is not None,
        "additional_config": {"neuron_config": buckets},
    }


def merged_environment(params: Params) -> dict[str, str]:
    """Environment variables of vLLM without NxD Inference. Those that the user has set keep their values."""
    env = {
        # From quickstart-online-serving.md: compiling may take longer than the defaults.
        "VLLM_NEURON_COMPILATION_TIMEOUT": "1200",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "1200",
        # Compiled graphs, which are found by what shapes them (design/compilation/compilation_cache.md). On local disk,
        # also if neuron.compile_cache is on S3.
        "VLLM_CACHE_ROOT": str(_local_cache(params) / "vllm"),
    }
    if len(list(EFA_DEVICES.glob("*"))) < 2:
        # vLLM pins its processes beside the EFA device of each core, and does not start where there is none
        # (aws-neuron-sdk, deploy/environments/quickstart-deploy-dlc.rst), or, as users say of a trn2.3xlarge, only one.
        env["NEURON_SKIP_EFA_AFFINITY"] = "1"
    return _environment(params) | {name: os.environ.get(name, value) for name, value in env.items()}


def _environment(params: Params) -> dict[str, str]:
    if params.convert.hw_backend == "trn2":
        return PRIVACY_ENV | {"NEURON_LOGICAL_NC_CONFIG": str(params.neuron.logical_core_size)}
    return dict(PRIVACY_ENV)


def compiled_folder(
    params: Params, args: Mapping[str, Any], adapters: Mapping[str, Adapter], versions: Mapping[str, str | None]
) -> Path:
    """The folder of the graphs of an engine with `args` (those of `plugin_args`), by a hash of what shapes them.

    The plugin loads what it finds in NEURON_COMPILED_ARTIFACTS and compares nothing ("any differing model
    configurations passed in to the vllm API will not trigger re-compilation": vllm-user-guide-v1.rst). A folder on
    local disk, also if neuron.compile_cache is on S3. Raises UserError if the model's checksums are missing.
    """
    sums = paths.MODEL / SUMS
    if not sums.is_file():
        raise UserError(f"{sums} is missing: run `dvc repro -f fetch_model`")
    engine = dict(args) | {"additional_config": {**args["additional_config"], "override_neuron_config": None}}
    shaped_by = {
        "model": sha256(sums),
        "engine": {name: value for name, value in engine.items() if name not in ("model", *sampling_args(GREEDY))},
        "adapters": {name: [adapter.r, sorted(adapter.modules)] for name, adapter in adapters.items()},
        "hardware": [params.convert.hw_backend, params.neuron.logical_core_size],
        "versions": {name: versions.get(name) for name in PACKAGES},
    }
    key = hashlib.sha256(json.dumps(shaped_by, sort_keys=True).encode()).hexdigest()[:16]
    return _local_cache(params) / "served" / key


def _local_cache(params: Params) -> Path:
    cache = params.neuron.compile_cache
    return Path(_LOCAL_CACHE if cache.startswith("s3://") else cache).absolute()


@dataclass(frozen=True)
class NeuronEngine:
    """How vLLM is started on Trainium."""

    args: dict[str, Any]  # keyword arguments of vllm.LLM
    env: dict[str, str]
    adapters: dict[str, Path]  # the PEFT folders by the names of the models that they are; empty without LoRA
    compiled: Path  # NEURON_COMPILED_ARTIFACTS


def prepare_plugin(params: Params, versions: Mapping[str, str | None], tuned: Adapter, scratch: Path) -> NeuronEngine:
    """An engine with base model and adapter. Writes to `scratch`: LORA_JSON and the adapter of zeros that is BASE.

    Raises UserError as `compiled_folder` does.
    """
    zero = Adapter(BASE, scratch / BASE, tuned.r, tuned.modules)
    adapters = {TUNED: tuned, BASE: zero}
    args = plugin_args(params, adapters, scratch / LORA_JSON)
    compiled = compiled_folder(params, args, adapters, versions)
    folders = {name: adapter.folder for name, adapter in adapters.items()}
    write_zero_adapter(tuned.folder, zero.folder)
    write_lora_json(scratch / LORA_JSON, folders)
    name_adapters_in_compiled(compiled, folders)
    return NeuronEngine(args, plugin_environment(params, compiled), folders, compiled)


@dataclass(frozen=True)
class Launch:
    """A server to start."""

    command: list[str]
    env: dict[str, str]
    models: list[str]  # the names for clients
    compiled: Path  # the folder of compiled graphs


def neuron_launch(
    params: Params, tuned: Adapter, host: str, port: int, chat_template: Path, in_container: bool = False
) -> Launch:
    """The server that neuron.vllm_python has, with one replica; writes its files next to `chat_template`.

    in_container: with backend neuron, one that this machine need not have: its SDK's vllm-neuron takes a merged model.
    Raises UserError if there is no vLLM for this hardware, if it needs the merged model and there is none, or if NxDI
    lacks the model.
    """
    if in_container and params.backend == "neuron":
        found = NeuronVLLM("python", NeuronServer.MERGED, {})
    else:
        found = find_vllm(params)
    check_served(found.server)
    end = ["--chat-template", str(chat_template), *access_flags(host, port)]
    if found.server is NeuronServer.MERGED:
        # `vllm serve`, without relying on PATH.
        args = merged_args(params, paths.MERGED, common_generation([tuned]))
        command = [found.python, "-m", "vllm.entrypoints.cli.main", "serve", args.pop("model"), *flags(args)]
        command += ["--served-model-name", TUNED, *end]
        env = merged_environment(params)
        return Launch(command, env, [TUNED], Path(env["VLLM_CACHE_ROOT"]))
    engine = prepare_plugin(params, found.versions, tuned, chat_template.parent)
    command = [
        *(found.python, "-m", "vllm.entrypoints.openai.api_server", *flags(engine.args)),
        *("--lora-modules", *(f"{name}={folder.absolute()}" for name, folder in engine.adapters.items())),
        *("--served-model-name", NO_ADAPTER, *end),
    ]
    return Launch(command, engine.env, [BASE, TUNED], engine.compiled)


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
