"""What a process says of itself to whoever supervises it: whether it lives, and whether it is of use now.

A check returns a sentence that says why not, or nothing. It is called on any thread, and while the process is starting
too; what it looks at is read, never changed.
"""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

Check = Callable[[], str]

PULSE_S = 5.0  # a loop that carries out nothing for so long serves nobody; a busy GIL stays below


def _lives() -> str:
    return ""


def _starts() -> str:
    return "it is starting"


@dataclass(slots=True)
class Probes:
    """Set by what the process is made of, as it comes about."""

    live: Check = _lives
    ready: Check = _starts


def loop_fault(loop: asyncio.AbstractEventLoop, within_s: float = PULSE_S) -> str:
    """Whether an event loop of another thread turns. Waits until it does."""
    turned = threading.Event()
    try:
        loop.call_soon_threadsafe(turned.set)
    except RuntimeError:
        return "its event loop is closed"
    return "" if turned.wait(within_s) else f"its event loop has not turned for {within_s:g} s"
