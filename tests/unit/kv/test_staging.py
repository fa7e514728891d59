"""KV through host memory: nothing is written before it is copied off the device, nor received before it is on the
other one."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from splitserve.core.config import KvBuffer
from splitserve.core.errors import ConfigError
from splitserve.core.worker import KvPart
from splitserve.kv.layout import Shard, part_of, slice_between
from splitserve.kv.shm import ShmTransport
from splitserve.kv.staging import StagedTransport, in_buffer
from splitserve.kv.transfer import TransferService
from splitserve.kv.transport import Transport, TransportError, WriteState
from tests.unit.kv.mirrors import HeldMirror, memory_of
from tests.unit.kv.numbered import Array, Shape, format_of
from tests.unit.kv.rig import (
    BLOCK_BYTES,
    BLOCKS,
    KV,
    LAYERS,
    SETTINGS,
    SHARD,
    HeldTransport,
    Pair,
    Worker,
    content,
    running,
    wait_until,
)


def a_device(seed: int | None, block_bytes: int = BLOCK_BYTES) -> Array:
    """Random bytes, or none."""
    shape = (LAYERS, BLOCKS, block_bytes)
    return np.zeros(shape, np.uint8) if seed is None else np.random.default_rng(seed).integers(1, 255, shape, np.uint8)


@dataclass
class End:
    """A rank with a device of its own."""

    shard: Shard
    device: Array
    transport: ShmTransport = field(init=False)
    mirror: HeldMirror = field(init=False)
    staged: StagedTransport = field(init=False)

    def __post_init__(self) -> None:
        size = self.device.shape[-1]
        self.transport = ShmTransport(LAYERS, BLOCKS, size)
        self.mirror = HeldMirror(self.device, memory_of(self.transport, LAYERS, BLOCKS, size))
        self.staged = StagedTransport(self.transport, self.mirror)


@contextmanager
def ends(source: Shard = SHARD, destination: Shard = SHARD, heads: int = 1) -> Iterator[tuple[End, End]]:
    """Two ranks that know each other; heads of BLOCK_BYTES bytes."""
    kv = format_of(Shape(block_size=source.block_size), LAYERS, heads, BLOCK_BYTES // source.block_size)
    one = End(source, a_device(1, source.part.heads * BLOCK_BYTES))
    other = End(destination, a_device(None, destination.part.heads * BLOCK_BYTES))
    cut = slice_between(source, destination, kv)
    assert cut is not None
    one.staged.connect("other", other.staged.address, cut)
    try:
        yield one, other
    finally:
        one.staged.close()
        other.staged.close()


# One WRITE ------------------------------------------------------------------------------------------------------------
def test_a_write_brings_the_devices_bytes_to_the_peers_device() -> None:
    with ends() as (one, other):
        handle = one.staged.write("other", 1, [3, 0, 7], [5, 11, 2])
        assert one.staged.poll(handle) is WriteState.DONE
        other.staged.land([[], [5, 11, 2], []])
        expected = np.zeros_like(other.device)
        expected[1, [5, 11, 2]] = one.device[1, [3, 0, 7]]
        assert np.array_equal(other.device, expected)
        expected[1, 5, -1] ^= 1
        assert not np.array_equal(other.device, expected), "the comparison above can't fail"


def test_a_write_is_not_posted_before_its_blocks_are_copied() -> None:
    with ends() as (one, other):
        one.mirror.holds = True
        handle = one.staged.write("other", 0, [4], [4])
        assert one.staged.poll(handle) is WriteState.IN_FLIGHT
        assert not other.mirror.host.any()
        one.mirror.let_go()
        assert one.staged.poll(handle) is WriteState.DONE
        assert np.array_equal(other.mirror.host[0, 4], one.device[0, 4])


def test_a_block_of_which_a_peer_gets_one_head_is_copied_whole_and_once() -> None:
    half = Shard(part_of(1, 2, 2, 0, LAYERS), SHARD.block_size, SHARD.groups)
    both = Shard(KvPart(0, LAYERS, 0, 2), SHARD.block_size, SHARD.groups)
    with ends(source=both, destination=half, heads=2) as (one, other):
        handle = one.staged.write("other", 2, [6], [1])
        assert one.mirror.started == [("to host", 2, (6,))]
        assert one.staged.poll(handle) is WriteState.DONE
        other.staged.land([[], [], [1]])
        assert np.array_equal(other.device[2, 1], one.device[2, 6, BLOCK_BYTES:])


def test_cells_of_one_block_are_copied_as_that_block() -> None:
    small = Shard(SHARD.part, SHARD.block_size // 2, SHARD.groups)
    kv = format_of(Shape(block_size=SHARD.block_size), LAYERS, 1, BLOCK_BYTES // SHARD.block_size)
    one, other = End(SHARD, a_device(1)), End(small, a_device(None, BLOCK_BYTES // 2))
    cut = slice_between(SHARD, small, kv)
    assert cut is not None
    one.staged.connect("other", other.staged.address, cut)
    assert one.staged.poll(one.staged.write("other", 0, [10, 11, 4], [0, 1, 2])) is WriteState.DONE
    assert one.mirror.started == [("to host", 0, (2, 5))]
    other.staged.land([[0, 1, 2], [], []])
    assert np.array_equal(other.device[0, :2].reshape(-1), one.device[0, 5])
    assert np.array_equal(other.device[0, 2], one.device[0, 2, : BLOCK_BYTES // 2])
    one.staged.close()
    other.staged.close()


def test_a_write_to_a_peer_that_ends_fails_only_when_its_copy_is_over() -> None:
    """Until then the copy's memory is in use, and a block that is free may be claimed: peers would write there."""
    with ends() as (one, _):
        one.mirror.holds = True
        handle = one.staged.write("other", 0, [4], [4])
        one.staged.disconnect("other")
        assert one.staged.poll(handle) is WriteState.IN_FLIGHT
        one.mirror.let_go()
        assert one.staged.poll(handle) is WriteState.FAILED


