"""What every KV transport does, run against each."""

import multiprocessing
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

from splitserve.kv.transport import TransportError, WriteState
from tests.contract.kv_endpoints import (
    BLOCK_BYTES,
    BLOCKS,
    KINDS,
    LAYERS,
    Endpoint,
    make_endpoint,
    skip_without,
    whole_blocks,
)

TIMEOUT_S = 30.0


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


@pytest.fixture
def pair(kind: str) -> Iterator[tuple[Endpoint, Endpoint]]:
    source, destination = make_endpoint(kind, "source"), make_endpoint(kind, "destination")
    source.memory[:] = np.random.default_rng(0).integers(1, 255, source.memory.shape, dtype=np.uint8)
    destination.memory[:] = 0
    try:
        yield source, destination
    finally:
        source.transport.close()
        destination.transport.close()


def connect(source: Endpoint, destination: Endpoint) -> None:
    source.transport.connect(destination.uuid, destination.transport.address, whole_blocks())


def finish(source: Endpoint, destination: Endpoint, handle: object) -> WriteState:
    """Polls a WRITE to its end, with the peer's help."""
    pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
    while (state := source.transport.poll(handle)) is WriteState.IN_FLIGHT:
        assert time.monotonic() < deadline, "the WRITE does not end"
        destination.transport.progress()
        pause.wait(0.001)
    return state


def test_a_write_copies_the_named_blocks_to_their_places_and_touches_no_other(pair: tuple[Endpoint, Endpoint]) -> None:
    source, destination = pair
    connect(source, destination)
    handle = source.transport.write("destination", 1, [3, 0, 7], [5, 11, 2])
    assert finish(source, destination, handle) is WriteState.DONE
    expected = np.zeros_like(destination.memory)
    expected[1, [5, 11, 2]] = source.memory[1, [3, 0, 7]]
    assert np.array_equal(destination.memory, expected)
    wrong = np.zeros_like(destination.memory)
    wrong[1, [5, 2, 11]] = source.memory[1, [3, 0, 7]]
    assert not np.array_equal(destination.memory, wrong), "the comparison above can't fail"


def test_a_whole_layer_goes_in_one_write(pair: tuple[Endpoint, Endpoint]) -> None:
    source, destination = pair
    connect(source, destination)
    blocks = list(range(BLOCKS))
    for layer in range(LAYERS):
        handle = source.transport.write("destination", layer, blocks, blocks[::-1])
        assert finish(source, destination, handle) is WriteState.DONE
    assert np.array_equal(destination.memory, source.memory[:, ::-1])


def test_many_writes_may_be_in_flight_at_once(pair: tuple[Endpoint, Endpoint]) -> None:
    source, destination = pair
    connect(source, destination)
    handles = [
        source.transport.write("destination", layer, [block], [block])
        for layer in range(LAYERS)
        for block in range(BLOCKS)
    ]
    assert {finish(source, destination, handle) for handle in handles} == {WriteState.DONE}
    assert np.array_equal(destination.memory, source.memory)


def test_both_ways_work_at_once(pair: tuple[Endpoint, Endpoint]) -> None:
    one, other = pair
    connect(one, other)
    connect(other, one)
    other.memory[0, 1] = 77
    there = one.transport.write("destination", 0, [2], [2])
    back = other.transport.write("source", 0, [1], [9])
    assert finish(one, other, there) is finish(other, one, back) is WriteState.DONE
    assert np.array_equal(other.memory[0, 2], one.memory[0, 2])
    assert set(one.memory[0, 9].tolist()) == {77}


def test_connecting_again_is_harmless(pair: tuple[Endpoint, Endpoint]) -> None:
    source, destination = pair
    for _ in range(3):
        connect(source, destination)
    handle = source.transport.write("destination", 0, [1], [1])
    assert finish(source, destination, handle) is WriteState.DONE


def test_a_write_to_an_unknown_peer_is_refused(pair: tuple[Endpoint, Endpoint]) -> None:
    with pytest.raises(TransportError, match="stranger is not connected"):
        pair[0].transport.write("stranger", 0, [1], [1])


@pytest.mark.parametrize(("source_block", "destination_block"), [(BLOCKS, 0), (0, BLOCKS), (0, -1)])
def test_a_block_outside_the_memory_is_refused(
    pair: tuple[Endpoint, Endpoint], source_block: int, destination_block: int
) -> None:
    """A peer's Register says where to write: it must not be able to name what is not there."""
    source, destination = pair
    connect(source, destination)
    with pytest.raises(TransportError, match=r"block -?\d+ of layer 0 is outside"):
        source.transport.write("destination", 0, [source_block], [destination_block])
    assert not destination.memory.any()


@pytest.mark.parametrize("address", [b"", b"nonsense", b"\x94\x01\x02\x03\x04"])
def test_an_address_that_is_none_is_refused(pair: tuple[Endpoint, Endpoint], address: bytes) -> None:
    with pytest.raises(TransportError):
        pair[0].transport.connect("destination", address, whole_blocks())


def test_a_slice_that_a_peer_has_no_room_for_is_refused(kind: str, pair: tuple[Endpoint, Endpoint]) -> None:
    other = make_endpoint(kind, "other", BLOCK_BYTES // 2)
    with pytest.raises(TransportError, match=r"block"):
        pair[0].transport.connect("other", other.transport.address, whole_blocks())
    other.transport.close()


def test_a_forgotten_peer_is_not_written_to_and_forgetting_a_stranger_is_harmless(
    pair: tuple[Endpoint, Endpoint],
) -> None:
    source, destination = pair
    connect(source, destination)
    source.transport.disconnect("destination")
    source.transport.disconnect("stranger")
    with pytest.raises(TransportError, match="not connected"):
        source.transport.write("destination", 0, [1], [1])


def _write_from_another_process(pipe: Connection, kind: str, address: bytes) -> None:
    """The child's part: writes its blocks 1 and 2 of layer 1, filled with 7 and 8, into our blocks 4 and 3."""
    source = make_endpoint(kind, "child")
    source.memory[1, 1], source.memory[1, 2] = 7, 8
    source.transport.connect("destination", address, whole_blocks())
    handle = source.transport.write("destination", 1, [1, 2], [4, 3])
    pause = threading.Event()
    while (state := source.transport.poll(handle)) is WriteState.IN_FLIGHT:
        pause.wait(0.001)
    pipe.send(state)
    source.transport.close()


def test_bytes_cross_from_another_process(kind: str) -> None:
    destination = make_endpoint(kind, "destination")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_write_from_another_process, args=(theirs, kind, destination.transport.address))
    child.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not ours.poll(0.001):
            assert time.monotonic() < deadline, "the child has not written"
            destination.transport.progress()
        assert ours.recv() is WriteState.DONE
        assert destination.memory[1, [4, 3], 0].tolist() == destination.memory[1, [4, 3], -1].tolist() == [7, 8]
        assert np.count_nonzero(destination.memory) == 2 * BLOCK_BYTES
    finally:
        child.kill()
        child.join(TIMEOUT_S)
        child.close()
        ours.close()
        theirs.close()
    destination.transport.close()
