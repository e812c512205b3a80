"""Backend neuron around the training: its environment, the processors of its ranks, what doctor says of its machine.

Stubs stand for AWS's programs and packages.
"""

import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, trainium
from support.trainium import BENCH, device, executable, install_neuron_ls

from trnlora.backends import environment, neuron_environment, neuron_machine
from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.preflight import doctor, machine_checks, neuron_checks
from trnlora.preflight.caution import Caution
from trnlora.preflight.precompile import compile_command
from trnlora.profiles import profile_values

NAME = "llama3-8b-trn2"
SET = {
    "TORCH_NEURONX_NEFF_CACHE_DIR",
    "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR",
    "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION",
    "NEURON_LOGICAL_NC_CONFIG",
}
FITTING = {"python": "3.12.3", "torch": "2.13.0+cpu", "torch-neuronx": "2.13.3.0.1", "neuronx-cc": "2.28.7631.0+ab"}


def profile(**sections: dict[str, Any]) -> Params:
    return trainium.profile(NAME, **sections)


# The training stage --------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the training stage gets as far as the check of its loggers, one of which is missing."""
    folder = tmp_path / "project"
    (folder / "artifacts/model").mkdir(parents=True)
    shutil.copyfile(ROOT / "profiles/configs/Meta-Llama-3-8B.json", folder / "artifacts/model/config.json")
    values = profile_values(NAME, ROOT / "profiles")
    values["neuron"] |= {"compile_cache": str(tmp_path / "cache")}
    values["train"] |= {"loggers": ["wandb"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return folder


def train(project: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "stages/finetune_lora.py")]
    return subprocess.run(
        command, cwd=project, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )


def change(project: Path, **sections: dict[str, Any]) -> None:
    values = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    for section, changed in sections.items():
        values[section] |= changed
    (project / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")


def test_the_stage_runs_in_the_present_environment_or_in_another(project: Path, tmp_path: Path) -> None:
    """The variables are set and the programs of the Python come first, before anything imports torch."""
    assert "train.loggers names wandb" in train(project).stderr
    shows = "; ".join(f'echo "{name}=${name}"' for name in sorted(SET)) + "; neuronx-cc"
    other = executable(tmp_path / "venv/bin/python", shows)
    executable(tmp_path / "venv/bin/neuronx-cc", "echo of this environment")
    change(project, neuron={"python": str(other)})
    lines = train(project, NEURON_LOGICAL_NC_CONFIG="1").stdout.splitlines()
    assert lines[0] == "NEURON_LOGICAL_NC_CONFIG=1"  # the user's
    assert lines[1] == "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION=1"
    assert lines[2] == f"TORCH_NEURONX_NEFF_CACHE_DIR={tmp_path}/cache/neff"
    assert lines[3].startswith("TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR=/")
    assert lines[4:] == ["of this environment"]


def test_the_variables_are_those_of_native_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.delenv(name, raising=False)
    env = neuron_environment.training_environment(profile())
    assert set(env) - {"PATH", "PYTHONPATH"} == SET  # nothing of torch_xla, and no core or address
    several = neuron_environment.training_environment(profile(), num_nodes=2)
    assert set(several) - set(env) == {"FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA"}


def test_cores_that_all_ranks_would_take_are_refused(project: Path) -> None:
    refused = train(project, NEURON_RT_VISIBLE_CORES="0-63").stderr
    assert refused.startswith("error: NEURON_RT_VISIBLE_CORES is 0-63, which all 64 ranks would get: unset it")
    assert refused.count("\n") == 1


def test_graphs_are_not_kept_on_s3(project: Path) -> None:
    change(project, neuron={"compile_cache": "s3://bucket/cache"})
    assert "keeps compiled graphs in a folder: name one" in train(project).stderr


def test_the_cores_of_the_ranks_must_be_free(project: Path, tmp_path: Path) -> None:
    """Ranks take the cores from 0 on: others do not matter."""
    install_neuron_ls(tmp_path, [device(n, [BENCH] if n == 15 else None) for n in range(16)])
    refused = train(project).stderr
    assert refused.startswith(
        "error: 60 of 64 Neuron cores are free and 64 are needed: others are held by process 113985"
    )
    change(project, train={"dp_size": 1})
    assert "train.loggers names wandb" in train(project).stderr
    install_neuron_ls(tmp_path, [device(n, [BENCH] if n == 0 else None) for n in range(16)])
    assert "0 of 4 Neuron cores are free and 4 are needed" in train(project).stderr
    neuron_machine.check_free_cores(4, 2)  # of a program that takes any


def test_ranks_are_not_forks_and_other_backends_are_left_alone() -> None:
    assert not environment.ranks_may_be_forked(profile())
    assert environment.ranks_may_be_forked(trainium.profile("smollm2-135m-cpu"))


# The processors of the ranks -----------------------------------------------------------------------------------------


def test_each_rank_gets_the_processors_beside_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trn2.48xlarge: devices 4 to 11 are at NUMA node 0. neuron-ls need not list them in order."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    install_neuron_ls(tmp_path, [device(n) for n in (*range(4, 16), *range(4))])
    lists = neuron_machine.pinning(64, 2)[neuron_machine.CPUS_OF_RANKS].split(";")
    assert lists == ["48-95,144-191"] * 16 + ["0-47,96-143"] * 32 + ["48-95,144-191"] * 16
    assert len(neuron_machine.pinning(128, 1)[neuron_machine.CPUS_OF_RANKS].split(";")) == 128
    assert neuron_machine.pinning(65, 2) == {}  # more ranks than cores
    install_neuron_ls(tmp_path, [device(0) | {"cpu_affinity": "N/A"}])
    assert neuron_machine.pinning(4, 2) == {}
    install_neuron_ls(tmp_path, [{"nc_count": 2}])  # as older tools list a device
    assert neuron_machine.pinning(1, 2) == {}


def test_the_launcher_tells_the_ranks_their_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv(neuron_machine.CPUS_OF_RANKS, "")  # so that it is as before when the test ends
    monkeypatch.setattr(environment, "rerun", lambda python, env: None)
    install_neuron_ls(tmp_path, [device(n) for n in range(16)])
    environment.enter(profile(neuron={"compile_cache": str(tmp_path)}), 64, 1, "localhost")
    assert os.environ[neuron_machine.CPUS_OF_RANKS].count(";") == 63


@pytest.mark.parametrize(
    ("lists", "rank", "expected"),
    [("{0};{1}", "1", "1"), ("{0};{0}-{1}", "1", "01"), ("{0},9999;{1}", "0", "0"), ("9998-9999;{1}", "0", "01")],
)
def test_a_rank_runs_on_its_processors_as_far_as_it_may(lists: str, rank: str, expected: str) -> None:
    """The threads that it starts too. `expected`: which of the first two processors of this process."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    code = (
        "import os, threading; from trnlora.backends.neuron_machine import pin_rank; "
        f"os.sched_setaffinity(0, {{{first}, {second}}}); pin_rank(); "
        "thread = threading.Thread(target=lambda: print(sorted(os.sched_getaffinity(0)))); thread.start()"
    )
    env = os.environ | {neuron_machine.CPUS_OF_RANKS: lists.format(first, second), "LOCAL_RANK": rank}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{[(first, second)[int(which)] for which in expected]}\n"


def test_a_rank_pins_itself_before_torch_is_imported() -> None:
    code = (
        "import os, sys; from trnlora.backends import neuron_machine; from trnlora.training import launch; "
        "neuron_machine.pin_rank = lambda: (print('torch' in sys.modules, flush=True), os._exit(0)); "
        "launch.run_rank(print)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# make doctor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """A trn2.48xlarge with SDK 2.33: driver, neuron-ls and a training environment. Returns params that use it."""
    for name in ("NEURON_RT_VISIBLE_CORES", *SET):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    install_neuron_ls(tmp_path, [device(n) for n in range(16)])
    (tmp_path / "version").write_text("2.31.7.0\n", "utf-8")
    monkeypatch.setattr(neuron_machine, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, resource.RLIM_INFINITY))
    python = executable(tmp_path / "python", "")
    executable(tmp_path / "neuronx-cc", "")
    have(monkeypatch)
    return profile(neuron={"python": str(python), "compile_cache": str(tmp_path / "cache")})


def have(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """The training environment's versions: those that fit, but for `versions`, with _ for -."""
    changed = {name.replace("_", "-"): version for name, version in versions.items()}

    def installed(python: str, packages: tuple[str, ...]) -> dict[str, str | None]:
        return {name: (FITTING | changed).get(name, "1.0") for name in packages}

    monkeypatch.setattr(neuron_checks, "installed", installed)


def test_a_machine_that_has_everything_passes(machine: Params) -> None:
    found = [check() for check in neuron_checks.neuron_checks(machine)]
    assert found[0] == f"backend neuron: 64 cores for 64 training processes, {machine.neuron.python}"
    assert "Neuron driver 2.31.7.0 and neuronx-cc 2.28.7631.0+ab fit (SDK 2.33, released with driver 2.31.7.0)" in found
    assert "ranks are pinned to the processors beside their devices: 48-95,144-191 and 0-47,96-143" in found
    assert "no other process holds the 64 cores" in found
    assert any(line.startswith(f"compile cache {machine.neuron.compile_cache}/neff on ") for line in found)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"python": "3.11.7"}, r"Python 3\.12, 3\.13 or 3\.14 \(found 3\.11\.7\)$"),
        ({"torch_neuronx": "2.9.0.2.15.32035"}, r"torch-neuronx 2\.13\.\* for torch 2\.13\.0\+cpu \(found 2\.9\.0\.2"),
        ({"torch_neuronx": "1.0.0"}, "PyPI has a placeholder of that name"),
        (
            {"torch_neuronx": "2.14.3.0"},
            r'uv pip install "torch-neuronx==2\.13\.\*" --index https://pip\.repos\.neuron',
        ),
        ({"torch": "2.9.0"}, r"torch 2\.13 or newer \(found 2\.9\.0, .* backend nxd"),
        ({"neuronx_cc": "2.26.6360.0"}, r"neuronx-cc 2\.28 or newer, of SDK 2\.33 \(found 2\.26\.6360\.0\)"),
        ({"torch_neuronx": None, "nki": None}, "torch-neuronx, nki in .* has the commands"),
    ],
)
def test_packages_that_do_not_fit_are_named(
    machine: Params, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None], message: str
) -> None:
    have(monkeypatch, **versions)
    with pytest.raises(UserError, match=f"^backend neuron lacks .*{message}") as lacking:
        neuron_checks.check_neuron(machine)
    assert ";" not in str(lacking.value)  # nothing else


