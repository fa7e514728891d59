"""How late an event loop is: what comes while it computes is seen, and timed, only afterwards.

The loop's lag is sampled at moments fixed in advance, 100 a second. Of a stall that spans many of them each counts,
with what was left of it: so the samples are what something that comes at any moment waits. One event loop's.
"""

import asyncio
import time
from array import array
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np

_EVERY_S = 0.01


def now_of(loop: asyncio.AbstractEventLoop) -> Callable[[], float]:
    """The loop's time, in seconds, as exactly as can be read: uvloop's own is of whole milliseconds."""
    return time.monotonic if type(loop).__module__.partition(".")[0] == "uvloop" else loop.time


class LoopLag:
    """Samples while it is open: `with LoopLag(loop) as lag: ...`, then `lag.p99_s`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._now = loop, now_of(loop)
        self._lags_s = array("d")

    def __enter__(self) -> Self:
        self._due = self._now() + _EVERY_S
        self._timer = self._loop.call_later(_EVERY_S, self._sample)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._note(self._now())

    @property
    def p99_s(self) -> float:
        """At 99% of all moments the loop was less late than that; 0 before the first sample."""
        return float(np.quantile(np.array(self._lags_s), 0.99)) if self._lags_s else 0.0

    def _sample(self) -> None:
        now = self._now()
        self._note(now)
        self._timer = self._loop.call_later(self._due - now, self._sample)

    def _note(self, now: float) -> None:
        """A timer may fire a little early, by what it is rounded to."""
        while self._due <= now + _ROUNDING_S:
            self._lags_s.append(max(0.0, now - self._due))
            self._due += _EVERY_S


_ROUNDING_S = 0.001
