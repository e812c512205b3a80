"""The training stage in the Neuron environment: its programs on PATH. Stubs stand for AWS's programs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT, trainium
from support.trainium import executable

from trnlora.backends.nxd_environment import PROGRAMS
from trnlora.backends.python_environment import with_own_bin
from trnlora.errors import UserError
from trnlora.params import Params
from trnlora.preflight.nxd_checks import check_nxd
from trnlora.profiles import profile_values


def profile(name: str = "llama3-8b-trn2-nxd", **neuron: object) -> Params:
    return trainium.profile(name, neuron=neuron)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with params.yaml of a Trainium profile, and the config of its model."""
    folder = tmp_path / "project"
    (folder / "artifacts/model").mkdir(parents=True)
    shutil.copyfile(ROOT / "profiles/configs/Meta-Llama-3-8B.json", folder / "artifacts/model/config.json")
    return folder


def train(project: Path, python: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The training stage with `python` as neuron.python."""
    values = profile_values("llama3-8b-trn2-nxd", ROOT / "profiles")
    values["neuron"]["python"] = str(python)
    values["train"]["loggers"] = ["wandb"]  # not installed, which ends the stage before it starts ranks
    (project / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    command = [sys.executable, str(ROOT / "stages/finetune_lora.py")]
    return subprocess.run(
        command, cwd=project, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_folder_of_the_python_is_first_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_own_bin("/venv/bin/python", "/usr/bin:/bin") == "/venv/bin:/usr/bin:/bin"
    assert with_own_bin("/venv/bin/python", "/venv/bin:/bin") == "/venv/bin:/bin"
    assert with_own_bin("/venv/bin/python", "/bin:/venv/bin") == "/venv/bin:/bin:/venv/bin"  # not first
    assert with_own_bin("/venv/bin/python", "") == "/venv/bin"
    link = tmp_path / "venv/bin/python"
    link.parent.mkdir(parents=True)
    link.symlink_to(sys.executable)
    assert with_own_bin(str(link), "/bin") == f"{link.parent}:/bin"
    monkeypatch.chdir(tmp_path)
    assert with_own_bin("venv/bin/python", "/bin") == f"{link.parent}:/bin"


@pytest.mark.parametrize("path", ["/usr/bin:/bin", "{own}:/usr/bin:/bin", "/usr/bin:/bin:{venv}"])
def test_the_stage_finds_the_programs_of_the_neuron_environment(project: Path, tmp_path: Path, path: str) -> None:
    """As torch_neuronx does: by name. The project's own environment has programs of the same name here."""
    venv, own = tmp_path / "venv/bin", tmp_path / "own"
    python = executable(venv / "python", "neuronx-cc && libneuronpjrt-path")
    for name in PROGRAMS:
        executable(venv / name, f"echo {name} of the Neuron environment")
        executable(own / name, f"echo {name} of another one")
    done = train(project, python, PATH=path.format(own=own, venv=venv))
    assert done.stdout.splitlines() == [f"{name} of the Neuron environment" for name in PROGRAMS], done.stderr


def test_a_python_that_starts_another_one_is_started_once(project: Path, tmp_path: Path) -> None:
    """As pyenv's do: sys.executable of the new process is never neuron.python."""
    log = tmp_path / "started"
    python = executable(tmp_path / "shims/python", f'echo "$TRNLORA_RERUN_WITH" >> {log}\nexec {sys.executable} "$@"')
    done = train(project, python, TRNLORA_RERUN_WITH="/another/python", NEURON_RT_NUM_CORES="1")
    assert "train.loggers names wandb" in done.stderr
    assert log.read_text("utf-8").splitlines() == [str(python)]


def test_neuron_environment_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """This Python is used as a Neuron environment without AWS's packages."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XLA_USE_BF16", "1")
    with pytest.raises(UserError) as lacking:
        check_nxd(profile(python=sys.executable))
    parts = str(lacking.value).split("; ")
    assert f"torch-neuronx, neuronx-distributed, neuronx-cc in {sys.executable}" in parts[1]
    assert parts[2].startswith("neuronx-cc, libneuronpjrt-path beside ")
    assert parts[3].startswith("float32: XLA_USE_BF16 makes the adapter bfloat16")
    assert len(parts) == 4


def test_doctor_names_programs_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    python = executable(tmp_path / "python", f'exec {sys.executable} "$@"')
    executable(tmp_path / "neuronx-cc", "")
    with pytest.raises(UserError, match=f"; libneuronpjrt-path beside {python} "):
        check_nxd(profile(python=str(python)))
    executable(tmp_path / "libneuronpjrt-path", "")
    with pytest.raises(UserError, match="lacks") as lacking:
        check_nxd(profile(python=str(python)))
    assert " beside " not in str(lacking.value)
