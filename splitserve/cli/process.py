"""What every process that `splitserve up` starts does beside its work: say when it is ready, and end with its parent.

Runs in the child. The parent's side is `supervisor.py`.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

_PR_SET_PDEATHSIG = 1
_PARENT_CHECK_S = 1.0


def end_with_parent(parent: int) -> None:
    """This process is killed when `parent` ends, however it ends. The kernel does it on Linux, a thread elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def say_ready(fd: int | None, facts: Mapping[str, object]) -> None:
    """Writes the facts as one JSON line to the parent's pipe, or for a person to stdout."""
    line = json.dumps(facts)
    if fd is None:
        print("ready:", ", ".join(f"{key} {value}" for key, value in facts.items() if value), flush=True)
        return
    with os.fdopen(fd, "w") as pipe:
        pipe.write(line + "\n")


def stop_signals() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once. Call it in the running event loop."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop
