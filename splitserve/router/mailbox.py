"""What one attempt of a request hears from its workers: deltas in order, and the loss of a worker that has a job of it.

Filled by `membership` and emptied by the one journey that waits, both on the router's event loop.
"""

import asyncio
from dataclasses import dataclass

from splitserve.core.worker import Delta


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker that had this job is gone."""

    job_id: str
    reason: str


Event = Delta | Lost


class Mailbox:
    def __init__(self) -> None:
        self._events: list[Event] = []
        self._filled = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._filled.set()

    async def take(self) -> list[Event]:
        """Waits for an event, returns all there are: whatever came while the last ones were sent goes out together."""
        await self._filled.wait()
        self._filled.clear()
        events, self._events = self._events, []
        return events
