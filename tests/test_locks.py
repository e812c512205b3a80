"""Two processes at once, kills, signals and limits: nothing of a first run is touched, nothing is half written."""

import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT
from support.stages import set_params
from test_dvc import STAGES as ALL_STAGES
from test_dvc import outs_of

from trnlora.errors import UserError, explain, run
from trnlora.files import atomic_dir, atomic_file, atomic_outputs, locked, partial_path
from trnlora.params import load_params
from trnlora.preflight.doctor import check_no_other_run, checks

# check_params writes the same bytes every time, in a moment, and reads no other stage's output.
STAGES = {name: stage for name, stage in ALL_STAGES.items() if name != "check_params"}

HOLD = """
import sys
from pathlib import Path
from trnlora.files import locked
with locked(Path(sys.argv[1]), shared=len(sys.argv) > 2):
    print("locked", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds a lock until it is ended."""

    def __init__(self, target: Path | str, *shared: str) -> None:
        command = [sys.executable, "-c", HOLD, str(target), *shared]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        assert self.process.stdout.readline() == "locked\n"

    def __enter__(self) -> "Holder":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params and a file in place of each output. Nothing can be read: a lock comes before that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    set_params(tmp_path, model={"source": f"path://{tiny_llama}", "sha256": None}, convert={"tp_size": 1})
    for stage in STAGES.values():
        for out in outs_of(stage):
            target = tmp_path / out
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix in {".json", ".jsonl", ".SHA256SUMS"}:
                target.write_text(out)
            else:
                target.mkdir()
                (target / "of the first").write_text(out)
    shutil.copy(tiny_llama / "config.json", tmp_path / "artifacts/model")  # finetune_lora's launcher looks at it
    return tmp_path


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file; the locks' own aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def ended_with(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    main = runpy.run_path(str(ROOT / script))["main"]
    with pytest.raises(SystemExit) as end:
        run(main)
    return str(end.value.code)


INPUTS = {
    "fetch_model": [],
    "prepare_data": ["artifacts/model"],
    "convert_nxd": ["artifacts/model"],
    "finetune_lora": ["artifacts/model", "artifacts/prepared", "artifacts/shards"],
    "flatten_adapter": ["artifacts/lora_adapter", "artifacts/model", "artifacts/prepared"],
    "eval_vllm": ["artifacts/adapter", "artifacts/model", "artifacts/prepared"],
}


@pytest.mark.parametrize(
    ("stage", "target"), [(name, path) for name in STAGES for path in (*outs_of(STAGES[name]), *INPUTS[name])]
)
def test_a_stage_is_refused_before_it_reads_or_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, target: str
) -> None:
    """While another process writes one of its outputs, or of its inputs. The error names that process."""
    with Holder(target) as first:
        before = tree(folder)
        line = ended_with(f"stages/{stage}.py", monkeypatch)
        assert tree(folder) == before
        assert line.startswith(f"error: {target} is in use by process {first.process.pid} ({sys.executable} -c ")
        assert line.endswith(": wait until that is done, or stop it")
    assert not list(folder.glob("**/.*.partial"))


@pytest.mark.parametrize("stage", [name for name in STAGES if INPUTS[name]])
def test_a_stage_does_not_replace_what_another_process_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    out = outs_of(STAGES[stage])[0]
    with Holder(out, "shared"):
        before = tree(folder)
        assert f"{out} is in use by process" in ended_with(f"stages/{stage}.py", monkeypatch)
        assert tree(folder) == before


@pytest.mark.parametrize(
    ("script", "arguments", "target"),
    [
        ("tools/write_profile.py", ["smollm2-135m-cpu"], "params.yaml"),
        ("tools/device_check.py", [], ".scratch/device-check"),
        ("stages/convert_nxd.py", ["--to-hf", "hf"], "hf"),
        ("stages/convert_nxd.py", ["--to-hf", "hf"], "artifacts/shards"),
        ("tools/serve.py", [], "artifacts/model"),
        ("tools/serve.py", [], "artifacts/adapter"),
    ],
)
def test_a_tool_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, script: str, arguments: list[str], target: str
) -> None:
    with Holder(target) as first:
        (folder / "profiles").symlink_to(ROOT / "profiles")
        before = tree(folder)
        line = ended_with(script, monkeypatch, *arguments)
        assert f"{target} is in use by process {first.process.pid} (" in line
        assert tree(folder) == before


def test_make_repro_is_refused_before_dvc_deletes_what_a_stage_is_writing(folder: Path) -> None:
    """A stage that has outlived its dvc. tools/doctor.py --repro, which runs before `dvc repro`, has this check."""
    assert check_no_other_run in checks(load_params(), repro=True)
    check_no_other_run()
    with Holder("artifacts/lora_adapter") as first, pytest.raises(UserError, match=f"process {first.process.pid} "):
        check_no_other_run()


# Locks


