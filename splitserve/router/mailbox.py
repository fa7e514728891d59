"""What one attempt of a request hears: its workers' deltas in order, the loss of a worker that has a job of it, and the
order to move.

Filled by `membership` and `journey`, emptied by the one journey that waits, both on the router's event loop.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

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


Event = Delta | Lost | Order


class Mailbox:
    def __init__(self) -> None:
        self._events: list[Event] = []
        self._filled = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._filled.set()

    def put_back(self, events: Iterable[Event]) -> None:
        """Taken, but not looked at."""
        self._events[:0] = events

    def left(self) -> list[Event]:
        """What nobody has taken, or was put back."""
        events, self._events = self._events, []
        return events

    async def take(self) -> list[Event]:
        """Waits for an event, returns all there are: whatever came while the last ones were sent goes out together."""
        await self._filled.wait()
        self._filled.clear()
        events, self._events = self._events, []
        return events
