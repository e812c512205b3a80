"""params.yaml in the working tree after an experiment whose params were refused.

`dvc exp run --set-param` changes params.yaml, runs the stages and, if one fails, leaves the file as it is. So that no
params stay that no stage has run with, the first stage puts the former file back.

What DVC does before it runs a stage (dvc/repo/experiments/queue/base.py, `_stash_exp`): it stashes the changes of the
working tree, if there are any, on top of HEAD, changes the params, stashes the result as the experiment (EXEC_MERGE),
and drops the first stash again. A dropped stash stays in Git's object store for two weeks.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from trnlora import paths
from trnlora.files import atomic_file

EXPERIMENT = "refs/exps/exec/EXEC_MERGE"
BASELINE = "refs/exps/exec/EXEC_HEAD"


def restore_params() -> bool:
    """Give params.yaml the bytes that it had before the `dvc exp run` that this process belongs to. Returns whether.

    Nothing is changed where there is no such command (`dvc repro`), where the experiment runs in a copy of the project
    (--temp, --queue), where params.yaml is not what that command wrote, nor where Git does not hold the former file.
    """
    started = _started()
    root = os.environ.get("DVC_ROOT")
    if started is None or root is None or "DVC_EXP_NAME" not in os.environ or Path(root).resolve() != Path.cwd():
        return False
    now = paths.PARAMS.read_bytes() if paths.PARAMS.is_file() and not paths.PARAMS.is_symlink() else None
    before = _content(_user_stash(started) or BASELINE)
    if now is None or before is None or before == now or _content(EXPERIMENT) != now:
        return False
    with atomic_file(paths.PARAMS) as partial:
        partial.write_bytes(before)
        partial.chmod(paths.PARAMS.stat().st_mode & 0o777)
    return True


def _started() -> float | None:
    """When the `dvc exp run` above this process started, in seconds since 1970; None if there is none."""
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):  # another user's process, or one that has just ended
            if {("exp", "run"), ("experiments", "run")} & set(itertools.pairwise(process.cmdline())):
                return process.create_time() + _fraction_of_boot_time()
    return None


def _fraction_of_boot_time() -> float:
    """Seconds by which psutil's times of processes are too early: on Linux it counts them from a whole second."""
    return (time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)) % 1 if sys.platform == "linux" else 0


def _user_stash(started: float) -> str | None:
    """The commit in which DVC has stashed the working tree since `started`; None if there was nothing to stash.

    A stash has HEAD and a commit of the index as parents, and Git's own message; a queued experiment has another one.
    The stash of an earlier command on the same HEAD was written before `started`.
    """
    head, until = _git("rev-parse", BASELINE), _git("show", "--no-patch", "--format=%ct", EXPERIMENT)
    if head is None or until is None:
        return None
    listed = _git("cat-file", "--batch-all-objects", "--batch-check=%(objecttype) %(objectname)", "--unordered") or b""
    commits = [line.split()[1] for line in listed.splitlines() if line.startswith(b"commit ")]
    shown = _git("log", "--no-walk=unsorted", "--stdin", "--format=%ct %H %P:%s", stdin=b"\n".join(commits)) or b""
    stashes = []
    for line in shown.splitlines():
        identity, _, subject = line.partition(b":")
        seconds, commit, *parents = identity.decode().split()
        is_stash = parents[:1] == [head.decode()] and len(parents) > 1 and subject.startswith(b"WIP on ")
        if is_stash and int(started) <= int(seconds) <= int(until) and started < _written(commit):
            stashes.append((int(seconds), commit))
    return max(stashes)[1] if stashes else None


def _written(commit: str) -> float:
    """When Git wrote a commit, in seconds since 1970, to the fraction; 0 for what Git has packed since.

    Git's own times are in whole seconds. A dropped stash has a file of its own in Git's store while the command runs.
    """
    path = _git("rev-parse", "--git-path", f"objects/{commit[:2]}/{commit[2:]}")
    if path is None or not (file := Path(os.fsdecode(path))).is_file():
        return 0
    written = file.stat().st_mtime
    return written if written % 1 else written + 1  # a file system that keeps whole seconds


def _content(revision: str) -> bytes | None:
    """params.yaml in a commit, as Git would check it out; None if it is not there."""
    return _git("cat-file", "--filters", f"{revision}:./{paths.PARAMS}", strip=False)


def _git(*arguments: str, stdin: bytes = b"", strip: bool = True) -> bytes | None:
    done = subprocess.run(["git", *arguments], input=stdin, capture_output=True, check=False)
    if done.returncode:
        return None
    return done.stdout.strip() if strip else done.stdout
