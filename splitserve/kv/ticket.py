"""What a transfer is called, what each side says of it, and what an engine is told: plain values.

`transfer.py` re-exports all of it; the modules below it import from here, so that nothing imports in a circle.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from splitserve.core.worker import KvCounts, KvPeer, TransferStats


@dataclass(frozen=True, slots=True, order=True)
class TransferKey:
    transfer_id: str
    epoch: int

    def leg(self, peer: str) -> "LegKey":
        return LegKey(self.transfer_id, self.epoch, peer)

    def __str__(self) -> str:
        return f"{self.transfer_id}/{self.epoch}"


@dataclass(frozen=True, slots=True, order=True)
class LegKey:
    """One rank's share of a transfer with one rank of the other worker, `peer`."""

    transfer_id: str
    epoch: int
    peer: str

    @property
    def transfer(self) -> TransferKey:
        return TransferKey(self.transfer_id, self.epoch)

    def __str__(self) -> str:
        return f"{self.transfer_id}/{self.epoch}"


@dataclass(frozen=True, slots=True)
class Table:
    """Blocks of one group at the destination: `blocks[i]` receives the prompt's block `first_block + i`."""

    first_block: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """Destination: what the source's ranks are asked to write: the KV of the first `tokens` tokens, of which
    `prompt_hash` is the hash, into `tables[g]` for the layers of group g. `deadline_s` is what is left of the request's
    time when the claim is made."""

    key: TransferKey
    source: tuple[KvPeer, ...]
    prompt_hash: bytes
    tokens: int
    tables: tuple[Table, ...]
    deadline_s: float

    @property
    def blocks(self) -> int:
        return sum(len(table.blocks) for table in self.tables)


@dataclass(frozen=True, slots=True)
class Offer:
    """Source: tokens whose KV `destination` may claim, or the beginning of it; no more than will be computed. `blocks`:
    how many outlive their job for it."""

    key: TransferKey
    destination: tuple[KvPeer, ...]
    tokens: Sequence[int]
    blocks: int


@dataclass(slots=True)
class Results:
    """What the engine must be told since the last call.

    received  destination: all KV is there
    failed    destination: it won't come, and nobody will write these blocks any more
    released  destination: an abandoned claim is fenced; its blocks may be freed
    sent      source: nothing reads this prefill's blocks any more, sent or not; they may be freed

    A claim is named exactly once, in one of the first three lists; an offered prefill exactly once in the last. A claim
    that ended while `abandon` was on its way may still be named as received or failed: that fences it just as well.
    """

    received: list[TransferKey] = field(default_factory=list)
    failed: list[TransferKey] = field(default_factory=list)
    released: list[TransferKey] = field(default_factory=list)
    sent: list[TransferKey] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.received or self.failed or self.released or self.sent)


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """Told to `on_event` once per key and side. `reason` is what a failure is counted under, `error` a sentence; both
    are empty on success."""

    key: TransferKey
    source_side: bool
    stats: TransferStats
    reason: str = ""
    error: str = ""


OnEvent = Callable[[TransferEnded], None]


@dataclass(slots=True)
class Counters:
    """What has happened since the service started, for metrics. Changed by the transfer thread only."""

    bytes_written: int = 0
    writes: int = 0
    cancels: int = 0
    leases: int = 0
    expired_leases: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # messages and calls that fit no state, by kind
    failures: Counter[str] = field(default_factory=Counter)  # ended transfers of either side, by reason

    def copy(self) -> "Counters":
        return replace(self, dropped=self.dropped.copy(), failures=self.failures.copy())

    def counts(self) -> KvCounts:
        """For those who sum over ranks; failures they count by transfer, not by rank."""
        return KvCounts(
            self.bytes_written, self.writes, self.cancels, self.leases, self.expired_leases, dict(self.dropped)
        )
