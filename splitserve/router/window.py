"""What was counted in the last five minutes, in slots of time.

Counted on the router's event loop, read by the thread that serves metrics too: a reading may miss what is just being
counted.
"""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

WINDOW_S = 300.0
_SLOT_S = 10.0

CountsT = TypeVar("CountsT")


class Window(Generic[CountsT]):
    """`counts` makes an empty slot's."""

    def __init__(self, counts: Callable[[], CountsT], clock: Callable[[], float]) -> None:
        self._counts = counts
        self._clock = clock
        self._began = clock()
        self._slots: deque[tuple[float, CountsT]] = deque([(self._began, counts())])

    def now(self) -> CountsT:
        """What to count in."""
        now = self._clock()
        if now - self._slots[-1][0] >= _SLOT_S:
            self._slots.append((now, self._counts()))
            while self._slots[0][0] < now - WINDOW_S:
                self._slots.popleft()
        return self._slots[-1][1]

    def recent(self) -> tuple[list[CountsT], float]:
        """Each slot's counts, and the seconds that they are of."""
        now = self._clock()
        slots = [counts for began, counts in tuple(self._slots) if began >= now - WINDOW_S]
        return slots, max(_SLOT_S, min(WINDOW_S, now - self._began))
