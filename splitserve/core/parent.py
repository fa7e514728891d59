"""A process that is of no use without the one that started it."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

ENGINE_CORE, RANK = "EngineCore", "VllmWorker"  # what vLLM calls its processes

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


def end_with_starter(*names: str) -> None:
    """The same, in a process that `multiprocessing` has started by a name that begins with one of these; nothing in any
    other. On Linux it is the thread that started it whose end counts."""
    starter = multiprocessing.parent_process()
    if starter is not None and starter.pid is not None and multiprocessing.current_process().name.startswith(names):
        end_with_parent(starter.pid)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)