def test_a_killed_process_leaves_no_lock_behind_nor_does_its_child(tmp_path: Path) -> None:
    target = tmp_path / "out"
    forks = HOLD.replace("    print(", "    import os, time\n    if os.fork() == 0: time.sleep(60)\n    print(")
    command = [sys.executable, "-c", forks, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as first:
        assert first.stdout
        assert first.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=f"in use by process {first.pid} "), locked(target):
            pass
        first.kill()
        first.wait()
        os.killpg(first.pid, 0)  # its child lives
        with locked(target):
            pass
        os.killpg(first.pid, signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_a_lock_names_its_process_and_not_the_shell_that_started_it(tmp_path: Path) -> None:
    """Also where the shell has the argument -c as well."""
    code = "import json, os; from pathlib import Path; from trnlora.files import locked\n"
    code += "with locked(Path('out')): print(json.loads(Path('.out.lock').read_text())[0] == os.getpid())"
    command = ["bash", "-c", '"$0" -c "$1"; exit', sys.executable, code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True).stdout == "True\n"


def test_readers_share_and_a_writer_is_told_all_of_them(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Holder(target, "shared") as one, Holder(target, "shared") as other:
        with locked(target, shared=True):
            pass
        both = rf"process {one.process.pid} .* and process {other.process.pid} "
        with pytest.raises(UserError, match=both), locked(target):
            pass


def test_what_cannot_be_written_can_be_read_without_a_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "absent" / "out", shared=True):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot write to /sys"), locked(Path("/sys/out")):
        pass


# Outputs


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[Path, Path]:
    """A folder and a file of an earlier run."""
    folder, file = tmp_path / "folder", tmp_path / "file.json"
    folder.mkdir()
    (folder / "old").write_text("old")
    file.write_text("old")
    return folder, file


def test_outputs_appear_together_and_an_error_keeps_the_old_ones(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = outputs
    before = tree(tmp_path)

    def write(fails: bool) -> None:
        with atomic_outputs([folder], [file]):
            (partial_path(folder) / "new").write_text("new")
            partial_path(file).write_text("new")
            assert tree(tmp_path).items() > before.items()
            if fails:
                raise UserError("no")

    with pytest.raises(UserError, match="no"):
        write(fails=True)
    assert tree(tmp_path) == before
    write(fails=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file.json", "folder", "new"]
    assert file.read_text() == "new"


def test_what_a_killed_process_left_is_removed(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = outputs
    for target in outputs:
        partial_path(target).mkdir()
        (partial_path(target) / "left").touch()
        target.with_name(f".{target.name}.lock").write_text("not JSON")
    with atomic_outputs([folder], [file]):
        partial_path(file).write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "folder"]
    assert not list(folder.iterdir())


def test_a_link_is_replaced_and_what_it_points_to_is_not_touched(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    linked = tmp_path / "link"
    linked.symlink_to(outputs[0])
    with atomic_dir(linked) as partial:
        (partial / "new").write_text("new")
    assert not linked.is_symlink()
    assert [path.name for path in outputs[0].iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.json", "folder", "link"]


def test_another_kind_is_refused_first(outputs: tuple[Path, Path]) -> None:
    folder, file = outputs
    with pytest.raises(UserError, match=r"file\.json is a file where a folder is expected"), atomic_dir(file):
        raise AssertionError
    with pytest.raises(UserError, match="folder is a folder where a file is expected"), atomic_file(folder):
        raise AssertionError


def test_others_can_read_what_a_library_wrote_for_its_owner(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "folder") as partial:
        (partial / "file").touch(mode=0o600)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "folder/file").stat().st_mode) == 0o666 & ~umask


# The end of a script

WRITES = """
import os, signal, sys, time
from pathlib import Path
from trnlora.errors import run
from trnlora.files import atomic_dir
for number in (signal.SIGINT, signal.SIGHUP):  # which a shell's background jobs, or nohup, ignore
    signal.signal(number, signal.SIG_DFL)
def main():
    with atomic_dir(Path("out")) as partial:
        (partial / "file").touch()
        try: print("writing", flush=True); time.sleep(60)
        except BaseException:
            if "swallow" in sys.argv: raise AttributeError("a library's own")
            raise
        finally:
            if "slow" in sys.argv: print("cleaning up", flush=True); time.sleep(60)
run(main)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """script(code, *arguments): a Python process in tmp_path."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started = []

    def start(code: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("swallow", ["", "swallow"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(
    script: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals, swallow: str
) -> None:
    process = script(WRITES, swallow)
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert printed == ("" if number == signal.SIGINT else f"error: stopped by {number.name}: rerun to continue\n")
    assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_at_once(script: Callable[..., subprocess.Popen[str]]) -> None:
    process = script(WRITES, "slow")
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert printed == ""


def test_text_that_the_terminal_cannot_show_and_a_reader_that_has_gone(
    script: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    shown = script("from trnlora.errors import run; run(lambda: print('✓ …'))")
    assert shown.communicate() == ("\\u2713 \\u2026\n", "")
    process = script("from trnlora.errors import run; run(lambda: [print('line') for _ in range(10**6)])")
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def too_many_files(folder: Path) -> None:
    command = f"ulimit -n 20; exec {sys.executable} -c 'f = [open(\"/dev/null\") for _ in range(30)]'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    raise OSError(int(re.findall(r"Errno (\d+)", done.stderr)[0]), "Too many open files")


def loop(folder: Path) -> None:
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "loop").read_text()


MACHINE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a loop of links": (loop, "loop is a link that leads back to itself"),
    "a long name": (lambda folder: (folder / ("x" * 300)).touch(), "is too long for its file system"),
    "many open files": (too_many_files, "too many open files"),
    "a missing file": (lambda folder: (folder / ".a.partial/x").read_text(), "/a/x: No such file or directory"),
    "a folder in the way": (lambda folder: folder.mkdir(), "is a directory where a file is expected"),
    "a busy mount": (lambda folder: Path("/proc").rmdir(), "/proc is in use"),
}


@pytest.mark.parametrize("case", MACHINE)
def test_an_error_of_the_machine_is_one_line(tmp_path: Path, case: str) -> None:
    fails, message = MACHINE[case]
    with pytest.raises(OSError, match=r"Errno") as caught:
        fails(tmp_path)
    assert message in str(explain(caught.value))


def test_a_bug_is_not_explained() -> None:
    assert explain(KeyError("key")) is None
    assert explain(OSError("of a library")) is None
