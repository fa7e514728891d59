"""What every process that `splitserve up` starts does beside its work: say when it is ready, and end with its parent.

Runs in the child. The parent's side is `supervisor.py`.
"""

import asyncio
import json
import os
import signal
from collections.abc import Mapping

from splitserve.core.parent import end_with_parent

__all__ = ["end_with_parent", "say_ready", "stop_signals"]


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