@pytest.mark.parametrize("family", ["2.14", "2.15"])
def test_newer_releases_are_accepted(machine: Params, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    have(monkeypatch, python="3.14.0", torch=f"{family}.0", torch_neuronx=f"{family}.4.0", neuronx_cc="2.29.1.0")
    neuron_checks.check_neuron(machine)
    assert isinstance(neuron_checks.check_driver(machine), Caution)  # which driver it needs is not known


def test_an_older_driver_is_pointed_out(machine: Params) -> None:
    neuron_machine.DRIVER.write_text("2.30.2.0\n", "utf-8")
    found = neuron_checks.check_driver(machine)
    assert isinstance(found, Caution)
    assert "2.30.2.0 is older than that of SDK 2.33: if the runtime does not start, install" in found
    neuron_machine.DRIVER.write_text("2.32.1.0\n", "utf-8")
    assert not isinstance(neuron_checks.check_driver(machine), Caution)


def test_other_machines_are_refused(machine: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_neuron_ls(tmp_path, [{"nc_count": 2}] * 16, instance="trn1.32xlarge")
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0-3")
    with pytest.raises(UserError) as lacking:
        neuron_checks.check_neuron(machine)
    cores, generation, own = str(lacking.value).removeprefix("backend neuron lacks ").split("; ")
    assert cores.startswith("cores: 16 of the 64 of dp_size × tp_size")
    assert generation == "a Trn2 or Trn3 (this is a trn1.32xlarge: backend nxd trains on Trn1)"
    assert own.startswith("a core for each rank: NEURON_RT_VISIBLE_CORES is 0-3")
    install_neuron_ls(tmp_path, [device(n) for n in range(16)], instance="trn3pds.48xlarge")
    monkeypatch.delenv("NEURON_RT_VISIBLE_CORES")
    neuron_checks.check_neuron(machine)


def test_a_compiler_that_training_would_not_find_is_missing(machine: Params, tmp_path: Path) -> None:
    (tmp_path / "neuronx-cc").unlink()
    with pytest.raises(UserError, match=f"lacks neuronx-cc beside {tmp_path}/python"):
        neuron_checks.check_neuron(machine)


def test_devices_without_processors_are_pointed_out(machine: Params, tmp_path: Path) -> None:
    install_neuron_ls(tmp_path, [device(n) | {"cpu_affinity": ""} for n in range(16)])
    found = neuron_checks.check_pinning(machine)
    assert isinstance(found, Caution)
    assert "ranks are not pinned" in found


@pytest.mark.parametrize(
    ("system", "version", "supported"), [("ubuntu", "24.04", True), ("ubuntu", "22.04", False), ("amzn", "2023", False)]
)
def test_systems_that_aws_does_not_support_are_pointed_out(
    monkeypatch: pytest.MonkeyPatch, system: str, version: str, supported: bool
) -> None:
    release = {"ID": system, "VERSION_ID": version, "PRETTY_NAME": f"{system} {version}"}
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    found = neuron_checks.check_system()
    assert isinstance(found, Caution) == (not supported)
    assert found.startswith(f"{system} {version}")


def test_a_shared_compile_cache_is_refused(machine: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(f"server:/home {tmp_path}/cache nfs4 rw 0 0\n/dev/root / ext4 rw 0 0\n", "utf-8")
    monkeypatch.setattr(neuron_machine, "MOUNTS", tmp_path / "mounts")
    assert isinstance(machine_checks.check_compile_cache(machine), Caution)
    nodes = machine.model_copy(update={"train": machine.train.model_copy(update={"dp_size": 32})})
    with pytest.raises(UserError, match="where 2 nodes would corrupt it"):
        machine_checks.check_compile_cache(nodes)


def test_a_laptop_lacks_all_of_it_in_one_line() -> None:
    """And what is only to know about is marked, and is no failure of its own."""
    command = [sys.executable, str(ROOT / "tools/doctor.py"), "--profile", NAME]
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("✗ backend neuron lacks")]
    assert "the Neuron driver (start AWS's" in line
    assert "torch-neuronx, neuronx-cc, nki in " in line
    assert "`make setup-neuron` installs them" in line
    if sys.version_info < (3, 12):
        assert "Python 3.12, 3.13 or 3.14 (found 3.11" in line
    release = platform.freedesktop_os_release()
    if release["ID"] != "ubuntu":
        assert f"! {release['PRETTY_NAME']}: AWS supports native PyTorch on Ubuntu 24.04 and 26.04" in done.stdout


def test_a_caution_is_no_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "checks", lambda params, repro: iter([lambda: Caution("careful"), lambda: "fine"]))
    assert doctor.run_checks(profile())
    assert doctor.run_checks(profile(), quiet=True)
    assert capsys.readouterr().out == "! careful\n✓ fine\n"


def test_nothing_is_compiled_ahead() -> None:
    with pytest.raises(UserError, match=r"compiles a graph when it is first run and keeps it in neuron\.compile_cache"):
        compile_command(profile())
