"""Host-buffer staging over NIXL: the mirror's memory is registered where the device's can't be."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import pytest

from splitserve.core.config import KvBuffer
from splitserve.core.errors import ConfigError
from splitserve.core.worker import KvPart
from splitserve.kv.layout import Shard, Slice, slice_between
from splitserve.kv.staging import StagedTransport, in_buffer
from splitserve.kv.transport import Region, Transport, WriteState
from tests.unit.kv.mirrors import HeldMirror
from tests.unit.kv.numbered import Array, Shape, format_of

pytestmark = pytest.mark.nixl

LAYERS, BLOCKS, BLOCK_BYTES, BLOCK_SIZE = 3, 8, 4096, 16
TIMEOUT_S = 30.0


class Device:
    """A rank's blocks on a device, and their mirror."""

    def __init__(self, uuid: str, seed: int | None = None) -> None:
        self.uuid = uuid
        self.memory: Array = np.zeros((LAYERS, BLOCKS, BLOCK_BYTES), np.uint8)
        if seed is not None:
            self.memory[:] = np.random.default_rng(seed).integers(1, 255, self.memory.shape, np.uint8)
        self.mirror = HeldMirror(self.memory, np.zeros_like(self.memory))

    def transport(self, buffer: KvBuffer) -> Transport:
        return in_buffer(buffer, self._direct, self._staged)

    def _direct(self) -> Transport:
        """Where UCX knows no device, it refuses to take this memory for one's."""
        return self._nixl(self.memory, "VRAM")

    def _staged(self) -> Transport:
        return StagedTransport(self._nixl(self.mirror.host, "DRAM"), self.mirror)

    def _nixl(self, memory: Array, memory_type: str) -> Transport:
        nixl = pytest.importorskip("splitserve.kv.nixl")
        base = memory.ctypes.data
        regions = [Region(base + layer * memory[0].nbytes, BLOCK_BYTES, BLOCK_BYTES, BLOCKS) for layer in range(LAYERS)]
        transport: Transport = nixl.NixlTransport(self.uuid, regions, [(base, memory.nbytes)], memory_type)
        return transport


def whole() -> Slice:
    shard = Shard(KvPart(0, LAYERS, 0, 1), BLOCK_SIZE, (0,) * LAYERS)
    cut = slice_between(shard, shard, format_of(Shape(block_size=BLOCK_SIZE), LAYERS, 1, BLOCK_BYTES // BLOCK_SIZE))
    assert cut is not None
    return cut


def wait_until(true: Callable[[], bool], what: str, written_to: Transport | None = None) -> None:
    """`written_to` needs help meanwhile."""
    pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline, f"in vain: {what}"
        if written_to is not None:
            written_to.progress()
        pause.wait(0.001)


def _push_from_another_process(pipe: Connection, address: bytes) -> None:
    """The child's part: every layer's blocks, in reverse order. Its device's memory is refused first."""
    source = Device("source", seed=7)
    transport = source.transport(KvBuffer.AUTO)
    transport.connect("destination", address, whole())
    blocks = list(range(BLOCKS))
    handles = [transport.write("destination", layer, blocks, blocks[::-1]) for layer in range(LAYERS)]
    states: dict[int, WriteState] = {}
    wait_until(lambda: _ended(transport, handles, states), "the WRITEs end")
    pipe.send(set(states.values()))
    pipe.recv()
    transport.close()


def _ended(transport: Transport, handles: list[object], states: dict[int, WriteState]) -> bool:
    for number, handle in enumerate(handles):
        if states.get(number) in (None, WriteState.IN_FLIGHT):
            states[number] = transport.poll(handle)
    return WriteState.IN_FLIGHT not in states.values()


def test_devices_that_can_not_be_registered_exchange_every_byte_between_processes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    destination = Device("destination")
    transport = destination.transport(KvBuffer.AUTO)
    assert "KV goes through host memory" in caplog.text
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_push_from_another_process, args=(theirs, transport.address))
    child.start()
    try:
        wait_until(lambda: ours.poll(), "the child has written", transport)
        assert ours.recv() == {WriteState.DONE}
        assert not destination.memory.any(), "peers write into the mirror only"
        landed = transport.land([range(BLOCKS)] * LAYERS)
        assert landed is not None
        wait_until(landed, "the blocks are on the device")
        assert np.array_equal(destination.memory, Device("expected", seed=7).memory[:, ::-1])
        assert not np.array_equal(destination.memory, Device("other", seed=8).memory[:, ::-1])
        ours.send("over")
        child.join(TIMEOUT_S)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join(TIMEOUT_S)
        child.close()
        ours.close()
        theirs.close()
        transport.close()


def test_a_write_waits_for_its_copy_over_nixl_too() -> None:
    source, destination = Device("source", seed=1), Device("destination")
    one, other = source.transport(KvBuffer.HOST), destination.transport(KvBuffer.HOST)
    one.connect("destination", other.address, whole())
    source.mirror.holds = True
    handle = one.write("destination", 1, [2], [5])
    assert one.poll(handle) is WriteState.IN_FLIGHT
    assert not destination.mirror.host.any()
    source.mirror.let_go()
    states: dict[int, WriteState] = {}
    wait_until(lambda: _ended(one, [handle], states), "the WRITE ends", other)
    assert states == {0: WriteState.DONE}
    assert np.array_equal(destination.mirror.host[1, 5], source.memory[1, 2])
    one.close()
    other.close()


def test_a_device_whose_memory_must_be_registered_and_can_not_be_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"kv_transfer\.buffer: is device.*NIXL can't register.*set it to auto or host"
    ):
        Device("refused").transport(KvBuffer.DEVICE)
