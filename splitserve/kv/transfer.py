"""The transfer service of one worker rank: claims, WRITEs and their fences.

One thread (the transfer thread) owns the transport and the ledger; the control channel has a thread of its own. Engine
threads call the methods below, which only enqueue and never block (`drain` excepted).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from splitserve.core.worker import KvPeer, TransferStats


@dataclass(frozen=True, slots=True, order=True)
class TransferKey:
    transfer_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Destination: what the source is asked to write. `blocks[i]` receives the prompt's block `first_block + i`."""

    key: TransferKey
    source: KvPeer
    prompt_hash: bytes
    first_block: int
    blocks: tuple[int, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Offer:
    """Source: a prefill whose KV `destination` may claim."""

    key: TransferKey
    destination: KvPeer
    prompt_hash: bytes
    prompt_blocks: int  # blocks that the whole prompt takes, the last one perhaps partly filled


@dataclass(slots=True)
class Results:
    """What the engine must be told since the last call.

    received  destination: all KV is there
    failed    destination: it won't come, and nobody will write these blocks any more
    released  destination: an abandoned claim is fenced; its blocks may be freed
    sent      source: nothing reads this prefill's blocks any more, sent or not; they may be freed
    """

    received: list[TransferKey] = field(default_factory=list)
    failed: list[TransferKey] = field(default_factory=list)
    released: list[TransferKey] = field(default_factory=list)
    sent: list[TransferKey] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TransferEnded:
    """Told to `on_event` once per key and side. `error` is empty on success."""

    key: TransferKey
    source_side: bool
    stats: TransferStats
    error: str = ""


OnEvent = Callable[[TransferEnded], None]


class TransferService:
    """See the module's docstring. Constructed with the transport, the control channel and their settings."""

    # Source side -----------------------------------------------------------------------------------------------------
    def offer(self, offer: Offer) -> None:
        """A prefill was accepted. Its claim may have come already, or come later within the lease."""

    def computing(self, key: TransferKey, blocks: Sequence[int], cached_blocks: int) -> None:
        """Before a forward: the prefill's absolute block table so far. The first `cached_blocks` are computed in every
        layer already (prefix hits, earlier chunks) and may be written now."""

    def computed(self, layer: int, ready: Sequence[tuple[TransferKey, int]]) -> None:
        """After a layer of the forward: for each prefill the number of its blocks complete in this layer."""

    def prefill_ended(self, key: TransferKey) -> None:
        """The prompt is computed. Blocks stay until `Results.sent` names the key; the lease starts now if unclaimed."""

    def prefill_aborted(self, key: TransferKey) -> None:
        """The prefill won't finish: stop, tell the destination Failed, then name the key in `Results.sent`."""

    def drain(self, keys: Sequence[TransferKey], timeout_s: float = 5.0) -> None:
        """Blocks until no WRITE reads these prefills' blocks (they were preempted; `computing` comes anew)."""

    # Destination side ------------------------------------------------------------------------------------------------
    def claim(self, claim: Claim) -> None:
        """Blocks are allocated: ask the source to write them."""

    def abandon(self, key: TransferKey) -> None:
        """The request ended early. `Results.released` names the key once nobody can write its blocks."""

    # Both ------------------------------------------------------------------------------------------------------------
    def connect(self, peers: Sequence[KvPeer]) -> None:
        """Says Hello to peers so that the first transfer finds a connected pair."""

    def take_results(self) -> Results:
        """What happened since the last call; called by the engine thread on every step."""

    @property
    def busy(self) -> bool:
        """True while any result may still come: the engine must keep stepping."""

    @property
    def quarantined_blocks(self) -> int:
        """Destination blocks of abandoned claims whose source has not answered."""

    @property
    def pinned_blocks(self) -> int:
        """Source blocks of ended prefills that are not sent yet."""

    def close(self) -> None: ...
