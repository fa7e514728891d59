"""Rings when something is overdue: one timer a long while, however often the time that it is due moves on.

A timer set and cleared for every token costs more than the token. Used on the router's event loop only.
"""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

_SHARE_AGAIN = 0.25  # of the patience, after which an alarm that nobody heeded rings again


class Alarm:
    """`with Alarm(due, ring, patience_s): ...` calls `ring` once `due()`, on the monotonic clock, has passed, and again
    while it stays so; at the latest `patience_s` after a `due()` of inf has become finite."""

    def __init__(self, due: Callable[[], float], ring: Callable[[], None], patience_s: float) -> None:
        self._due = due
        self._ring = ring
        self._patience_s = patience_s
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        left_s = self._due() - time.monotonic()
        if left_s <= 0:
            self._ring()
            left_s = _SHARE_AGAIN * self._patience_s
        self._timer = self._loop.call_later(min(left_s, self._patience_s), self._look)
