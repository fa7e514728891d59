"""What TCP leaves open when a connection breaks, and who may write: the rest is the contract of every transport."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from unittest.mock import patch

import msgspec
import numpy as np
import pytest

from splitserve.core.errors import ConfigError
from splitserve.kv.blocks import Blocks
from splitserve.kv.tcp import TcpTransport, _Address, _Session
from splitserve.kv.transport import TransportError, WriteState
from tests.contract.kv_endpoints import BLOCK_BYTES, BLOCKS, LAYERS, make_endpoint, whole_blocks

TIMEOUT_S = 20.0


def until(holds: Callable[[], bool], *work: Callable[[], object]) -> None:
    pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline, "in vain"
        for each in work:
            each()
        pause.wait(0.001)


class Pair:
    """A source, and a destination that takes nothing in but when told to."""

    def __init__(self) -> None:
        self.source, self.destination = make_endpoint("tcp", "source"), make_endpoint("tcp", "destination")
        self.source.memory[:] = 7
        assert isinstance(self.source.transport, TcpTransport)
        assert isinstance(self.destination.transport, TcpTransport)
        self.writes, self.takes = self.source.transport, self.destination.transport
        self.writes.connect("destination", self.takes.address, whole_blocks())
        self.welcomed()

    def welcomed(self) -> None:
        until(lambda: self.writes._links["destination"].welcomed, self.writes.progress, self.takes.progress)

    def write(self, block: int) -> object:
        return self.writes.write("destination", 0, [0], [block])

    def done(self, handle: object) -> WriteState:
        until(lambda: self.writes.poll(handle) is not WriteState.IN_FLIGHT, self.takes.progress)
        return self.writes.poll(handle)

    def sent(self, handle: object) -> None:
        """All of it has left the source; the destination's kernel has it."""
        stream = self.writes._links["destination"].stream
        assert stream is not None
        until(lambda: stream.flushed, lambda: self.writes.poll(handle))

    def cut(self) -> None:
        """The connection is lost, with whatever is on its way."""
        self.writes._links["destination"].hang_up()

    @property
    def arrived(self) -> set[int]:
        """Blocks that are not empty."""
        return {block for block in range(BLOCKS) if self.destination.memory[:, block].any()}


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    try:
        yield pair
    finally:
        pair.writes.close()
        pair.takes.close()


def hung_up_on(stranger: socket.socket) -> bool:
    """Reads what has come, a nonce at most."""
    stranger.setblocking(False)
    try:
        while stranger.recv(64):
            continue
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def serve_newcomers(pair: Pair, former: _Session) -> None:
    """The destination takes in what comes on connections other than this one."""
    pair.takes._accept()
    for session in [each for each in pair.takes._sessions if each is not former]:
        pair.takes._serve(session)


def test_a_write_whose_connection_broke_is_in_flight_until_the_peer_has_let_go_of_that_connection(pair: Pair) -> None:
    (former,) = pair.takes._sessions
    handle = pair.write(3)
    pair.sent(handle)
    pair.cut()
    for _ in range(100):
        assert pair.writes.poll(handle) is WriteState.IN_FLIGHT
    until(lambda: pair.writes.poll(handle) is not WriteState.IN_FLIGHT, lambda: serve_newcomers(pair, former))
    assert pair.writes.poll(handle) is WriteState.FAILED
    pair.takes.progress()
    assert pair.arrived == set(), "it came after it was called failed: its block may be somebody else's by now"


def test_without_letting_go_of_the_former_connection_the_late_write_would_arrive(pair: Pair) -> None:
    """The negative twin."""
    (former,) = pair.takes._sessions
    handle = pair.write(3)
    pair.sent(handle)
    pair.cut()
    with patch.object(TcpTransport, "_let_go"):
        until(lambda: pair.writes.poll(handle) is not WriteState.IN_FLIGHT, lambda: serve_newcomers(pair, former))
    until(lambda: pair.arrived == {3}, pair.takes.progress)


def test_nothing_that_an_ended_peer_had_sent_arrives_after_it_is_forgotten(pair: Pair) -> None:
    handle = pair.write(3)
    pair.sent(handle)
    pair.takes.disconnect("source")
    pair.takes.progress()
    assert pair.arrived == set()


def test_a_peer_that_was_forgotten_is_not_welcomed_again(pair: Pair) -> None:
    """Its blocks here are somebody else's by now, whatever it still means to write."""
    pair.takes.disconnect("source")
    handle, link = pair.write(3), pair.writes._links["destination"]
    for _ in range(3):
        link.redial_at = 0.0
        until(lambda: link.redial_at > 0, pair.takes.progress, lambda: pair.writes.poll(handle))
    assert pair.writes.poll(handle) is WriteState.IN_FLIGHT
    assert pair.arrived == set()


def test_what_a_peer_that_lives_has_sent_arrives(pair: Pair) -> None:
    """The negative twin."""
    assert pair.done(pair.write(3)) is WriteState.DONE
    assert pair.arrived == {3}


def test_writes_go_on_over_the_next_connection(pair: Pair) -> None:
    lost = pair.write(3)
    pair.sent(lost)
    pair.cut()
    next_one = pair.write(4)
    assert pair.done(next_one) is WriteState.DONE
    assert pair.writes.poll(lost) is WriteState.FAILED
    assert 4 in pair.arrived


def test_a_connection_that_broke_while_nothing_was_on_its_way_costs_no_write(pair: Pair) -> None:
    (session,) = pair.takes._sessions
    pair.takes._let_go(session)
    assert pair.done(pair.write(3)) is WriteState.DONE


