"""What a rank owes the torchrun that started it: to end with it."""

import os
import signal
import threading
import time


def follow() -> None:
    """Under torchrun, ends this process as SIGTERM does (training saves first) once torchrun is
    gone: killed, it can't end its ranks itself. Elsewhere nothing happens."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    threading.Thread(target=_terminate_after, args=(os.getppid(),), daemon=True).start()


def _terminate_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
