"""Which links moved KV of late, as this router was told: for whoever looks at the fleet. Counted in a `Window`.

What single transfers were like is the workers' metrics' to say.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from splitserve.core.fleet import LinkStatus
from splitserve.core.worker import TransferStats
from splitserve.router.window import Window

MOST_LINKS = 64  # told of one by one


@dataclass(slots=True)
class _Counts:
    transfers: int = 0
    failed: int = 0
    bytes: int = 0
    bytes_before_prefill_ended: int = 0

    def add(self, other: "_Counts") -> None:
        self.transfers += other.transfers
        self.failed += other.failed
        self.bytes += other.bytes
        self.bytes_before_prefill_ended += other.bytes_before_prefill_ended


@dataclass(slots=True)
class _Links:
    """By the names of both workers."""

    of: dict[tuple[str, str], _Counts] = field(default_factory=dict)

    def between(self, source: str, destination: str) -> _Counts:
        return self.of.setdefault((source, destination), _Counts())


class Transfers:
    """The last five minutes of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = Window(_Links, clock)

    def arrived(self, source: str, destination: str, stats: TransferStats) -> None:
        one = _Counts(1, 0, stats.bytes, stats.bytes_before_prefill_ended)
        self._window.now().between(source, destination).add(one)

    def failed(self, source: str, destination: str) -> None:
        self._window.now().between(source, destination).add(_Counts(failed=1))

    def status(self) -> tuple[LinkStatus, ...]:
        """Those that moved most first; beyond `MOST_LINKS` all others as one."""
        slots, _ = self._window.recent()
        together = _Links()
        for slot in slots:
            for (source, destination), counts in slot.of.items():
                together.between(source, destination).add(counts)
        ordered = sorted(together.of.items(), key=lambda each: (-each[1].bytes, -each[1].failed, each[0]))
        others = _Counts()
        for _, counts in ordered[MOST_LINKS:]:
            others.add(counts)
        rest = [_told("", "", others)] if len(ordered) > MOST_LINKS else []
        return (*(_told(*names, counts) for names, counts in ordered[:MOST_LINKS]), *rest)


def _told(source: str, destination: str, counts: _Counts) -> LinkStatus:
    return LinkStatus(
        source, destination, counts.transfers, counts.failed, counts.bytes, counts.bytes_before_prefill_ended
    )