def test_a_write_that_the_transport_refuses_after_the_copy_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    with ends() as (one, _):
        one.mirror.holds = True
        handle = one.staged.write("other", 0, [1], [BLOCKS])
        one.mirror.let_go()
        assert one.staged.poll(handle) is WriteState.FAILED
    assert f"block {BLOCKS} of layer 0 is outside" in caplog.text


def test_a_write_to_a_stranger_or_with_a_lost_device_is_refused() -> None:
    with ends() as (one, _):
        with pytest.raises(TransportError, match="stranger is not connected"):
            one.staged.write("stranger", 0, [1], [1])
        one.mirror.broken = True
        with pytest.raises(TransportError, match="the device is lost"):
            one.staged.write("other", 0, [1], [1])


def test_a_claim_of_no_blocks_has_landed() -> None:
    with ends() as (one, _):
        assert one.staged.land([[], [], []]) is None


# Which transport ------------------------------------------------------------------------------------------------------
def _works() -> Transport:
    return ShmTransport(1, 1, 8)


def _refuses() -> Transport:
    raise TransportError("NIXL_ERR_BACKEND")


def _must_not_run() -> Transport:
    raise AssertionError("it was not asked for")


@pytest.mark.parametrize(
    ("buffer", "direct", "staged"),
    [
        (KvBuffer.AUTO, _works, _must_not_run),
        (KvBuffer.AUTO, _refuses, _works),
        (KvBuffer.DEVICE, _works, _must_not_run),
        (KvBuffer.HOST, _must_not_run, _works),
    ],
)
def test_auto_takes_host_memory_only_where_the_devices_is_refused(
    buffer: KvBuffer,
    direct: Callable[[], Transport],
    staged: Callable[[], Transport],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        in_buffer(buffer, direct, staged).close()
    assert ("KV goes through host memory" in caplog.text) == (direct is _refuses)


@pytest.mark.parametrize(
    ("buffer", "says"),
    [
        (KvBuffer.DEVICE, "kv_transfer.buffer: is device, whose memory can't be registered: NIXL_ERR_BACKEND"),
        (KvBuffer.AUTO, "kv_transfer.buffer: KV can't go through host memory: NIXL_ERR_BACKEND"),
        (KvBuffer.HOST, "kv_transfer.buffer: KV can't go through host memory: NIXL_ERR_BACKEND"),
    ],
)
def test_a_buffer_that_can_not_be_had_is_named(buffer: KvBuffer, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        in_buffer(buffer, _refuses, _refuses)


# Between two services -------------------------------------------------------------------------------------------------
@dataclass
class DeviceWorker(Worker):
    """Its blocks are on a device, and its transport knows a mirror of them only."""

    def __post_init__(self) -> None:
        self.transport = HeldTransport()
        self.device = a_device(None)
        self.mirror = HeldMirror(self.device, memory_of(self.transport, LAYERS, BLOCKS, BLOCK_BYTES))
        staged = StagedTransport(self.transport, self.mirror)
        self.service = TransferService(self.uuid, lambda: staged, KV, SHARD, SETTINGS, self.events.append)

    def fill(self, blocks: "tuple[int, ...]") -> None:  # type: ignore[override]
        for layer in range(LAYERS):
            for block in blocks:
                self.device[layer, block] = np.frombuffer(content(self.uuid, layer, block), np.uint8)

    def holds(self, source: Worker, theirs: "tuple[int, ...]", ours: "tuple[int, ...]") -> bool:  # type: ignore[override]
        return all(
            self.device[layer, here].tobytes() == content(source.uuid, layer, there)
            for layer in range(LAYERS)
            for there, here in zip(theirs, ours, strict=True)
        )


@pytest.fixture
def prefiller() -> DeviceWorker:
    return DeviceWorker("prefiller")


@pytest.fixture
def decoder() -> DeviceWorker:
    return DeviceWorker("decoder")


@pytest.fixture
def pair(prefiller: DeviceWorker, decoder: DeviceWorker) -> Iterator[Pair]:
    with running(prefiller, decoder):
        yield Pair(prefiller, decoder)
        prefiller.mirror.let_go()
        decoder.mirror.let_go()


def start(pair: Pair) -> None:
    pair.offer()
    pair.claim()
    pair.prefill()


def test_a_transfer_through_host_memory_brings_every_byte(pair: Pair) -> None:
    start(pair)
    pair.decoder.wait_for("received", pair.key)
    pair.prefiller.wait_for("sent", pair.key)
    assert pair.arrived()
    pair.assert_at_rest()


def test_no_block_is_given_back_while_it_is_copied_off_the_device(pair: Pair, prefiller: DeviceWorker) -> None:
    prefiller.mirror.holds = True
    start(pair)
    wait_until(lambda: bool(prefiller.mirror.started), "the first copy")
    assert not prefiller.transport.posted
    assert pair.key not in prefiller.collect().sent
    prefiller.mirror.let_go()
    prefiller.wait_for("sent", pair.key)
    assert prefiller.transport.posted


def test_a_claim_is_not_received_before_its_bytes_are_on_the_device(pair: Pair, decoder: DeviceWorker) -> None:
    decoder.mirror.holds = True
    start(pair)
    pair.prefiller.wait_for("sent", pair.key)
    wait_until(lambda: len(decoder.mirror.started) == LAYERS, "every layer's copy is started")
    assert not decoder.collect()
    assert decoder.service.busy
    assert not pair.arrived()
    decoder.mirror.let_go()
    decoder.wait_for("received", pair.key)
    assert pair.arrived()
    assert not decoder.event(pair.key, source_side=False).error


def test_a_claim_abandoned_while_it_lands_keeps_its_blocks_until_it_has(pair: Pair, decoder: DeviceWorker) -> None:
    decoder.mirror.holds = True
    start(pair)
    wait_until(lambda: len(decoder.mirror.started) == LAYERS, "every layer's copy is started")
    decoder.service.abandon(pair.key)
    wait_until(lambda: decoder.service.quarantined_blocks == len(pair.claimed), "quarantine")
    assert not decoder.collect()
    decoder.mirror.let_go()
    wait_until(lambda: bool(decoder.collect()), "the claim's end")
    pair.assert_at_rest()


def test_a_claim_that_can_not_land_fails_with_the_reason(pair: Pair, decoder: DeviceWorker) -> None:
    decoder.mirror.broken = True
    start(pair)
    decoder.wait_for("failed", pair.key)
    assert "the device is lost" in decoder.event(pair.key, source_side=False).error
    assert decoder.service.counters.failures == {"landing": 1}
    pair.prefiller.wait_for("sent", pair.key)
    pair.assert_at_rest()


def test_a_service_that_closes_ends_copies_first(prefiller: DeviceWorker, decoder: DeviceWorker) -> None:
    with running(prefiller, decoder):
        start(Pair(prefiller, decoder))
        decoder.wait_for("received", Pair(prefiller, decoder).key)
    assert prefiller.mirror.closed
    assert decoder.mirror.closed
