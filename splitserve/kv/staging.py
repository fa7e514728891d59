"""KV that travels through host memory, for a device whose memory no transport can register.

A mirror holds a copy of every block in host memory, which is what peers write into and what WRITEs are made of: block
for block, so that whoever owns a block owns its copy too, and the ledger's fences hold for both. At the source a WRITE
is posted once its blocks are copied off the device; at the destination a claim is received once they are copied onto
it. Owned by the transfer thread. Not here: how a device copies (`connector/mirror.py`).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from splitserve.core.config import KvBuffer
from splitserve.core.errors import ConfigError
from splitserve.kv.layout import Slice
from splitserve.kv.transport import Fence, Transport, TransportError, WriteState

_log = logging.getLogger(__name__)


class Mirror(Protocol):
    """A rank's KV blocks on its device and their copies in host memory. Used by one thread."""

    def to_host(self, layer: int, blocks: Sequence[int]) -> Fence:
        """Starts copying blocks of this rank's layer off the device. Raises TransportError."""

    def to_device(self, layer: int, blocks: Sequence[int]) -> Fence:
        """Starts copying them onto it. Copies end in the order in which they were started. Raises TransportError."""

    def close(self) -> None:
        """Waits for copies that were started, and gives the host memory back."""


@dataclass(slots=True, eq=False)
class _Write:
    """`handle` is the real transport's, once its blocks are copied."""

    peer: str
    layer: int
    source: tuple[int, ...]
    destination: tuple[int, ...]
    copied: Fence
    handle: object | None = None


class StagedTransport:
    """A `Transport` in front of one that has registered the mirror's host memory."""

    def __init__(self, transport: Transport, mirror: Mirror) -> None:
        self._transport = transport
        self._mirror = mirror
        self._cuts: dict[str, Slice] = {}

    @property
    def address(self) -> bytes:
        return self._transport.address

    def connect(self, peer: str, address: bytes, cut: Slice) -> None:
        self._transport.connect(peer, address, cut)
        self._cuts.setdefault(peer, cut)

    def disconnect(self, peer: str) -> None:
        """WRITEs whose blocks are still being copied fail when that has ended, not before: their copies' memory is in
        use until then."""
        self._cuts.pop(peer, None)
        self._transport.disconnect(peer)

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        cut = self._cuts.get(peer)
        if cut is None:
            raise TransportError(f"worker {peer} is not connected")
        blocks = sorted({cell // cut.source.cells for cell in source})
        copied = self._mirror.to_host(cut.source.first_layer + layer, blocks)
        write = _Write(peer, layer, tuple(source), tuple(destination), copied)
        if copied():
            self._post(write)
        return write

    def poll(self, handle: object) -> WriteState:
        assert isinstance(handle, _Write)
        if handle.handle is None:
            if not handle.copied():
                return WriteState.IN_FLIGHT
            try:
                self._post(handle)
            except TransportError as error:
                _log.warning("a WRITE to worker %s was refused after its blocks were copied: %s", handle.peer, error)
                return WriteState.FAILED
        return self._transport.poll(handle.handle)

    def progress(self) -> None:
        self._transport.progress()

    def land(self, blocks: Sequence[Sequence[int]]) -> Fence | None:
        fences = [self._mirror.to_device(layer, ids) for layer, ids in enumerate(blocks) if ids]
        return fences[-1] if fences else None

    def close(self) -> None:
        try:
            self._transport.close()
        finally:
            self._mirror.close()

    def _post(self, write: _Write) -> None:
        write.handle = self._transport.write(write.peer, write.layer, write.source, write.destination)


def in_buffer(buffer: KvBuffer, direct: Callable[[], Transport], staged: Callable[[], Transport]) -> Transport:
    """The transport that a setting asks for. `direct` registers the device's memory. Raises ConfigError where it must
    and can't, or where the host has no room for the mirror."""
    if buffer is not KvBuffer.HOST:
        try:
            return direct()
        except TransportError as error:
            if buffer is KvBuffer.DEVICE:
                raise ConfigError(
                    "kv_transfer.buffer",
                    f"is device, whose memory can't be registered: {error}; set it to auto or host, or give NIXL a UCX "
                    "that knows this device",
                ) from error
            _log.warning("KV goes through host memory, for the device's can't be registered: %s", error)
    return _staged(staged)


def _staged(staged: Callable[[], Transport]) -> Transport:
    try:
        return staged()
    except TransportError as error:
        raise ConfigError(
            "kv_transfer.buffer", f"KV can't go through host memory: {error}; it needs as much as the KV cache"
        ) from error
