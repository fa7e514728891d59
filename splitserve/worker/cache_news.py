"""What routers are told of the engine's prefix cache. State of the worker's event loop.

Engines say of every prompt what they found cached, too, so that whoever listens since lately hears of that. Most of it
the routers know: what was told is left out, for as long as `AGAIN_S`, after which it is told again to those that have
forgotten it, or were not there.
"""

import time
from collections.abc import Callable, Iterable, Iterator

from splitserve.core.cached import CacheEvent, CacheNews, Cleared, Removed, Stored

AGAIN_S = 30.0


class CacheReporter:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: set[int] = set()  # hashes of cached blocks
        self._told_since = clock()
        self._number = 0

    def news(self, events: Iterable[CacheEvent]) -> CacheNews | None:
        """The next batch; None if there is nothing in it."""
        if self._clock() - self._told_since >= AGAIN_S:
            self.tell_again()
        left = tuple(self._new(events))
        if not left:
            return None
        self._number += 1
        return CacheNews(self._number - 1, left)

    def tell_again(self) -> None:
        """Some router does not know what was told."""
        self._told.clear()
        self._told_since = self._clock()

    def _new(self, events: Iterable[CacheEvent]) -> Iterator[CacheEvent]:
        for event in events:
            if isinstance(event, Stored):
                left = self._untold(event)
                if left is None:
                    continue
                self._told.update(event.hashes)
                yield left
            else:
                if isinstance(event, Removed):
                    self._told.difference_update(event.hashes)
                elif isinstance(event, Cleared):
                    self._told.clear()
                yield event

    def _untold(self, event: Stored) -> Stored | None:
        first = next((at for at, block in enumerate(event.hashes) if block not in self._told), None)
        if not first:
            return event if first == 0 else None
        tokens = event.tokens[first * event.block_size :]
        return Stored(event.hashes[first:], event.hashes[first - 1], tokens, event.block_size, event.extras[first:])
