"""What the connector's halves have said, over all ranks: who listens where, what is held, which transfers are over.

`hear` is called on the bridge's thread, and for ranks of other nodes on that of their channel; the rest by any. What it
passes on it passes on from there, one at a time.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from splitserve.core.errors import ConfigError
from splitserve.core.worker import KvCounts, KvFormat, KvPeer, Pace, TransferEnd
from splitserve.engine.protocol import EngineLoad
from splitserve.kv.bridge import Armed, Ended, Free, FromConnector, Held, Paced, Preempted, Started
from splitserve.kv.source_ticket import merged
from splitserve.kv.transfer import TransferKey

TIMEOUT_S = 60.0

OnEnded = Callable[[TransferKey, TransferEnd, str], None]  # key, what ended, a sentence if it failed
OnArmed = Callable[[str], None]  # job id


class ConnectorState:
    """`on_ended` is called when a transfer's first rank has failed, and when all ranks are done."""

    def __init__(self, ranks: int, on_ended: OnEnded, on_armed: OnArmed) -> None:
        self._ranks = ranks
        self._on_ended = on_ended
        self._on_armed = on_armed
        self._changed = threading.Condition()
        self._started: dict[int, Started] = {}
        self._held: dict[int, Held] = {}
        self._free = Free(-1)
        self._pace = Pace()
        self._preemptions = 0
        self._ends: dict[tuple[TransferKey, bool], list[Ended]] = {}  # until all ranks have said theirs
        self._handed: set[TransferKey] = set()

    def hear(self, message: FromConnector) -> None:
        with self._changed:
            match message:
                case Started():
                    self._started[message.rank] = message
                case Free():
                    self._free = message
                case Preempted():
                    self._preemptions = message.requests
                case Paced():
                    self._pace = message.pace
                case Held():
                    self._held[message.rank] = message
                case Armed():
                    self._on_armed(message.job_id)
                case Ended():
                    self._ended(message)
            self._changed.notify_all()

    def wait_for_ranks(self) -> tuple[KvFormat, tuple[KvPeer, ...]]:
        """The format, and every rank's control channel. Raises ConfigError."""
        self._wait(lambda: len(self._started) == self._ranks, "register its memory on every rank")
        started = [self._started[rank] for rank in range(self._ranks)]
        return started[0].format, tuple(each.peer for each in started)

    def wait_until_free(self, blocks: int) -> None:
        """Raises ConfigError."""
        self._wait(lambda: self._free.blocks == blocks, "free its warm-up's blocks")

    def handed_over(self, key: TransferKey) -> None:
        """A job's KV outlives it under this key: it counts as pinned before the ranks have said so."""
        with self._changed:
            self._handed.add(key)

    @property
    def load(self) -> EngineLoad:
        held: Sequence[Held] = tuple(self._held.values())
        pinned = max((each.pinned_blocks for each in held), default=0)
        quarantined = max((each.quarantined_blocks for each in held), default=0)
        return EngineLoad(
            max(0, self._free.blocks),
            max(pinned, len(self._handed)),
            quarantined,
            sum(each.in_flight_bytes for each in held),
            _summed([each.counts for each in held]),
            self._pace,
            self._preemptions,
        )

    def _wait(self, holds: Callable[[], bool], what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(holds, TIMEOUT_S):
                sentence = f"vLLM started, but its KV connector did not {what} within {TIMEOUT_S:.0f} s"
                raise ConfigError("kv_transfer", sentence)

    def _ended(self, message: Ended) -> None:
        key, side = TransferKey(message.transfer_id, message.epoch), message.source_side
        ends = self._ends.setdefault((key, side), [])
        ends.append(message)
        failed = [end.error for end in ends if end.error]
        whole = len(ends) == self._ranks
        if whole:
            del self._ends[key, side]
            if side:
                self._handed.discard(key)
        if (whole and not failed) or (message.error and len(failed) == 1):
            end = TransferEnd(side, merged([each.stats for each in ends]), message.reason)
            self._on_ended(key, end, message.error)


def _summed(counts: Sequence[KvCounts]) -> KvCounts:
    """Over the ranks."""
    dropped: Counter[str] = Counter()
    for each in counts:
        dropped.update(each.dropped)
    return KvCounts(
        sum(each.written_bytes for each in counts),
        sum(each.writes for each in counts),
        sum(each.cancels for each in counts),
        sum(each.leases for each in counts),
        sum(each.expired_leases for each in counts),
        dict(dropped),
    )
