"""What one attempt of a request hears: its workers' deltas in order, the loss of a worker that has a job of it, and the
order to move.

Filled by `membership` and `journey`, emptied by the one journey that waits, both on the router's event loop.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from splitserve.core.worker import Delta
from splitserve.router.move import Move


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker that had this job is gone."""

    job_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Order:
    """Not from a worker: the request is to go elsewhere."""

    move: Move
    job_id: str = ""


@dataclass(frozen=True, slots=True)
class Overfull:
    """The client reads so slowly that the jobs were stopped; no delta follows."""

    job_id: str = ""


Event = Delta | Lost | Order | Overfull


class Mailbox:
    """`at_once` may take a delta that comes while none waits, and says whether it has: so most tokens wake nobody.
    `most_tokens`: beyond it `on_overfull` is called, once for each delta."""

    def __init__(
        self,
        most_tokens: float = inf,
        on_overfull: Callable[[], None] = lambda: None,
        at_once: Callable[[Delta], bool] = lambda delta: False,
    ) -> None:
        self._at_once = at_once
        self._most_tokens = most_tokens
        self._on_overfull = on_overfull
        self._events: list[Event] = []
        self._tokens = 0
        self._reader: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        if isinstance(event, Delta):
            if not self._events and self._at_once(event):
                return
            self._tokens += len(event.token_ids)
        self._events.append(event)
        self.ring()
        if self._tokens > self._most_tokens and isinstance(event, Delta):
            self._on_overfull()

    def close(self) -> None:
        """Nobody is told of what still comes. Whoever was has this mailbox: they would hold each other, and all of the
        request, until a rare garbage collection."""
        self._at_once = lambda delta: False
        self._on_overfull = lambda: None

    def put_back(self, events: Iterable[Event]) -> None:
        """Taken, but not looked at."""
        self._events[:0] = events

    def left(self) -> list[Event]:
        """What nobody has taken, or was put back."""
        events, self._events, self._tokens = self._events, [], 0
        return events

    def ring(self) -> None:
        """Whoever waits is to look up, whether or not there is an event."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[Event]:
        """Waits for an event, returns all there are: whatever came while the last ones were sent goes out together.
        None, if it was rung."""
        if not self._events:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self.left()
