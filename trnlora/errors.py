"""Errors that a user can fix, and how a script ends on one: a single line, exit code 1, no traceback."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(Exception):
    """An error the user can fix. The message is one line: what is wrong and how to fix it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # it may quote a key or a library with line breaks


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`. Errors that a user can fix end it with one line (exit code 1), bugs with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack the characters of an answer, or an arrow
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads what is written to it any more, as after `| head`."""
    try:
        stream.flush()
    except BrokenPipeError:
        return True
    return False


def explain(error: BaseException) -> str | None:
    """The line that explains an error that a user can fix; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory: close other programs, or use a smaller model or data.seq_len"
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk (writing {error.filename or 'an output'}): free some and rerun"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot open {error.filename} ({error.strerror}): fix its permissions and rerun"
    if error.errno == errno.ENAMETOOLONG:
        return f"the name {str(error.filename)[:100]}… is too long: choose a shorter one"
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return f"{error.filename} is a directory where a file is expected, or the reverse: move it away and rerun"
    if error.errno == errno.EIO:
        return f"I/O error on {error.filename or 'a file'}: the disk may be failing, see dmesg"
    return None
