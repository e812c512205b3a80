"""Where an adapter's files come from: a folder, the hub, or a bundle.

A bundle is one archive that holds an adapter with its card, metrics and params, checked when it is opened.
It is a tar file, compressed with gzip. The same run gives the same bytes: members are sorted and have neither times nor
owners. SHA256SUMS in it has the digest of every other member. A bundle may come from anyone, so that only the names
that `make bundle` writes are unpacked.
"""

import gzip
import io
import re
import tarfile
import zlib
from pathlib import Path

from trnlora.errors import UserError
from trnlora.files import SUMS, atomic_dir, atomic_file, check_sums, read_sums, sha256, write_sums
from trnlora.sources import hub_snapshot, parse_source
from trnlora.weights.peft_folder import CONFIG, RECORD, WEIGHTS

SUFFIX = ".tar.gz"
OPENED = Path(".scratch/bundles")  # each in a folder with the digest of its archive
ADAPTER_FILES = (CONFIG, WEIGHTS, RECORD)
CARD, PARAMS = "README.md", "params.yaml"
MEMBER = re.compile("|".join([*map(re.escape, (*ADAPTER_FILES, CARD, PARAMS, SUMS)), r"metrics/\w[\w-]*\.json"]))
MAX_FILES = 100
MAX_RATIO = 100  # of the unpacked size to that of the archive; trained weights shrink by a tenth


def write_bundle(folder: Path, archive: Path) -> None:
    """Write all files below `folder` to `archive`, with their digests, which are left in `folder` too."""
    write_sums(folder)
    with (
        atomic_file(archive) as partial,
        partial.open("wb") as out,
        gzip.GzipFile("", "wb", 6, out, mtime=0) as packed,  # no time and no file name in gzip's header
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(member, file)


def open_bundle(archive: Path) -> Path:
    """The folder of a bundle's files, which is a PEFT folder with more in it. Unpacks it if that was not done before.

    Raises UserError for anything but a whole bundle. Nothing of another archive is left anywhere.
    """
    folder = OPENED / sha256(archive)
    if not folder.is_dir() or _problem(folder):
        with atomic_dir(folder) as partial:
            _unpack(archive, partial)
            if problem := _problem(partial):
                raise _refused(archive, problem)
    return folder


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than `left` bytes, whatever a member's header promises."""

    def __init__(self, stream: gzip.GzipFile, left: int) -> None:
        self.stream = stream
        self.left = left

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError("it unpacks to too much")
        return content


def _unpack(archive: Path, folder: Path) -> None:
    found: set[str] = set()
    try:
        with gzip.open(archive) as packed:
            stream = _Limited(packed, MAX_RATIO * archive.stat().st_size + 2**20)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    if not member.isreg() or member.issparse() or not MEMBER.fullmatch(member.name):
                        raise ValueError(f"{member.name!r} in it is not a file of a bundle")
                    if member.name in found or len(found) == MAX_FILES:
                        raise ValueError(f"it has {member.name} twice, or too many files")
                    found.add(member.name)
                    tar.extract(member, folder, set_attrs=False, filter="data")
            while stream.read(2**20):  # to the end, where gzip's checksum is
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        raise _refused(archive, str(error)) from None


def _problem(folder: Path) -> str | None:
    """What is wrong with an unpacked bundle; None if it is whole."""
    if missing := [name for name in (*ADAPTER_FILES, SUMS) if not (folder / name).is_file()]:
        return f"it has no {' and no '.join(missing)}"
    try:
        listed = read_sums(folder / SUMS, "flatten_adapter").keys()
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {SUMS}
        if listed != found:
            return f"{min(listed ^ found)!r} is not in both it and its {SUMS}"
        check_sums(folder, "flatten_adapter")
    except UserError:
        return f"its files are not those of its {SUMS}"
    return None


def _refused(archive: Path, why: str) -> UserError:
    return UserError(f"{archive} is not a whole bundle ({why}): copy it again, or make it again with `make bundle`")


def fetch_adapter(uri: str) -> Path:
    """The folder of an adapter's path:// or hf:// source, downloaded if it is on the hub and not in its cache."""
    source = parse_source(uri)
    if source.scheme == "hf":
        return hub_snapshot(source, list(ADAPTER_FILES))
    return adapter_folder(source.path)


def adapter_folder(path: Path) -> Path:
    """A PEFT folder, or that of the bundle `path`."""
    return open_bundle(path) if path.is_file() else path
