"""What the transfer service needs of whatever moves bytes: one-sided WRITEs into a peer's registered memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from splitserve.kv.layout import Slice

Fence = Callable[[], bool]  # has the device done what was launched before?


@dataclass(frozen=True, slots=True)
class Region:
    """One layer's KV blocks in one rank's memory: block i is `block_bytes` bytes at `base + i * stride`."""

    base: int
    stride: int
    block_bytes: int
    blocks: int


class WriteState(Enum):
    IN_FLIGHT = "in flight"
    DONE = "done"
    FAILED = "failed"


class Transport(Protocol):
    """Used by one thread only, the transfer service's. `address` goes to peers in Hello; `connect` takes theirs."""

    @property
    def address(self) -> bytes:
        """What a peer needs to write into the memory registered here."""

    def connect(self, peer: str, address: bytes, cut: Slice) -> None:
        """Prepares WRITEs of this slice to this peer (a rank's uuid); again for the same peer is harmless. Raises
        TransportError."""

    def disconnect(self, peer: str) -> None:
        """Forgets a peer that has ended: WRITEs to it fail, and nothing that it wrote arrives after this."""

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        """Starts copying local cells `source[i]` into the peer's cells `destination[i]`; returns a handle. `layer`
        counts within the slice; cell c of block b is number b * cells + c. Raises TransportError."""

    def poll(self, handle: object) -> WriteState:
        """State of a WRITE. Once it is not IN_FLIGHT the handle is released and must not be polled again. DONE means
        that the bytes are visible to the peer."""

    def progress(self) -> None:
        """Lets the transport move bytes that peers are writing here (needed by some UCX transports)."""

    def land(self, blocks: Sequence[Sequence[int]]) -> Fence | None:
        """Peers have written these blocks, `blocks[l]` of this rank's layer l. None if they are where the engine reads
        them; else they are on their way there until the fence is passed. Raises TransportError."""

    def close(self) -> None: ...


class TransportError(Exception):
    """The transport can't reach a peer or refused a WRITE."""
