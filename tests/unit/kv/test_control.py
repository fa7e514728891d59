"""The control channel against well-behaved and other peers, over real sockets on loopback."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import zmq

from splitserve.core.config import KvTransferSettings
from splitserve.core.versions import Versions
from splitserve.core.worker import KvPeer
from splitserve.kv import control
from splitserve.kv.control import ControlChannel
from splitserve.kv.curve import Keys, made_keys
from splitserve.kv.messages import (
    MAX_MESSAGE_BYTES,
    SPOKEN,
    Cancel,
    Codec,
    Failed,
    Goodbye,
    Hello,
    HelloReply,
    Message,
    Ping,
    Pong,
    version_difference,
)
from splitserve.kv.news import News, PeerEnded, PeerRefused, PeerSilent, PeerUp, Received
from splitserve.kv.probe import Probe
from tests.unit.kv.rig import KV, PART, SHARD, TIMEOUT_S, wait_until

SETTINGS = KvTransferSettings(peer_silent_s=0.5)


class Channel:
    """A channel and its news in order."""

    def __init__(self, uuid: str, spoken: Versions = SPOKEN, **changes: Any) -> None:
        self.news: queue.Queue[News] = queue.Queue()
        kv = replace(KV, **changes)
        self.channel = ControlChannel(uuid, kv, SHARD, f"memory of {uuid}".encode(), SETTINGS, self.news.put, spoken)
        self.peer = self.channel.start()

    def next(self) -> News:
        return self.news.get(timeout=TIMEOUT_S)


@contextmanager
def channels(*made: Channel) -> Iterator[None]:
    try:
        for each in made:
            for other in made:
                each.channel.expect(other.peer)
        yield
    finally:
        for each in made:
            each.channel.close()


class RawPeer:
    """A peer that says only what the test says, with keys of its own. It lets anybody in."""

    def __init__(self, uuid: str, endpoint: str = "tcp://127.0.0.1:*") -> None:
        keys = made_keys()
        assert keys is not None
        self.keys = keys
        self.context = zmq.Context()
        self.inbox = self.context.socket(zmq.PULL)
        self.inbox.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        self.keys.listen(self.inbox)
        self.inbox.bind(endpoint)
        bound = self.inbox.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.outbox = self.context.socket(zmq.PUSH)
        self.peer = KvPeer(uuid, bound, PART, self.keys.public.decode())
        self.codec = Codec(uuid)

    def say(self, to: KvPeer, *messages: Message) -> None:
        self.keys.dial(self.outbox, to)
        self.outbox.connect(to.endpoint)
        for message in messages:
            self.outbox.send(self.codec.encode(to.uuid, message))

    def say_raw(self, frame: bytes) -> None:
        self.outbox.send(frame)

    def hello(self, to: KvPeer) -> None:
        self.say(to, Hello(self.peer.endpoint, KV, SHARD, b""))

    def hear(self) -> Message:
        return self.codec.decode(self.inbox.recv())[2]

    def hear_until(self, kind: type[Message]) -> Message:
        while not isinstance(message := self.hear(), kind):
            pass
        return message


MakePeer = Callable[..., RawPeer]


@pytest.fixture
def raw() -> Iterator[MakePeer]:
    """Peers that the fixture's channel, or any made of `Channel` and told so, is told of before they speak."""
    made: list[RawPeer] = []

    def make(uuid: str, *knowing: Channel) -> RawPeer:
        made.append(RawPeer(uuid))
        for each in knowing:
            each.channel.expect(made[-1].peer)
        return made[-1]

    yield make
    for peer in made:
        peer.context.destroy(linger=0)


@pytest.fixture
def channel() -> Iterator[Channel]:
    made = Channel("a")
    with channels(made):
        yield made


# Greeting ------------------------------------------------------------------------------------------------------------
def test_hello_makes_both_sides_know_each_other_and_their_memory() -> None:
    a, b = Channel("a"), Channel("b")
    with channels(a, b):
        a.channel.connect(b.peer)
        assert a.next() == PeerUp("b", SHARD, b"memory of b")
        assert b.next() == PeerUp("a", SHARD, b"memory of a")
        a.channel.send("b", Cancel("t", 1))
        assert b.next() == Received("a", Cancel("t", 1))


