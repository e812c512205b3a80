"""Errors a user can cause, and how a script ends on one: a single line, exit code 1, no traceback."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and the mend."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))  # it may quote a key or a library with line breaks


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; end on one line (exit 1) for what a user can cause, on a traceback for a bug."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")


def explain(error: BaseException) -> str | None:
    """The line that tells the user about an error that a user can mend; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return "no memory left: stop other programs, or take a smaller model or data.seq_len"
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk (writing {error.filename or 'an output'}): free some and rerun"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot open {error.filename} ({error.strerror}): mend its permissions and rerun"
    if error.errno in (errno.EISDIR, errno.ENOTDIR):
        return f"{error.filename} stands where the other of file and folder is wanted: move it away and rerun"
    if error.errno == errno.EIO:
        return f"the disk fails (at {error.filename or 'a file'}): look at dmesg"
    return None
