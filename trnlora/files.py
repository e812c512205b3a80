"""Writing files so that a kill, an error or a second process leaves whole ones: locks, temporary names. Checksums.

Everything is written under a temporary name beside its target, which it replaces at the end. A lock, a file beside the
target too, keeps other processes from writing the same, or what another one reads. The kernel frees a lock when its
process ends, however it ends.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trnlora.errors import UserError


def partial_path(target: Path) -> Path:
    """The temporary name of `target`, beside it so that a rename never crosses file systems."""
    return target.with_name(f".{target.name}.partial")


def _old_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.old.partial")


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


# Locks --------------------------------------------------------------------------------------------------------------

LOCK_TRIES = 10  # 0.2 s: a process that only looks whether something is locked holds the lock for a moment

_held: set[int] = set()  # the file descriptors of this process's locks


def _close_held() -> None:
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_close_held)  # a child that is left behind must not hold a lock


@contextlib.contextmanager
def locked(target: Path, shared: bool = False) -> Iterator[None]:
    """Keep other processes from writing `target`, and from reading it unless `shared`.

    Raises UserError naming the process that has locked it, or if it cannot be locked. Without permission to write
    beside it, or without locks in its file system, it is read unlocked. Waits only for locks of a moment.
    """
    try:
        lock = _lock(target, shared)
    except OSError as error:
        if not shared:
            raise _cannot_lock(target, error) from None
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            _unlock(target, lock)


def check_unlocked(target: Path, shared: bool = False) -> None:
    """Raise UserError if `locked` would, because of another process. Creates nothing."""
    if _lock_path(target).exists():
        with locked(target, shared):
            pass


def _lock(target: Path, shared: bool) -> int:
    """Create and lock the file beside `target`; its descriptor. The file names the processes that hold the lock."""
    path = _lock_path(target)
    if not shared:
        path.parent.mkdir(parents=True, exist_ok=True)
    tries = 0
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), path.stat()):
                break
        except FileNotFoundError:
            pass  # its last holder has just removed the file
        except BlockingIOError:
            tries += 1
            if tries == LOCK_TRIES:
                os.close(lock)
                raise UserError(f"{target} is in use by {_users(path)}: wait until that is done, or stop it") from None
            time.sleep(0.02)
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
    _held.add(lock)
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
        if not shared:
            os.truncate(lock, 0)
        os.write(lock, _holder(os.getpid()))
    return lock


def _unlock(target: Path, lock: int) -> None:
    _held.discard(lock)
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while others share it: then the file stays
        _lock_path(target).unlink()
    os.close(lock)


def _cannot_lock(target: Path, error: OSError) -> Exception:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write to {target.parent} ({error.strerror}): fix its permissions and rerun")
    if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF):
        return UserError(
            f"cannot lock {target} ({error.strerror}): its file system has no locks; put the project on a local disk"
        )
    return error


@functools.cache
def _holder(pid: int) -> bytes:
    """The line for this process in a lock's file: process, host and command in JSON.

    pid: of this process. The ranks of a training are named by the process that the user has started, which ends them.
    """
    import psutil

    me = psutil.Process(pid)
    same = [process for process in me.parents() if sys.argv[0] in process.cmdline()]
    shown = same[-1] if same and sys.argv[0].endswith(".py") else me  # "-c" is also an argument of a shell
    return f"{json.dumps([shown.pid, socket.gethostname(), ' '.join(shown.cmdline())])}\n".encode()


def _users(lock: Path) -> str:
    """The processes that hold a lock, as its file names them, without those of this host that have ended."""
    import psutil

    found = []
    with contextlib.suppress(OSError, ValueError):  # removed, or not written because the disk is full
        for pid, host, command in map(json.loads, lock.read_text("utf-8").splitlines()):
            if host != socket.gethostname():
                found.append(f"process {pid} on {host} ({command[:200]})")
            elif psutil.pid_exists(pid):
                found.append(f"process {pid} ({command[:200]})")
    return " and ".join(dict.fromkeys(found)) or "another process"


# Outputs ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_outputs(folders: Sequence[Path], files: Sequence[Path] = (), reads: Sequence[Path] = ()) -> Iterator[None]:
    """Lock these outputs, and the inputs `reads`, and let the caller write every output under its `partial_path`.

    Partial folders exist and are empty. On success, all outputs get their names, one after the other: folders first.
    On an error, or when nothing was written under a file's partial name, what was there before stays as it is. What a
    killed process left is removed first. A link in place of an output is replaced; what it points to is not touched.
    Raises UserError, before anything is changed, if another process uses an output or writes an input, or if an output
    cannot be replaced.
    """
    with contextlib.ExitStack() as locks:
        for target in (*folders, *files):
            locks.enter_context(locked(target))
        for source in reads:
            locks.enter_context(locked(source, shared=True))
        for folder in folders:
            _check_replaceable(folder, is_folder=True)
        for file in files:
            _check_replaceable(file, is_folder=False)
        try:
            for target in (*folders, *files):
                _remove(partial_path(target))
                _remove(_old_path(target))
            for folder in folders:
                partial_path(folder).mkdir()
            yield
            for target in (*folders, *files):
                _sync(partial_path(target))
            for folder in folders:
                _replace_folder(folder)
            for file in files:
                if partial_path(file).exists():
                    partial_path(file).replace(file)
        finally:
            for target in (*folders, *files):
                with contextlib.suppress(OSError):
                    _remove(_old_path(target))
                    _remove(partial_path(target))


@contextlib.contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """`atomic_outputs` of one folder: yields the empty folder that replaces it."""
    with atomic_outputs([target]):
        yield partial_path(target)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """`atomic_outputs` of one file: yields the path that replaces it."""
    with atomic_outputs([], [target]):
        yield partial_path(target)


def clear_partial(*targets: Path) -> None:
    """Remove what a killed process left of `targets`, but not what another process is writing now."""
    for target in targets:
        with contextlib.suppress(UserError), locked(target):
            _remove(partial_path(target))


def _check_replaceable(target: Path, is_folder: bool) -> None:
    if target.is_symlink() or not target.exists():
        return
    if target.is_dir() != is_folder:
        kinds = ("file", "folder") if is_folder else ("folder", "file")
        raise UserError(f"{target} is a {kinds[0]} where a {kinds[1]} is expected: move it away and rerun")
    if target.is_mount():
        raise UserError(f"{target} is a mount point, which cannot be replaced: mount {target.parent} in its place")


def _replace_folder(target: Path) -> None:
    if target.exists() or target.is_symlink():  # moved aside first: a kill during the deletion would leave part of it
        target.rename(_old_path(target))
    partial_path(target).rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(partial: Path) -> None:
    """Write a file, or all files of a folder, to the disk, readable for whom the umask allows.

    Otherwise a power failure could leave the new name without the new bytes. Some libraries (safetensors) write files
    that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in [partial, *partial.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                with contextlib.suppress(PermissionError):  # a file system without permissions
                    os.fchmod(file.fileno(), 0o666 & ~umask)
                os.fsync(file.fileno())


def write_json(target: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline."""
    with atomic_file(target) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line."""
    with atomic_file(target) as partial, partial.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


SUMS = "SHA256SUMS"


def write_sums(folder: Path, sums: Path | None = None) -> dict[str, str]:
    """Write the sha256 of every file below `folder` to `sums` (None: `folder`/SHA256SUMS) and return them by path.

    In the format of `sha256sum -c`, run in `folder`.
    """
    sums = sums or folder / SUMS
    files = [path for path in folder.rglob("*") if path.is_file() and path != sums]
    made = _digests(folder, sorted(str(path.relative_to(folder)) for path in files))
    with atomic_file(sums) as partial:
        partial.write_text("".join(f"{digest}  {name}\n" for name, digest in made.items()), "utf-8")
    return made


def read_sums(sums: Path, stage: str) -> dict[str, str]:
    """The checksums that `write_sums` wrote in `stage`, by path. Raises UserError for a missing or damaged file."""
    try:
        lines = sums.read_text("utf-8").splitlines()
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (FileNotFoundError, ValueError):
        raise UserError(f"{sums} is missing or damaged: run `dvc repro -f {stage}`") from None


def check_sums(
    folder: Path,
    stage: str,
    names: Iterable[str] | None = None,
    without: tuple[str, ...] = (),
    sums: Path | None = None,
) -> None:
    """Compare files below `folder` (`names`; None: all) with the checksums that `write_sums` wrote in `stage`.

    Files whose names end in one of `without` are not read. Each stage checks what it reads: sha256 takes 0.5 to 3 s per
    GiB and core (files are read in parallel), so only the three stages that read a model's weights check them.
    Raises UserError naming the first file that is missing, damaged or not listed.
    """
    fix = f"run `dvc repro -f {stage}`"
    sums = sums or folder / SUMS
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: run `dvc repro {stage}`")
    listed = read_sums(sums, stage)
    names = [name for name in (listed if names is None else names) if not name.endswith(without)]
    for name in names:
        if name not in listed or not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {fix}")
    for name, digest in _digests(folder, names).items():
        if digest != listed[name]:
            raise UserError(f"{folder / name} is damaged, its sha256 is not that of {sums}: {fix}")


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing releases the GIL
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))