@pytest.mark.parametrize(
    ("ours", "theirs", "used"),
    [
        (Versions(2, 2), Versions(2, 3), 2),
        (Versions(2, 3), Versions(3, 4), 3),
        (Versions(3, 4), Versions(2, 3), 3),
        (Versions(2, 4), Versions(2, 4), 4),
    ],
)
def test_workers_of_neighbouring_releases_speak_the_highest_version_that_both_know(
    ours: Versions, theirs: Versions, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    class Watched(Codec):
        def encode(self, recipient: str, message: Message, version: int | None = None) -> bytes:
            assert version is not None
            written.append(version)
            return super().encode(recipient, message, version)

    monkeypatch.setattr(control, "Codec", Watched)
    a, b = Channel("a", ours), Channel("b", theirs)
    with channels(a, b):
        a.channel.connect(b.peer)
        assert a.next() == PeerUp("b", SHARD, b"memory of b")
        assert b.next() == PeerUp("a", SHARD, b"memory of a")
        a.channel.send("b", Cancel("t", 1))
        assert b.next() == Received("a", Cancel("t", 1))
        b.channel.send("a", Cancel("t", 1))
        assert a.next() == Received("b", Cancel("t", 1))
        assert not a.channel.dropped + b.channel.dropped
    assert set(written) == {used}


def test_a_worker_without_a_common_version_is_refused_before_anything_is_said_to_it() -> None:
    a, b = Channel("a", Versions(2, 3)), Channel("b", Versions(4, 5))
    with channels(a, b):
        a.channel.connect(b.peer)
        assert a.next() == PeerRefused("b", version_difference(Versions(2, 3), Versions(4, 5)))
        b.channel.connect(a.peer)
        news = b.next()
        assert isinstance(news, PeerRefused)
        assert "upgrade the worker there" in news.message
        assert not a.channel.dropped + b.channel.dropped


def test_connecting_again_tells_again_what_is_known() -> None:
    a, b = Channel("a"), Channel("b")
    with channels(a, b):
        for _ in range(3):
            a.channel.connect(b.peer)
            assert a.next() == PeerUp("b", SHARD, b"memory of b")


def test_a_format_that_differs_is_refused_on_both_sides_with_the_field_named() -> None:
    a, b = Channel("a"), Channel("b", block_size=128)
    with channels(a, b):
        a.channel.connect(b.peer)
        for side in (a, b):
            news = side.next()
            assert isinstance(news, PeerRefused)
            assert news.message.startswith("kv.block_size is ")
        a.channel.send("b", Cancel("t", 1))
        wait_until(
            lambda: b.channel.dropped["from an unknown worker"] == 1, "the message of a refused worker is dropped"
        )


def test_a_rank_that_cannot_be_part_of_its_kv_is_refused_and_the_channel_lives_on(
    channel: Channel, raw: MakePeer
) -> None:
    peer, other = raw("b", channel), raw("c", channel)
    peer.say(channel.peer, Hello(peer.peer.endpoint, KV, replace(SHARD, block_size=0), b""))
    news = channel.next()
    assert isinstance(news, PeerRefused)
    assert news.message.startswith("shard.block_size is 0")
    reply = peer.hear_until(HelloReply)
    assert isinstance(reply, HelloReply)
    assert reply.refused == news.message
    other.hello(channel.peer)
    assert channel.next() == PeerUp("c", SHARD, b"")


def test_a_worker_does_not_connect_to_itself(channel: Channel) -> None:
    channel.channel.connect(channel.peer)
    assert isinstance(channel.next(), PeerRefused)


# What is dropped -----------------------------------------------------------------------------------------------------
def test_noise_is_counted_by_kind_and_the_channel_lives_on(channel: Channel, raw: MakePeer) -> None:
    peer = raw("b", channel)
    peer.hello(channel.peer)
    assert channel.next() == PeerUp("b", SHARD, b"")
    peer.say_raw(b"\xc1 noise")
    peer.say_raw(b"")
    peer.say_raw(b"x" * (MAX_MESSAGE_BYTES + 1))
    peer.say_raw(msgspec.msgpack.encode([99, "b", "a", ["future"]]))
    peer.say_raw(msgspec.msgpack.encode([SPOKEN.highest, "b", "a", ["teleport"]]))
    peer.say_raw(Codec("b").encode("somebody else", Cancel("t", 1)))
    peer.say_raw(Codec("stranger").encode("a", Cancel("t", 1)))
    unmet = raw("unmet", channel)
    unmet.say(channel.peer, Cancel("t", 1))
    wait_until(lambda: channel.channel.dropped["from an unknown worker"] == 1, "who says no Hello is not heard")
    peer.say_raw(Codec("b").encode("a", Cancel("t", 2)))
    assert channel.next() == Received("b", Cancel("t", 2))
    assert channel.channel.dropped == {
        "malformed": 3,
        "oversized": 1,
        "version": 1,
        "for another worker": 1,
        "in another worker's name": 1,
        "from an unknown worker": 1,
    }


def test_a_message_to_nobody_and_one_too_large_are_counted(channel: Channel, raw: MakePeer) -> None:
    peer = raw("b", channel)
    peer.hello(channel.peer)
    channel.next()
    channel.channel.send("nobody", Cancel("t", 1))
    channel.channel.send("b", Hello("tcp://127.0.0.1:1", KV, SHARD, b"x" * MAX_MESSAGE_BYTES))
    wait_until(lambda: channel.channel.dropped.total() == 2, "both are counted")
    assert channel.channel.dropped == {"to an unknown worker": 1, "own oversized": 1}


def test_a_peer_that_does_not_read_fills_its_own_queue_only(channel: Channel, raw: MakePeer) -> None:
    deaf, peer = raw("deaf", channel), raw("b", channel)
    deaf.hello(channel.peer)
    peer.hello(channel.peer)
    assert {channel.next(), channel.next()} == {PeerUp("deaf", SHARD, b""), PeerUp("b", SHARD, b"")}
    for _ in range(8_000):
        channel.channel.send("deaf", Failed("t", 1, "write", "x" * 4000))
    channel.channel.send("b", Cancel("t", 1))
    assert peer.hear_until(Cancel) == Cancel("t", 1)
    assert channel.channel.dropped["to a full queue"] > 0


# Keys ----------------------------------------------------------------------------------------------------------------
def test_a_stranger_is_let_in_as_soon_as_it_is_told_of(channel: Channel, raw: MakePeer) -> None:
    """Routers tell workers of each other in either order."""
    early = raw("early")
    early.hello(channel.peer)
    wait_until(lambda: bool(channel.channel._doorkeeper._waiting), "it knocks")
    assert channel.news.empty()
    channel.channel.expect(early.peer)
    assert channel.next() == PeerUp("early", SHARD, b"")


def test_a_stranger_whose_time_is_over_comes_again_and_is_let_in_once_it_is_told_of(
    channel: Channel, raw: MakePeer
) -> None:
    early, doorkeeper = raw("early"), channel.channel._doorkeeper
    early.hello(channel.peer)
    wait_until(lambda: bool(doorkeeper._waiting), "it knocks")
    first = next(iter(doorkeeper._waiting))
    wait_until(lambda: first not in doorkeeper._waiting, "its handshake ends")
    channel.channel.expect(early.peer)
    assert channel.next() == PeerUp("early", SHARD, b"")


def test_nobody_gets_in_with_anothers_public_key(channel: Channel, raw: MakePeer) -> None:
    """What a thief of a `KvPeer` can do without the secret that belongs to it: nothing."""
    known, thief = raw("known", channel), raw("thief")
    forged = Keys(known.keys.public, thief.keys.secret)
    forged.dial(thief.outbox, channel.peer)
    thief.outbox.connect(channel.peer.endpoint)
    thief.outbox.send(Codec("known").encode("a", Hello(thief.peer.endpoint, KV, SHARD, b"forged")))
    known.hello(channel.peer)
    assert channel.next() == PeerUp("known", SHARD, b"")
    assert channel.news.empty()
    assert channel.channel.dropped.total() == 0


def test_what_is_said_in_the_clear_is_not_heard(channel: Channel, raw: MakePeer) -> None:
    known, plain = raw("known", channel), zmq.Context()
    try:
        outbox = plain.socket(zmq.PUSH)
        outbox.connect(channel.peer.endpoint)
        outbox.send(Codec("known").encode("a", Hello(known.peer.endpoint, KV, SHARD, b"plain")))
        known.hello(channel.peer)
        assert channel.next() == PeerUp("known", SHARD, b"")
        assert channel.news.empty()
    finally:
        plain.destroy(linger=0)


@pytest.mark.parametrize(
    ("key", "says"), [("", "has no CURVE key"), ("short", "is none"), ("x" * 39 + "\\", "is none")]
)
def test_a_peer_without_a_key_is_not_spoken_to(channel: Channel, raw: MakePeer, key: str, says: str) -> None:
    channel.channel.connect(replace(raw("b").peer, public_key=key))
    news = channel.next()
    assert isinstance(news, PeerRefused)
    assert says in news.message


def test_where_libzmq_has_no_curve_ranks_speak_in_the_clear_with_their_like_only(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "made_keys", lambda: None)
    b, c = Channel("b"), Channel("c")
    with channels(b, c):
        assert b.peer.public_key == ""
        b.channel.connect(c.peer)
        assert b.next() == PeerUp("c", SHARD, b"memory of c")
        b.channel.connect(channel.peer)
        news = b.next()
        assert isinstance(news, PeerRefused)
        assert "no CURVE" in news.message


# Life and death ------------------------------------------------------------------------------------------------------
def test_a_ping_is_answered_while_nobody_takes_the_news(raw: MakePeer) -> None:
    a = Channel("a")
    with channels(a):
        peer = raw("b", a)
        peer.say(a.peer, Hello(peer.peer.endpoint, KV, SHARD, b""), *[Ping()] * 5)
        for _ in range(5):
            assert peer.hear_until(Pong) == Pong()


def test_a_peer_that_answers_nothing_falls_silent_but_has_not_ended(channel: Channel, raw: MakePeer) -> None:
    peer = raw("b", channel)
    peer.hello(channel.peer)
    assert channel.next() == PeerUp("b", SHARD, b"")
    assert channel.next() == PeerSilent("b")
    peer.say(channel.peer, Pong())
    assert channel.next() == PeerUp("b", SHARD, b"")


def test_goodbye_proves_the_end(channel: Channel, raw: MakePeer) -> None:
    peer = raw("b", channel)
    peer.hello(channel.peer)
    channel.next()
    peer.say(channel.peer, Goodbye(), Cancel("t", 1))
    assert channel.next() == PeerEnded("b", "it said Goodbye")
    channel.channel.connect(peer.peer)
    assert channel.next() == PeerEnded("b", "it said Goodbye")


def test_a_closing_channel_says_goodbye() -> None:
    a, b = Channel("a"), Channel("b")
    with channels(a):
        with channels(b):
            b.channel.expect(a.peer)
            a.channel.connect(b.peer)
            assert isinstance(a.next(), PeerUp)
        assert a.next() == PeerEnded("b", "it said Goodbye")


def test_a_refused_connection_proves_the_end(channel: Channel, raw: MakePeer) -> None:
    peer = raw("b", channel)
    peer.hello(channel.peer)
    assert channel.next() == PeerUp("b", SHARD, b"")
    peer.inbox.close(0)
    assert channel.next() == PeerEnded("b", "its endpoint refuses connections")


def test_another_worker_at_a_known_endpoint_proves_the_end(channel: Channel, raw: MakePeer) -> None:
    peer = raw("b", channel)
    peer.hello(channel.peer)
    channel.next()
    other = raw("c")
    channel.channel.expect(replace(other.peer, endpoint=peer.peer.endpoint))
    other.hello(channel.peer)
    assert channel.next() == PeerEnded("b", "worker c listens at its endpoint now")
    assert channel.next() == PeerUp("c", SHARD, b"")
    peer.hello(channel.peer)
    wait_until(lambda: channel.channel.dropped["hello of an ended worker"] == 1, "the dead stay dead")


def test_a_reply_of_another_worker_proves_the_end_of_the_one_asked_for() -> None:
    a, b = Channel("a"), Channel("b")
    with channels(a, b):
        a.channel.connect(replace(b.peer, uuid="before b"))
        told = [a.next(), a.next()]
        assert PeerUp("b", SHARD, b"memory of b") in told
        assert any(isinstance(news, PeerEnded) and news.uuid == "before b" for news in told)


def test_a_reply_that_nobody_asked_for_changes_nothing(channel: Channel, raw: MakePeer) -> None:
    peer = raw("b", channel)
    peer.say(channel.peer, HelloReply("b", KV, SHARD, b"forged"), Hello(peer.peer.endpoint, KV, SHARD, b"true"))
    assert channel.next() == PeerUp("b", SHARD, b"true")


# The probe -----------------------------------------------------------------------------------------------------------
def test_a_probe_tells_refusal_from_anything_else() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        assert probed(endpoint), "bound, and nobody listens"
        listening.listen()
        assert not probed(endpoint), "the kernel answers, even for a stopped process"
    assert probed(endpoint)


def probed(endpoint: str) -> bool:
    probe, pause, deadline = Probe.start(endpoint), threading.Event(), time.monotonic() + TIMEOUT_S
    while not probe.finished:
        assert time.monotonic() < deadline
        pause.wait(0.001)
    refused = probe.refused
    probe.close()
    return refused
