"""Virtual time: what happens next, in order of time and then of scheduling. It knows nothing of what it runs."""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """`now` is seconds; an action gets the argument it was scheduled with."""

    __slots__ = ("_heap", "events", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []

    def at(self, time: float, action: Callable[[Any], None], argument: Any) -> None:
        self.events += 1
        heappush(self._heap, (time, self.events, action, argument))

    def run(self, until: float) -> None:
        """Everything up to that time, as long as there is something."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            self.now, _, action, argument = heappop(heap)
            action(argument)
