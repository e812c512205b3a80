"""What doctor and the launcher find on a Trainium machine. Stubs print what AWS documents of its programs."""

import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from support import ROOT, trainium
from support.trainium import BENCH, device, install_neuron_ls

from trnlora.backends import environment, neuron_machine, nxd_environment
from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.params import Params, check_params
from trnlora.preflight import machine_checks, nxd_checks
from trnlora.preflight.caution import Caution
from trnlora.preflight.instances import INSTANCES, on_nodes, smallest_fit
from trnlora.preflight.plan import GIB
from trnlora.preflight.precompile import compile_command
from trnlora.profiles import profile_names, profile_values
from trnlora.readers import read_json

TRN2, TRN1 = "llama3-8b-trn2-nxd", "llama3-8b-trn1"


def profile(name: str = TRN2, **sections: dict[str, Any]) -> Params:
    return trainium.profile(name, **sections)


TRN1_DEVICE = {"nc_count": 2}  # without joined cores


@pytest.fixture
def neuron_ls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """neuron_ls(devices): from now on, a `neuron-ls` on PATH prints them as JSON."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return lambda devices: install_neuron_ls(tmp_path, devices)


@pytest.mark.parametrize(
    ("devices", "size", "cores"),
    [
        ([device(n) for n in range(16)], 2, 64),  # a trn2.48xlarge with its default setting
        ([device(n) for n in range(16)], 1, 128),
        ([TRN1_DEVICE] * 16, 1, 32),  # a trn1.32xlarge
    ],
)
def test_counts_the_logical_cores_of_the_run(
    devices: list[dict[str, Any]], size: int, cores: int, neuron_ls: Callable[[Any], None]
) -> None:
    neuron_ls(devices)
    found = neuron_machine.devices()
    assert found is not None
    assert neuron_machine.logical_cores(found, size) == cores


def test_other_output_of_neuron_ls_is_no_list_of_devices(neuron_ls: Callable[[Any], None]) -> None:
    outputs: list[Any] = ["not a list of devices", [{"neuron_device": 0}], {}]
    for output in outputs:
        neuron_ls(output)
        assert not neuron_machine.devices()


def test_a_process_that_holds_cores_is_named(neuron_ls: Callable[[Any], None]) -> None:
    neuron_ls([device(0), *(device(n, [BENCH]) for n in range(1, 16))])
    with pytest.raises(UserError) as refusal:
        machine_checks.check_free_cores(profile())
    assert str(refusal.value) == (
        "4 of 64 Neuron cores are free and 64 are needed: others are held by process 113985 (neuron-bench exec "
        "--run-as-cc-neff --...); stop it (kill PID, or Ctrl-C in `make serve`)"
    )
    neuron_machine.check_free_cores(4, 2)  # fit on the device that is free
    neuron_ls([device(n, [BENCH | {"pid": n}]) for n in range(16)])
    with pytest.raises(UserError, match=r"process 0 \(.*\), 1 \(.*\), 2 \(.*\) and 13 more; "):
        neuron_machine.check_free_cores(1, 2)
    neuron_ls([device(n) for n in range(16)])
    assert machine_checks.check_free_cores(profile()) == "no other process holds the 64 cores"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder in which the training stage gets as far as the check of its loggers, one of which is missing."""
    folder = tmp_path / "project"
    (folder / "artifacts/model").mkdir(parents=True)
    shutil.copyfile(ROOT / "profiles/configs/Meta-Llama-3-8B.json", folder / "artifacts/model/config.json")
    values = profile_values(TRN2, ROOT / "profiles")
    values["neuron"] |= {"python": sys.executable, "compile_cache": str(tmp_path / "cache")}
    values["train"] |= {"loggers": ["wandb"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    return folder


def train(project: Path, **env: str) -> str:
    command = [sys.executable, str(ROOT / "stages/finetune_lora.py")]
    done = subprocess.run(
        command, cwd=project, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_training_refuses_to_start_on_cores_in_use(project: Path, neuron_ls: Callable[[Any], None]) -> None:
    neuron_ls([device(n, [BENCH]) for n in range(16)])
    assert train(project).startswith(
        "error: 0 of 64 Neuron cores are free and 64 are needed: others are held by process"
    )
    neuron_ls([device(n) for n in range(16)])
    assert "train.loggers names wandb" in train(project)


def test_nodes_that_are_not_full_are_refused(project: Path) -> None:
    nodes = {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "10.0.0.1"}
    assert "32 ranks on each of 2 nodes, but only full ones, with 64, train together: set" in train(project, **nodes)


def test_the_launcher_raises_the_limit_on_open_files() -> None:
    """As a child of it sees the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        "import os, resource, subprocess; from trnlora.backends import environment, python_environment; "
        "from trnlora.profiles import load_profile; params = load_profile('llama3-8b-trn2-nxd'); "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard})); "
        "os.environ[python_environment.RERUN_WITH] = python_environment.training_python(params); "
        "environment.enter(params, 64, 1, 'localhost'); subprocess.run('ulimit -Sn; ulimit -Hn', shell=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(min(65536, hard)), str(hard)]


def test_a_low_hard_limit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    with pytest.raises(
        UserError, match=r'4096 open files allowed, 64 ranks need 65536: .*"\* hard nofile 65536" to /etc'
    ):
        machine_checks.check_open_files(profile())
    few = profile(train={"dp_size": 1}, convert={"tp_size": 16})
    assert machine_checks.check_open_files(few) == "4096 open files allowed"
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, resource.RLIM_INFINITY))
    assert machine_checks.check_open_files(profile()) == "65536 open files allowed"


# Worker counts -------------------------------------------------------------------------------------------------------


def changed(name: str, dp_size: int, tp_size: int, **neuron: Any) -> dict[str, Any]:
    values = profile_values(name, ROOT / "profiles")
    values["train"] |= {"dp_size": dp_size, "global_batch_size": dp_size}
    values["convert"] |= {"tp_size": tp_size, "kv_size_multiplier": 1}
    values["neuron"] |= neuron
    return values


@pytest.mark.parametrize(
    ("name", "supported", "refused"),
    [
        (TRN1, [(1, 1), (2, 1), (1, 8), (4, 8), (2, 32)], [(1, 4), (1, 16), (3, 8), (1, 64)]),
        (TRN2, [(1, 1), (1, 4), (4, 4), (2, 32), (1, 64), (4, 32)], [(1, 2), (1, 8), (1, 32), (3, 32), (1, 128)]),
    ],
)
def test_only_numbers_of_ranks_that_aws_supports(
    name: str, supported: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    for sizes in supported:
        check_params(changed(name, *sizes), Path("params.yaml"))
    for dp_size, tp_size in refused:
        with pytest.raises(UserError) as refusal:
            check_params(changed(name, dp_size, tp_size), Path("params.yaml"))
        counts = "1, 2, 8, 32" if name == TRN1 else "1, 4, 16, 64"
        assert f"is {dp_size * tp_size} ranks, which AWS does not support on trn" in str(refusal.value)
        assert f"choose them for {counts}, or for several full instances" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_nothing_is_known_of_cores_that_are_not_joined() -> None:
    check_params(changed(TRN2, 1, 2, logical_core_size=1), Path("params.yaml"))


def test_instances_run_the_numbers_that_aws_supports() -> None:
    counts = {
        instance.name: instance.ranks(profile(TRN1 if instance.name.startswith("trn1") else TRN2))
        for instance in INSTANCES
    }
    assert counts == {
        "trn1.2xlarge": (1, 2),
        "trn1.32xlarge": (1, 2, 8, 32),
        "trn2.3xlarge": (1, 4),
        "trn2.48xlarge": (1, 4, 16, 64),
        # AWS says nothing about these.
        "trn3-gen2-server": (1, 2, 4, 8, 16),
        "trn3-gen1-server": (1, 2, 4, 8, 16, 32, 64),
    }


def test_only_the_largest_instances_train_together() -> None:
    with pytest.raises(UserError, match=r"only trn1\.32xlarge and trn2\.48xlarge train together, not trn2\.3xlarge"):
        on_nodes(profile("llama3-8b-trn2-3xl"), 2)


def test_the_plan_takes_only_numbers_that_aws_supports() -> None:
    for name in (name for name in profile_names(ROOT / "profiles") if "trn" in name):
        params = profile(name)
        model = params.model.source.partition("@")[0].rpartition("/")[2]
        config = ModelConfig.from_hf(read_json(ROOT / "profiles/configs" / f"{model}.json"))
        fit = smallest_fit(params, config)
        assert fit is not None
        assert fit[1].convert.tp_size in fit[0].ranks(params)
    with pytest.raises(UserError, match=r"convert\.tp_size 3 does not divide the 64 ranks of a full trn2\.48xlarge"):
        on_nodes(profile(convert={"tp_size": 3}), 2)


# Driver and SDK ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiler", "fitting", "others"),
    [
        ("2.24.5133.0", ["2.27.4.0", "2.28.0.0"], ["2.26.10.0", "2.29.0.0"]),  # SDK 2.29
        ("2.25.3371.0+f524f0ab", ["2.27.4.0", "2.28.0.0"], ["2.26.10.0", "2.29.0.0"]),  # 2.30
        ("2.26.6360.0+6f180f47", ["2.29.0.0", "2.30.2.0"], ["2.28.0.0", "2.9.4.0"]),  # 2.31
    ],
)
def test_the_driver_fits_the_sdk(
    compiler: str, fitting: list[str], others: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuron_machine, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(nxd_checks, "installed", lambda python, packages: dict.fromkeys(packages, compiler))
    for driver in fitting:
        (tmp_path / "version").write_text(f"{driver}\n", "utf-8")
        assert f"Neuron driver {driver} and neuronx-cc {compiler} fit (SDK 2." in nxd_checks.check_driver(profile())
    for driver in others:
        (tmp_path / "version").write_text(f"{driver}\n", "utf-8")
        with pytest.raises(UserError, match=rf"Neuron driver {driver} does not fit SDK .* aws-neuronx-dkms=2\.2\d"):
            nxd_checks.check_driver(profile())


def test_a_driver_with_another_compiler_is_only_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_machine, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("2.30.2.0\n", "utf-8")
    for compiler in ("2.27.5334.0", None):
        monkeypatch.setattr(nxd_checks, "installed", lambda python, packages: {packages[0]: compiler})  # noqa: B023
        assert "it is not known whether they fit" in nxd_checks.check_driver(profile())


# Compiling -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with NFS, EFS and FSx for Lustre. Returns the folder in which they are mounted."""
    lines = [
        "/dev/root / ext4 rw 0 0", f"server:/home {tmp_path}/nfs nfs rw 0 0",
        f"fs-1.efs:/ {tmp_path}/with\\040space nfs4 rw 0 0", f"10.0.0.9@tcp:/fsx {tmp_path}/fsx lustre rw 0 0",
        f"/dev/nvme1n1 {tmp_path}/nfs/disk xfs rw 0 0",
    ]  # fmt: skip
    (tmp_path / "mounts").write_text("\n".join(lines) + "\n", "utf-8")
    monkeypatch.setattr(neuron_machine, "MOUNTS", tmp_path / "mounts")
    return tmp_path


def test_the_file_system_of_a_folder(mounts: Path) -> None:
    folders = {"nfs/a/b": "nfs", "nfs/disk/a": "xfs", "with space": "nfs4", "fsx": "lustre", "nfsx": "ext4"}
    for folder, kind in folders.items():
        assert neuron_machine.file_system(mounts / folder) == kind
    (mounts / "link").symlink_to(mounts / "fsx")
    assert neuron_machine.file_system(mounts / "link/cache") == "lustre"
    with (mounts / "mounts").open("a") as file:
        file.write(f"/dev/nvme2n1 {mounts}/fsx ext4 rw 0 0\n")  # over the other
    assert neuron_machine.file_system(mounts / "fsx") == "ext4"


def test_nodes_may_not_share_a_compile_cache_on_a_network_file_system(
    mounts: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NEURON_CC_FLAGS", "NEURON_COMPILE_CACHE_URL"):
        monkeypatch.delenv(name, raising=False)

    def cached(folder: str, nodes: int = 2) -> str:
        params = profile(neuron={"compile_cache": folder}, train={"dp_size": 2 * nodes})
        return machine_checks.check_compile_cache(params)

    for folder in (f"{mounts}/nfs/cache", f"{mounts}/with space", f"{mounts}/fsx"):
        with pytest.raises(
            UserError, match=r"the compile cache .* is on .*, where 2 nodes would corrupt it: set neuron"
        ):
            cached(folder)
        assert "let no other machine use this folder" in cached(folder, nodes=1)
    assert "xfs" in cached(f"{mounts}/nfs/disk/cache")
    assert "nfs" in cached(f"{mounts}/nfs/{socket.gethostname()}/cache")  # AWS's remedy
    assert cached("s3://bucket/cache") == "compile cache s3://bucket/cache"
    monkeypatch.setenv("NEURON_COMPILE_CACHE_URL", f"{mounts}/fsx/cache")
    with pytest.raises(UserError, match="fsx/cache is on lustre"):
        cached("/var/tmp/cache")
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O1 --cache_dir=/var/tmp/cache --model-type=transformer")
    assert cached("/var/tmp/other") == "compile cache /var/tmp/cache on ext4"


def test_the_launcher_refuses_a_shared_cache(mounts: Path) -> None:
    params = profile(neuron={"compile_cache": f"{mounts}/nfs/cache"}, train={"dp_size": 4})
    with pytest.raises(UserError, match="where 2 nodes would corrupt it"):
        neuron_machine.prepare(params, environment.compile_cache(params), 64, 2)


def test_a_cache_that_cannot_be_written_is_reported() -> None:
    with pytest.raises(UserError, match=r"compile cache /proc/\w+/x cannot be written: set neuron\.compile_cache"):
        machine_checks.check_compile_cache(profile(neuron={"compile_cache": "/proc/self/x"}))


def test_training_and_precompilation_have_the_same_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed compilations are tried again in both, and equal flags give equal graphs. Those of the user are kept."""
    for given in (None, "-O2"):
        monkeypatch.delenv("NEURON_CC_FLAGS", raising=False)
        if given:
            monkeypatch.setenv("NEURON_CC_FLAGS", given)
        _, env = compile_command(profile())
        flags = nxd_environment.training_environment(profile(), 64)["NEURON_CC_FLAGS"]
        assert env["NEURON_CC_FLAGS"] == flags
        assert flags == (given or "--model-type=transformer -O1 --retry_failed_compilation")


@pytest.mark.parametrize(
    ("available", "cores", "compilers"), [(2000, 192, 48), (100, 192, 3), (100, 8, 2), (20, 192, 1), (20, 2, 1)]
)
def test_as_many_compilers_as_memory_and_cores_allow(
    available: float, cores: int, compilers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 GiB per compiler for 4,096 tokens."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    command, _ = compile_command(profile())
    assert command[1:3] == ["--num_parallel", str(compilers)]
    found = nxd_checks.check_compiler_memory(profile())
    assert isinstance(found, Caution) == (available == 20)
    if available == 20:
        assert found.startswith("20 GiB of memory available may be too little to compile (about 32 per compiler, 15 ")
    else:
        assert found == f"memory for {compilers} compilers of about 32 GiB at a time"
