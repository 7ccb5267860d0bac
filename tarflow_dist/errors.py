"""Errors that are the user's to mend, and how a command reports them."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_EXIT_CODE = 2
# what the machine refuses for reasons that are the user's to mend, wherever it is met
REFUSED_BY_MACHINE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """Something the user can put right. Its message is one sentence that says what to do."""


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a command's `main(argv)` and exits: with what it returns, or with code 2 and a sentence
    on a `UserError`, a full disk or a missing permission. On several ranks, which all meet the same
    error, rank 0 speaks."""
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        code = _report(str(error))
    except OSError as error:
        if error.errno not in REFUSED_BY_MACHINE:
            raise
        code = _report(f"{error.filename or 'writing'}: {error.strerror}")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _report(sentence: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {sentence}", file=sys.stderr)
    return USER_ERROR_EXIT_CODE
