"""Errors that a user can fix, and how a script ends on one, or on a signal: a single line, no traceback."""

import contextlib
import errno
import io
import os
import re
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


class UserError(Exception):
    """An error the user can fix. The message is one line: what is wrong and how to fix it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # it may quote a key or a library with line breaks


class Stopped(BaseException):
    """SIGTERM or SIGHUP, as an exception, so that what is half written is removed on the way out."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. Errors that a user can fix end it with one line (exit code 1), bugs with a traceback.

    Ctrl-C, SIGTERM and SIGHUP end it with 128 plus their number, after cleaning up; a second one at once. A script
    whose output nobody reads any more (`make report | head -1`) ends as if by SIGPIPE, without a line.
    """
    print_anything()
    received: list[int] = []
    try:
        with _signals_as_exceptions(received):
            main()
            sys.stdout.flush()
    except (KeyboardInterrupt, Stopped):
        _exit_by(received or [signal.SIGINT])
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer must go somewhere
            sys.exit(128 + signal.SIGPIPE)
        line = explain(error)
        if line is None and received:  # a library has made an error of its own of it
            _exit_by(received)
        if line is None:
            raise
        sys.exit(f"error: {line}")


def print_anything() -> None:
    """Let this process print text that its terminal cannot show, e.g. … with an ASCII locale, as backslash escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _exit_by(received: list[int]) -> NoReturn:
    number = signal.Signals(received[0])
    if number is not signal.SIGINT:  # who has pressed Ctrl-C knows
        print(f"error: stopped by {number.name}: rerun to continue", file=sys.stderr)
    sys.exit(128 + number)


_handled: dict[int, Any] = {}  # signals that raise an exception now, with what they did before


@contextlib.contextmanager
def _signals_as_exceptions(received: list[int]) -> Iterator[None]:
    """Raise KeyboardInterrupt or Stopped on a signal that ends a process, unless the caller ignores it (nohup).

    received: gets the number. The next one ends the process at once, as it does a child.
    """

    def stop(number: int, _: Any) -> NoReturn:
        _default_signals()
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before: Any = signal.getsignal(number)
        if before in (signal.SIG_DFL, signal.default_int_handler):
            _handled[number] = before
            signal.signal(number, stop)
    try:
        yield
    finally:
        if not received:
            for handled, before in _handled.items():
                signal.signal(handled, before)
        _handled.clear()


def _default_signals() -> None:
    for number in _handled:
        signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_default_signals)


def _nobody_reads_stdout() -> bool:
    watched = select.poll()
    watched.register(1, 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def explain(error: BaseException) -> str | None:
    """The line that explains an error that a user can fix; None for a bug.

    An error of the operating system that names a file is one of the machine; libraries report some without a number.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
        return "out of memory: close other programs, raise ulimit -v, or use a smaller model or data.seq_len"
    if not (isinstance(error, OSError) and error.errno) and re.search(NO_SPACE, str(error)):
        return "no space left on the disk, or for a file within ulimit -f (writing an output): free some and rerun"
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of copytree: (source, target, reason) …
        source, target, reason = error.args[0][0]
        return f"cannot copy {source} to {known_name(target)} ({reason}): free space or fix permissions, and rerun"
    if not isinstance(error, OSError) or error.errno is None:
        return None
    filename = error.filename if error.filename2 is None else error.filename2  # the target of a copy or a rename
    name = known_name(filename) if filename is not None else None
    if error.errno in LINES:
        return LINES[error.errno].format(name=name or "a file", strerror=error.strerror)
    return f"{name}: {error.strerror}: check the file and its file system, and rerun" if name else None


def known_name(path: Any) -> str:
    """A path as the user knows it: that of the output, for its temporary name or its lock (trnlora/files.py)."""
    text = os.fsdecode(path) if isinstance(path, bytes) else str(path)
    return re.sub(r"(?<![^/])\.([^/]+?)(?:\.old)?\.(?:partial|lock)(?![^/])", r"\1", text)


NO_SPACE_LINE = "no space left on the disk (writing {name}): free some and rerun"
# What libraries say in errors of their own: safetensors, numpy, torch.save twice.
NO_SPACE = (
    r"No space left on device|\d+ requested and \d+ written|PytorchStreamWriter failed writing file|"
    r"inline_container\.cc:\d+\] \. unexpected pos"
)
# torch's CPU allocator; the loader of shared libraries; threading
OUT_OF_MEMORY = r"can't allocate memory|failed to map segment from shared object|can't start new thread"
_PERMISSIONS = "cannot open {name} ({strerror}): fix its permissions and rerun"
_KIND = "{name} is a directory where a file is expected, or the reverse: move it away and rerun"
_BUSY = "{name} is in use ({strerror}): stop the program that uses it and rerun"
_FILES = "too many open files ({strerror}): raise the limit, e.g. `ulimit -n 65536`, and rerun"
LINES = {
    errno.ENOSPC: NO_SPACE_LINE,
    errno.EDQUOT: NO_SPACE_LINE,
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: _PERMISSIONS,
    errno.EISDIR: _KIND,
    errno.ENOTDIR: _KIND,
    errno.EEXIST: _KIND,
    errno.EIO: "I/O error on {name}: the disk may be failing, see dmesg",
    errno.EFBIG: "{name} is larger than ulimit -f or its file system allows: raise the limit, or use another disk",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EBUSY: _BUSY,
    errno.ETXTBSY: _BUSY,
    errno.ELOOP: "{name} is a link that leads back to itself: replace it and rerun",
    errno.ENAMETOOLONG: "the name {name} is too long for its file system: use a shorter one",
    errno.ESTALE: "{name} was removed or replaced on its file server ({strerror}): mount it again and rerun",
    errno.ENOLCK: "cannot lock {name} ({strerror}): its file system has no file locks; put the project on a local disk",
    errno.ENOMEM: "out of memory ({strerror}): close other programs, or use a smaller model or data.seq_len",
}
