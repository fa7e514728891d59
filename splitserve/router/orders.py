"""What a router tells one worker, and in which order.

Used on the router's event loop; only `get` awaits. What the orders mean is `membership`'s business, how they look on
the wire `attach`'s.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from splitserve.core.worker import Job, KvPeer, Pool, Ticket


@dataclass(frozen=True, slots=True)
class SendJob:
    number: int
    job: Job


@dataclass(frozen=True, slots=True)
class SendCancel:
    job_id: str


@dataclass(frozen=True, slots=True)
class SendHandOver:
    job_id: str
    ticket: Ticket
    at_end: bool


@dataclass(frozen=True, slots=True)
class SendPeers:
    peers: tuple[KvPeer, ...]


@dataclass(frozen=True, slots=True)
class SendPool:
    pool: Pool


@dataclass(frozen=True, slots=True)
class SendDrain:
    pass


Order = SendJob | SendCancel | SendHandOver | SendPeers | SendPool | SendDrain


class Outbox(asyncio.Queue[Order]):
    """In the order of their coming, but for cancels: a burst of jobs takes a while to be written, and what nobody waits
    for must not be computed meanwhile. A cancel overtakes everything but other cancels and its own job."""

    def _init(self, maxsize: int) -> None:
        self._queue: deque[Order] = deque()
        self._urgent = 0
        self._unsent: set[str] = set()

    def _put(self, item: Order) -> None:
        if isinstance(item, SendCancel) and item.job_id not in self._unsent:
            self._queue.insert(self._urgent, item)
            self._urgent += 1
            return
        if isinstance(item, SendJob):
            self._unsent.add(item.job.job_id)
        self._queue.append(item)

    def _get(self) -> Order:
        item = self._queue.popleft()
        self._urgent = max(0, self._urgent - 1)
        if isinstance(item, SendJob):
            self._unsent.discard(item.job.job_id)
        return item
