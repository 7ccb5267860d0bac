"""Errors that are the user's to mend, and how a command reports them."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """Something the user can put right. Its message is one sentence that says what to do."""


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a command's `main(argv)` and exits: with what it returns, or on a `UserError` with
    its sentence and code 2. On several ranks, which all meet the same error, rank 0 speaks."""
    try:
        code = main(sys.argv[1:]) or 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        code = USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