def test_a_peer_that_does_not_listen_keeps_its_writes_in_flight_until_it_is_known_to_have_ended(pair: Pair) -> None:
    handle = pair.write(3)
    pair.takes.close()
    pair.writes._links["destination"].redial_at = 0.0
    for _ in range(100):
        assert pair.writes.poll(handle) is WriteState.IN_FLIGHT
    pair.writes.disconnect("destination")
    assert pair.writes.poll(handle) is WriteState.FAILED


def test_who_was_not_told_the_cookie_writes_nothing(pair: Pair) -> None:
    told = msgspec.msgpack.decode(pair.takes.address, type=_Address)
    guess = msgspec.msgpack.encode(msgspec.structs.replace(told, cookie=bytes(16)))
    stranger = make_endpoint("tcp", "stranger")
    assert isinstance(stranger.transport, TcpTransport)
    stranger.memory[:] = 9
    stranger.transport.connect("destination", guess, whole_blocks())
    handle, link = stranger.transport.write("destination", 0, [0], [3]), stranger.transport._links["destination"]
    until(lambda: link.redial_at > 0, pair.takes.progress, lambda: stranger.transport.poll(handle))
    assert stranger.transport.poll(handle) is WriteState.IN_FLIGHT
    assert pair.arrived == set()
    stranger.transport.close()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x20" + bytes(32),
        b"\xff\xff\xff\xff" + bytes(64),
    ],
)
def test_what_is_none_of_our_messages_ends_its_connection_and_disturbs_no_other(pair: Pair, said: bytes) -> None:
    told = msgspec.msgpack.decode(pair.takes.address, type=_Address)
    with socket.create_connection((told.host, told.port), timeout=TIMEOUT_S) as stranger:
        stranger.sendall(said)
        until(lambda: hung_up_on(stranger), pair.takes.progress)
    assert len(pair.takes._sessions) == 1
    assert pair.done(pair.write(3)) is WriteState.DONE


@pytest.mark.parametrize(
    "runs",
    [
        [(LAYERS * BLOCKS * BLOCK_BYTES, 8)],
        [(0, 4)],
        [(0, 8), (LAYERS * BLOCKS * BLOCK_BYTES - 4, 8)],
    ],
    ids=["beyond the memory", "fewer bytes than came", "one of two beyond"],
)
def test_a_write_that_does_not_fit_leaves_the_memory_as_it_was(pair: Pair, runs: list[tuple[int, int]]) -> None:
    body = b"".join([(1).to_bytes(8), len(runs).to_bytes(4), *(at.to_bytes(8) + size.to_bytes(4) for at, size in runs)])
    body += b"\x09" * 8 * len(runs)
    stream = pair.writes._links["destination"].stream
    assert stream is not None
    stream.put(len(body).to_bytes(4) + body)
    stream.flush()
    until(lambda: not pair.takes._sessions, pair.takes.progress)
    assert pair.arrived == set()


def test_the_bytes_of_a_write_are_those_of_when_it_was_posted(pair: Pair) -> None:
    handle = pair.write(3)
    pair.source.memory[:] = 0
    assert pair.done(handle) is WriteState.DONE
    assert set(pair.destination.memory[0, 3].tolist()) == {7}


def test_a_large_write_arrives_whole_however_slowly_it_is_read() -> None:
    size = 8 * 1024 * 1024
    source, destination = (make_endpoint("tcp", name, size) for name in ("source", "destination"))
    source.memory[0, 0] = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    source.transport.connect("destination", destination.transport.address, whole_blocks(size))
    handle = source.transport.write("destination", 0, [0], [1])
    with patch("splitserve.kv.streams._READ_BYTES", 4096), patch("splitserve.kv.streams._READS_PER_TURN", 7):
        until(
            lambda: source.transport.poll(handle) is not WriteState.IN_FLIGHT,
            *[destination.transport.progress] * 100,
        )
    assert np.array_equal(destination.memory[0, 1], source.memory[0, 0])
    source.transport.close()
    destination.transport.close()


def test_a_write_longer_than_any_message_is_refused() -> None:
    source, destination = make_endpoint("tcp", "source"), make_endpoint("tcp", "destination")
    source.transport.connect("destination", destination.transport.address, whole_blocks())
    with (
        patch("splitserve.kv.tcp.MOST_MESSAGE_BYTES", BLOCK_BYTES),
        pytest.raises(TransportError, match=r"kv_transfer\.write_mib"),
    ):
        source.transport.write("destination", 0, [0], [0])
    source.transport.close()
    destination.transport.close()


def test_strangers_are_only_so_many(pair: Pair) -> None:
    told = msgspec.msgpack.decode(pair.takes.address, type=_Address)
    with patch("splitserve.kv.tcp.MOST_STRANGERS", 2):
        strangers = [socket.create_connection((told.host, told.port), timeout=TIMEOUT_S) for _ in range(3)]
        try:
            until(lambda: hung_up_on(strangers[2]), pair.takes.progress)
            assert len(pair.takes._sessions) == 3
        finally:
            for stranger in strangers:
                stranger.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0"])
def test_a_host_that_is_not_this_machines_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=rf"kv_transfer\.host: .*'{host}'"):
        TcpTransport("a", host, Blocks.made(1, 1, 8))


def test_ipv6_works(pair: Pair) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    blocks = Blocks.made(LAYERS, BLOCKS, BLOCK_BYTES)
    destination = TcpTransport("six", "::1", blocks)
    pair.writes.connect("six", destination.address, whole_blocks())
    handle = pair.writes.write("six", 0, [0], [1])
    until(lambda: pair.writes.poll(handle) is WriteState.DONE, destination.progress)
    destination.close()
