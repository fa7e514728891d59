"""KV transport over NIXL and UCX: one-sided WRITEs into a peer's registered KV memory. The one file that imports nixl.

The thread that constructs it owns the agent and makes every call: with NIXL's own progress thread off (it spins and
takes half a core), two threads on one agent lose completions. `transfer` may copy inside the call (CMA), so the owner
is never the forward thread. Not here: which blocks, when, and what a failure means to a ticket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from nixl import _bindings as nixl_errors
from nixl._api import nixl_agent, nixl_agent_config

from splitserve.kv.layout import Cut, Slice
from splitserve.kv.transport import Fence, Region, TransportError, WriteState

_LOCAL = "NIXL_INIT_AGENT"  # what NIXL calls this side's descriptors
_NIXL_ERRORS: tuple[type[Exception], ...] = (
    nixl_errors.nixlBackendError,
    nixl_errors.nixlCancelledError,
    nixl_errors.nixlInvalidParamError,
    nixl_errors.nixlMismatchError,
    nixl_errors.nixlNotAllowedError,
    nixl_errors.nixlNotFoundError,
    nixl_errors.nixlNotPostedError,
    nixl_errors.nixlNotSupportedError,
    nixl_errors.nixlRemoteDisconnectError,
    nixl_errors.nixlRepostActiveError,
    nixl_errors.nixlUnknownError,
)
_START_ERRORS: tuple[type[Exception], ...] = (*_NIXL_ERRORS, RuntimeError, ValueError)
_STATES = {"DONE": WriteState.DONE, "PROC": WriteState.IN_FLIGHT}


class _Address(msgspec.Struct, frozen=True, array_like=True):
    metadata: bytes
    regions: list[Region]
    device: int
    memory: str


@dataclass(slots=True, eq=False)
class _Write:
    handle: Any
    state: WriteState


@dataclass(frozen=True, slots=True)
class _End:
    """One end of a slice: its prepared descriptors, in the order of layer, block, cell and run."""

    descriptors: Any
    blocks: int
    cells: int
    runs: int


@dataclass(slots=True)
class _Peer:
    agent: str
    source: _End
    destination: _End
    in_flight: set[_Write] = field(default_factory=set)


class NixlTransport:
    """A `Transport`. `regions[l]` is layer l; `memory` the (address, bytes) ranges that hold them, each registered once
    (layers may share a storage). `memory_type` is "DRAM" or "VRAM", `device` the GPU's index."""

    def __init__(
        self,
        uuid: str,
        regions: Sequence[Region],
        memory: Sequence[tuple[int, int]],
        memory_type: str = "DRAM",
        device: int = 0,
    ) -> None:
        self._regions = list(regions)
        self._type = memory_type
        self._device = device
        self._peers: dict[str, _Peer] = {}
        self._ends: dict[tuple[int, Cut], _End] = {}  # of this side, shared by peers of alike slices
        self._refused_release: list[Any] = []
        try:
            self._agent = nixl_agent(uuid, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
            ranges = [(address, size, device, "") for address, size in sorted(set(memory))]
            registered = self._agent.get_reg_descs(ranges, mem_type=memory_type)
            self._registered = self._agent.register_memory(registered)
            metadata = self._agent.get_agent_metadata()
        except _START_ERRORS as error:
            raise TransportError(f"NIXL can't register the KV memory: {error}") from error
        self._address = msgspec.msgpack.encode(_Address(metadata, self._regions, device, memory_type))

    @property
    def address(self) -> bytes:
        return self._address

    def connect(self, peer: str, address: bytes, cut: Slice) -> None:
        if peer in self._peers:
            return
        theirs = _decode(address)
        try:
            agent = self._agent.add_remote_agent(theirs.metadata)
            name = agent.decode() if isinstance(agent, bytes) else agent
            self._agent.make_connection(name)
            source = self._local_end(cut)
            destination = self._prepare(name, theirs.regions, cut.layers, cut.destination, theirs.memory, theirs.device)
        except _NIXL_ERRORS as error:
            raise TransportError(f"NIXL can't reach worker {peer}: {error}") from error
        self._peers[peer] = _Peer(name, source, destination)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        for write in known.in_flight:
            self._abort(write)
        try:
            self._agent.release_dlist_handle(known.destination.descriptors)
            self._agent.remove_remote_agent(known.agent)
        except _NIXL_ERRORS as error:
            raise TransportError(f"NIXL can't forget worker {peer}: {error}") from error

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        known = self._peers.get(peer)
        if known is None:
            raise TransportError(f"worker {peer} is not connected")
        local, remote = _indices(known.source, layer, source), _indices(known.destination, layer, destination)
        try:
            handle = self._agent.make_prepped_xfer(
                "WRITE", known.source.descriptors, local, known.destination.descriptors, remote
            )
            state = self._agent.transfer(handle)
        except _NIXL_ERRORS as error:
            raise TransportError(f"NIXL refused a WRITE to worker {peer}: {error}") from error
        write = _Write(handle, _STATES.get(state, WriteState.FAILED))
        if write.state is WriteState.IN_FLIGHT:
            known.in_flight.add(write)
        return write

    def poll(self, handle: object) -> WriteState:
        assert isinstance(handle, _Write)
        if handle.state is WriteState.IN_FLIGHT:
            handle.state = self._state(handle)
        if handle.state is not WriteState.IN_FLIGHT:
            self._release(handle)
        return handle.state

    def progress(self) -> None:
        """Asking for notifications is what makes UCX serve its peers; none is ever sent."""
        try:
            self._agent.get_new_notifs()
        except _NIXL_ERRORS as error:
            raise TransportError(f"NIXL can't make progress: {error}") from error

    def land(self, blocks: Sequence[Sequence[int]]) -> Fence | None:
        """Peers write into the registered memory itself."""
        return None

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        for end in self._ends.values():
            self._agent.release_dlist_handle(end.descriptors)
        self._agent.deregister_memory(self._registered)

    def _state(self, write: _Write) -> WriteState:
        try:
            return _STATES.get(self._agent.check_xfer_state(write.handle), WriteState.FAILED)
        except _NIXL_ERRORS:
            return WriteState.FAILED

    def _abort(self, write: _Write) -> None:
        """The peer is gone. A WRITE that can't be aborted stays in flight and is polled until it ends by itself."""
        try:
            self._agent.release_xfer_handle(write.handle)
            write.state = WriteState.FAILED
        except _NIXL_ERRORS:
            write.state = self._state(write)

    def _release(self, write: _Write) -> None:
        for peer in self._peers.values():
            peer.in_flight.discard(write)
        try:
            self._agent.release_xfer_handle(write.handle)
        except _NIXL_ERRORS:
            # Only an active WRITE can refuse, and NIXL says that this one has ended. Kept so that its finaliser, which
            # would log and try again at some random moment on some random thread, never runs.
            self._refused_release.append(write.handle)

    def _local_end(self, cut: Slice) -> _End:
        key = (cut.layers, cut.source)
        if key not in self._ends:
            self._ends[key] = self._prepare(_LOCAL, self._regions, cut.layers, cut.source, self._type, self._device)
        return self._ends[key]

    def _prepare(
        self, agent: str, regions: Sequence[Region], layers: int, end: Cut, memory_type: str, device: int
    ) -> _End:
        """Raises TransportError if the slice does not lie within these regions."""
        _check(regions, layers, end)
        taken = regions[end.first_layer : end.first_layer + layers]
        rows = np.concatenate([_descriptors(region, end, device) for region in taken])
        descriptors = self._agent.prep_xfer_dlist(agent, rows, mem_type=memory_type)
        return _End(descriptors, taken[0].blocks, end.cells, len(end.runs[0]))


def _check(regions: Sequence[Region], layers: int, end: Cut) -> None:
    last = max(offset + size for runs in end.runs for offset, size in runs)
    taken = regions[end.first_layer : end.first_layer + layers]
    if len(taken) < layers or any(region.block_bytes < last for region in taken):
        raise TransportError(
            f"the slice takes {end.first_layer + layers} layers and {last} bytes of a block; there are {len(regions)} "
            f"layers with blocks of {min(region.block_bytes for region in regions)} bytes"
        )
    if len({region.blocks for region in taken}) != 1:
        raise TransportError("layers with different numbers of blocks can't be moved together")


def _descriptors(region: Region, end: Cut, device: int) -> "np.ndarray[Any, Any]":
    """Rows of (address, bytes, device) for each block, cell and run of one layer."""
    runs = np.array([run for cell in end.runs for run in cell], dtype=np.uint64)
    blocks = np.uint64(region.base) + np.arange(region.blocks, dtype=np.uint64) * np.uint64(region.stride)
    rows = np.empty((region.blocks, len(runs), 3), dtype=np.uint64)
    rows[:, :, 0] = blocks[:, None] + runs[None, :, 0]
    rows[:, :, 1] = runs[None, :, 1]
    rows[:, :, 2] = device
    return rows.reshape(-1, 3)


def _indices(end: _End, layer: int, cells: Sequence[int]) -> "np.ndarray[Any, Any]":
    ids = np.asarray(cells, dtype=np.int64)
    limit = end.blocks * end.cells
    if ids.size and (ids.min() < 0 or ids.max() >= limit):
        worst = ids.max() if ids.max() >= limit else ids.min()
        raise TransportError(
            f"block {worst // end.cells} of layer {layer} is outside the {end.blocks} blocks there are"
        )
    first = (ids + layer * limit) * end.runs
    return (first[:, None] + np.arange(end.runs)).reshape(-1).astype(np.int32)


def _decode(address: bytes) -> _Address:
    try:
        return msgspec.msgpack.decode(address, type=_Address)
    except msgspec.DecodeError as error:
        raise TransportError("the peer's address is not of a NIXL transport") from error
