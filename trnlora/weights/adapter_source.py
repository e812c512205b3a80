"""Where an adapter's files come from: a folder, the hub, or a bundle.

A bundle is one archive that holds an adapter with its card, metrics and params, checked when it is opened.
It is a tar file, compressed with gzip. The same run gives the same bytes: members are sorted and have neither times nor
owners. SHA256SUMS in it has the digest of every other member.
"""

import gzip
import tarfile
from pathlib import Path, PurePosixPath

from trnlora.errors import UserError
from trnlora.files import SUMS, atomic_dir, atomic_file, check_sums, read_sums, sha256, write_sums
from trnlora.sources import hub_snapshot, parse_source
from trnlora.weights.peft_folder import CONFIG, RECORD, WEIGHTS

SUFFIX = ".tar.gz"
OPENED = Path(".scratch/bundles")  # each in a folder with the digest of its archive
ADAPTER_FILES = (CONFIG, WEIGHTS, RECORD)
MAX_FILES = 100
MAX_BYTES = 64 * 2**30  # rank 512 on every linear layer of a 70B model has 26 GiB in float32


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

    Raises UserError for anything but a whole bundle. Nothing of another archive is written anywhere.
    """
    try:
        folder = OPENED / sha256(archive)
    except OSError as error:
        raise UserError(f"cannot read the bundle {archive} ({error.strerror}): name a file of `make bundle`") from None
    if not folder.is_dir():
        with atomic_dir(folder) as partial:
            _unpack(archive, partial)
            _check(archive, partial)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    total = 0
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for number, member in enumerate(tar):
                name = PurePosixPath(member.name)
                total += member.size
                if not member.isreg() or name.is_absolute() or ".." in name.parts or len(name.parts) > 2:
                    raise _refused(archive, f"{member.name!r} in it is not a plain file of a bundle")
                if number == MAX_FILES or total > MAX_BYTES:
                    raise _refused(archive, "it holds too much")
                tar.extract(member, folder, set_attrs=False, filter="data")
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise _refused(archive, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _check(archive: Path, folder: Path) -> None:
    missing = [name for name in (*ADAPTER_FILES, SUMS) if not (folder / name).is_file()]
    if missing:
        raise _refused(archive, f"it has no {' and no '.join(missing)}")
    listed = read_sums(folder / SUMS, "flatten_adapter").keys()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {SUMS}
    if listed != found:
        raise _refused(archive, f"{min(listed ^ found)} is not in both it and its {SUMS}")
    try:
        check_sums(folder, "flatten_adapter")
    except UserError:
        raise _refused(archive, f"its files are not those of its {SUMS}") from None


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
