"""Atomic file writes: everything is written under a temporary name, then renamed. Checksums."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trnlora.errors import UserError


def partial_path(target: Path) -> Path:
    """The temporary name of `target`, beside it so that a rename never crosses file systems."""
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`. On success it replaces `target`, on an error it is removed.

    Leftovers of a killed process are removed first. Raises UserError while another process writes the same target,
    which happens when a stage outlives the `dvc` that started it.
    """
    partial = partial_path(target)
    old = target.with_name(f".{target.name}.old.partial")
    lock = _lock_empty_dir(partial)
    try:
        shutil.rmtree(old, ignore_errors=True)
        yield partial
        if target.is_dir():  # moved aside first: a kill during the deletion would leave part of it
            target.rename(old)
        partial.rename(target)
    finally:
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def clear_partial(target: Path) -> None:
    """Remove what a killed process left of `target`, but not what another process is writing now."""
    with contextlib.suppress(UserError):
        lock = _lock_empty_dir(partial_path(target))
        partial_path(target).rmdir()
        os.close(lock)


def _lock_empty_dir(folder: Path) -> int:
    """Create or empty `folder`, and lock it until the process ends. Returns the lock's file descriptor."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"another process is writing {folder}: wait until it is done, or stop it") from None
        if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
            break
        os.close(lock)  # its last owner has just renamed or removed it
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return lock


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`. On success it is renamed to `target`, on an error it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure could leave the new name without the new bytes
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


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
