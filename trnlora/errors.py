"""Errors a user can cause, and how a script ends on one: a single line, exit code 1, no traceback."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and the mend."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; end on one line (exit 1) for what a user can cause, on a traceback for a bug."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.exit(f"error: no space left on the disk (writing {error.filename or 'an output'}): free some and rerun")
        if error.errno in (errno.EACCES, errno.EROFS):
            sys.exit(f"error: cannot write {error.filename}: {error.strerror}; mend its permissions and rerun")
        raise
