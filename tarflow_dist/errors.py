"""Errors that are the user's to mend, and how a command reports them."""

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # a shell's 128 + SIGINT
SECONDS_FOR_RANK_0 = 5.0
# what the machine refuses for reasons that are the user's to mend, wherever it is met
REFUSED_BY_MACHINE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


class UserError(ValueError):
    """Something the user can put right. Its message is one sentence that says what to do."""


def refusal(error: BaseException) -> str | None:
    """What an error that is the user's to mend says; None for others."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in REFUSED_BY_MACHINE:
        return f"{error.filename or 'writing'}: {error.strerror}"
    return None


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Raises `UserError` if the device's memory is too small for the body: `what` names that, in
    the plural, and `advice` says what to do."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{what} don't fit into the device's memory: {advice}") from error


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a command's `main(argv)` and exits: with what it returns, or with code 2 and a sentence
    on a `UserError`, a full disk or a missing permission. Output that nobody reads is dropped, and
    a rank ends with its torchrun."""
    _keep_streams_open()
    end_with_torchrun()
    try:
        code = main(sys.argv[1:]) or 0
    except (UserError, OSError) as error:
        if (sentence := refusal(error)) is None:
            raise
        code = _report(sentence)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED_EXIT_CODE
    sys.exit(code)


class _Unbreakable(io.FileIO):
    """A standard stream's file, which drops what it can't take: its reader is gone, or its disk is
    full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # for good; processes it started, too
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), self.fileno())
            return len(data)


def _keep_streams_open() -> None:
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: or the next file that is opened would get the stream's number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = io.BufferedWriter(_Unbreakable(descriptor, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(file, errors="backslashreplace", line_buffering=True))


def end_with_torchrun() -> None:
    """Under torchrun, ends this process as SIGTERM does (training saves first) once torchrun is
    gone: killed, it can't end its ranks itself. Elsewhere nothing happens."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    threading.Thread(target=_terminate_after, args=(os.getppid(),), daemon=True).start()


def _terminate_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _report(sentence: str) -> int:
    """Prints `sentence` once. Mostly all ranks meet the same error: rank 0 speaks and leaves, upon
    which torchrun and srun end the others; another rank speaks if it is still there by then."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    print(
        f"error: {sentence}" if rank == "0" else f"error on rank {rank}: {sentence}",
        file=sys.stderr,
    )
    return USER_ERROR_EXIT_CODE
