"""Where both sides of the transfer service put what they decided: results for the engine, events, counts.

Filled by the transfer thread; `take` and `waiting` are called by engine threads, hence the lock. Decides nothing.
"""

import threading
from collections.abc import Callable

from splitserve.core.worker import TransferStats
from splitserve.kv.messages import Message
from splitserve.kv.ticket import Counters, OnEvent, Results, TransferEnded, TransferKey

Send = Callable[[str, Message], None]  # to a worker uuid; never blocks


class Outlet:
    """One per service."""

    def __init__(self, send: Send, on_event: OnEvent, counters: Counters) -> None:
        self.send = send
        self.counters = counters
        self._on_event = on_event
        self._lock = threading.Lock()
        self._results = Results()

    def received(self, key: TransferKey) -> None:
        with self._lock:
            self._results.received.append(key)

    def failed(self, key: TransferKey) -> None:
        with self._lock:
            self._results.failed.append(key)

    def released(self, key: TransferKey) -> None:
        with self._lock:
            self._results.released.append(key)

    def sent(self, key: TransferKey) -> None:
        with self._lock:
            self._results.sent.append(key)

    def dropped(self, kind: str) -> None:
        """A message or call that fits no state."""
        self.counters.dropped[kind] += 1

    def ended(self, key: TransferKey, source_side: bool, stats: TransferStats, reason: str, error: str) -> None:
        """The transfer is over on this side; `reason` is what to count a failure under, empty on success."""
        if reason:
            self.counters.failures[reason] += 1
        self._on_event(TransferEnded(key, source_side, stats, reason, error))

    def take(self) -> Results:
        with self._lock:
            taken, self._results = self._results, Results()
        return taken

    @property
    def waiting(self) -> bool:
        return bool(self._results)
