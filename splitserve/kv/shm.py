"""KV transport over memory that processes of one machine share: real one-sided WRITEs without torch or NIXL.

Used by the simulated engine and by tests. Each worker owns one memfd (a temporary file where there is none) holding its
blocks behind a header page; a peer maps it through /proc and copies into it, so a WRITE is done when `write` returns.
The owner may read and write its own blocks from any thread; everything else belongs to the transfer thread.
"""

import mmap
import os
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from splitserve.kv.blocks import Blocks, Grid, check_slice
from splitserve.kv.layout import Slice
from splitserve.kv.transport import Fence, TransportError, WriteState

_HEADER_BYTES = mmap.PAGESIZE
_COOKIE_BYTES = 16


class _Address(msgspec.Struct, frozen=True, array_like=True):
    path: str
    cookie: bytes
    layers: int
    blocks: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class _Peer:
    memory: Blocks
    cut: Slice


class ShmTransport:
    """A `Transport`; also hands out its own memory by (layer, block)."""

    def __init__(self, layers: int, blocks: int, block_bytes: int) -> None:
        cookie = secrets.token_bytes(_COOKIE_BYTES)
        grid = Grid(layers, blocks, block_bytes)
        size = _HEADER_BYTES + grid.total_bytes
        self._fd, self._file = _make_file(size)
        self._own = Blocks(_map(self._fd, size), grid, _HEADER_BYTES)
        self._own.view[:_COOKIE_BYTES] = cookie
        path = self._file or f"/proc/{os.getpid()}/fd/{self._fd}"
        self._address = msgspec.msgpack.encode(_Address(path, cookie, layers, blocks, block_bytes))
        self._peers: dict[str, _Peer] = {}

    def block(self, layer: int, block: int) -> memoryview:
        """One block of this worker's own memory, to fill or to check."""
        return self._own.block(layer, block)

    @property
    def address(self) -> bytes:
        return self._address

    def connect(self, peer: str, address: bytes, cut: Slice) -> None:
        if peer not in self._peers:
            memory = _open(_decode(address))
            check_slice(cut, self._own.grid, memory.grid)
            self._peers[peer] = _Peer(memory, cut)

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"worker {peer} is not connected")
        cut, here, there = known.cut, self._own, known.memory
        for ours, theirs in zip(source, destination, strict=True):
            read = here.grid.runs(cut, cut.source, layer, ours)
            written = there.grid.runs(cut, cut.destination, layer, theirs)
            for begin, end in zip(read, written, strict=True):
                there.at(end)[:] = here.at(begin)
        return WriteState.DONE

    def poll(self, handle: object) -> WriteState:
        assert isinstance(handle, WriteState)
        return handle

    def progress(self) -> None:
        """Nothing to do: peers' bytes arrive without our help."""

    def land(self, blocks: Sequence[Sequence[int]]) -> Fence | None:
        """Peers write where the owner reads."""
        return None

    def close(self) -> None:
        """Unlinks the memory. It stays mapped until the last view of it is gone, here and at peers."""
        self._peers.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._file:
            Path(self._file).unlink(missing_ok=True)
            self._file = ""


def _make_file(size: int) -> tuple[int, str]:
    """A file descriptor, and the path to unlink when it is a real file."""
    if hasattr(os, "memfd_create"):
        fd, path = os.memfd_create("splitserve-kv", os.MFD_CLOEXEC), ""
    else:
        fd, path = tempfile.mkstemp(prefix="splitserve-kv-")
    os.ftruncate(fd, size)
    return fd, path


def _map(fd: int, size: int) -> memoryview:
    return memoryview(mmap.mmap(fd, size))


def _decode(address: bytes) -> _Address:
    try:
        return msgspec.msgpack.decode(address, type=_Address)
    except msgspec.DecodeError as error:
        raise TransportError("the peer's address is not of a shared-memory transport") from error


def _open(peer: _Address) -> Blocks:
    """Maps a peer's memory. The cookie proves that the path still leads to that peer."""
    grid = Grid(peer.layers, peer.blocks, peer.block_bytes)
    size = _HEADER_BYTES + grid.total_bytes
    try:
        fd = os.open(peer.path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TransportError(f"can't open the peer's memory: {error.strerror}; is it on this machine?") from error
    try:
        if os.fstat(fd).st_size < size:
            raise TransportError("the peer's memory is smaller than it says")
        view = _map(fd, size)
    finally:
        os.close(fd)
    if view[:_COOKIE_BYTES] != peer.cookie:
        raise TransportError("the peer's memory belongs to another process now")
    return Blocks(view, grid, _HEADER_BYTES)
