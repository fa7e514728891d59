"""The two ends over TCP, each with threads of its own: who gets in, what gets through, and that an end is noticed."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue

import msgspec
import pytest
import zmq

from splitserve.core.config import NodesSettings
from splitserve.core.errors import ConfigError, EngineError
from splitserve.core.worker import KvPeer
from splitserve.engine.nodes.channel import keys_of, prepare
from splitserve.engine.nodes.follower import FollowerEnd
from splitserve.engine.nodes.leader import LeaderEnd
from splitserve.engine.nodes.messages import Join, Over
from splitserve.kv.bridge import Connect, Free, FromConnector, ToConnector
from splitserve.kv.curve import Keys
from splitserve.kv.layout import part_of

ALIKE = {"model": "m 1", "engine.dtype": "float32"}
KEY = "a-key-of-this-fleets-workers"
WAIT_S = 30.0


@pytest.fixture
def settings() -> NodesSettings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return NodesSettings(count=2, leader="127.0.0.1", port=port, wait_s=WAIT_S)


def leader_of(settings: NodesSettings, keys: Keys | None = None, **changes: object) -> LeaderEnd:
    return LeaderEnd(settings.model_copy(update=changes), "uuid", ALIKE, keys)


def follower_of(settings: NodesSettings, keys: Keys | None = None, **changes: object) -> FollowerEnd:
    return FollowerEnd(settings.model_copy(update={"rank": 1, **changes}), "127.0.0.2", ALIKE, keys)


@contextmanager
def both(settings: NodesSettings, keys: Keys | None = None) -> Iterator[tuple[LeaderEnd, FollowerEnd]]:
    """A worker of two nodes that has begun."""
    with leader_of(settings, keys) as leader, follower_of(settings, keys) as follower:
        assert leader.wait_for_all()
        assert follower.join() == "uuid"
        yield leader, follower


def waits(end: LeaderEnd | FollowerEnd, text: str) -> None:
    """Until it says so."""
    until = time.monotonic() + WAIT_S
    while text not in end.waits:
        assert time.monotonic() < until, f"{text!r} is not in {end.waits!r}"
        time.sleep(0.01)


@pytest.mark.parametrize("keys", [None, keys_of(KEY)], ids=["in the clear", "with a key"])
def test_a_worker_begins_when_all_its_nodes_have_joined(settings: NodesSettings, keys: Keys | None) -> None:
    with leader_of(settings, keys, count=3) as leader, follower_of(settings, keys, count=3) as first:
        waits(leader, "node 2 has not joined")
        waits(first, "it waits for node 2 too")
        with follower_of(settings, keys, count=3, rank=2) as second:
            assert leader.wait_for_all()
            assert {first.join(), second.join()} == {"uuid"}
            assert leader.waits == first.waits == second.waits == ""


@pytest.mark.parametrize("keys", [None, keys_of(KEY)], ids=["in the clear", "with a key"])
def test_what_connectors_say_goes_to_the_leader_and_what_it_says_to_them(
    settings: NodesSettings, keys: Keys | None
) -> None:
    heard: SimpleQueue[FromConnector] = SimpleQueue()
    told: SimpleQueue[ToConnector] = SimpleQueue()
    peer = KvPeer("other/0", "tcp://127.0.0.1:1", part_of(0, 1, 2, 0, 4), "key")
    with both(settings, keys) as (leader, follower):
        leader.listen(heard.put, lambda lost: None)
        follower.listen(told.put)
        for blocks in range(100):
            follower.tell(Free(blocks))
        leader.tell(Connect([peer]))
        assert [heard.get(timeout=WAIT_S) for _ in range(100)] == [Free(blocks) for blocks in range(100)]
        assert told.get(timeout=WAIT_S) == Connect([peer])


def test_a_node_whose_settings_differ_is_refused_and_the_leader_says_so(settings: NodesSettings) -> None:
    with leader_of(settings) as leader:
        end = FollowerEnd(settings.model_copy(update={"rank": 1}), "h", ALIKE | {"engine.dtype": "auto"}, None)
        with end, pytest.raises(ConfigError, match=r"engine.dtype: it is auto on node 1 and float32 on node 0"):
            end.join()
        waits(leader, "node 1 (h) was refused: engine.dtype")
        with follower_of(settings) as better:
            assert better.join() == "uuid"


@pytest.mark.parametrize("theirs", [None, keys_of("a-key-of-somebody-else")], ids=["no key", "another key"])
def test_a_stranger_does_not_get_in_nor_keeps_others_out(settings: NodesSettings, theirs: Keys | None) -> None:
    with leader_of(settings, keys_of(KEY)) as leader:
        with follower_of(settings, theirs, wait_s=2.0) as stranger, pytest.raises(EngineError, match="has not begun"):
            stranger.join()
        assert leader.waits == "node 1 has not joined"
        with follower_of(settings, keys_of(KEY)) as node:
            assert node.join() == "uuid"


def test_a_node_with_another_key_hears_why_it_waits(settings: NodesSettings) -> None:
    with leader_of(settings, keys_of(KEY)), follower_of(settings, keys_of("a-key-of-somebody-else")) as stranger:
        waits(stranger, "breaks the handshake off: this node's API key must be the leader's")


def test_garbage_is_dropped(settings: NodesSettings) -> None:
    with leader_of(settings) as leader, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        prepare(stranger, None, listens=False)
        stranger.connect(f"tcp://127.0.0.1:{settings.port}")
        for frame in (b"", b"\x00\xff", msgspec.msgpack.encode({"type": "join", "node": "one"}), b"\xc1" * 1000):
            stranger.send(frame)
        stranger.send_multipart([b"", b"x", msgspec.msgpack.encode(Free(1))])
        stranger.send(msgspec.msgpack.encode(Free(1)))  # by who has not joined
        with follower_of(settings) as node:
            assert node.join() == "uuid"
        assert leader.lost_within(WAIT_S)


def test_a_node_that_ends_is_missed_at_once_and_named(settings: NodesSettings) -> None:
    lost: SimpleQueue[str] = SimpleQueue()
    with both(settings) as (leader, follower):
        leader.listen(lambda message: None, lost.put)
        follower.close()
        sentence = "node 1 (127.0.0.2) is gone: its connection ended; a worker's nodes end together"
        assert lost.get(timeout=WAIT_S) == sentence
        assert leader.lost_within(0) == sentence


def test_a_loss_before_anybody_listened_is_told_then(settings: NodesSettings) -> None:
    lost: SimpleQueue[str] = SimpleQueue()
    with both(settings) as (leader, follower):
        follower.broke("vLLM could not start: RuntimeError: no device")
        assert leader.lost_within(WAIT_S)
        leader.listen(lambda message: None, lost.put)
        assert lost.get(timeout=WAIT_S).startswith("node 1 (127.0.0.2): vLLM could not start: RuntimeError: no device")


def test_a_node_that_says_nothing_more_is_missed(settings: NodesSettings) -> None:
    """Its machine is gone: no connection ends."""
    with leader_of(settings, silent_s=1.5) as leader, zmq.Context() as context, context.socket(zmq.DEALER) as node:
        prepare(node, None, listens=False)
        node.connect(f"tcp://127.0.0.1:{settings.port}")
        node.send(msgspec.msgpack.encode(Join(1, "process", "far", ALIKE)))
        assert leader.wait_for_all()
        assert leader.lost_within(WAIT_S).startswith("node 1 (far) is gone: it has said nothing for 1.5 s")


@pytest.mark.parametrize("failure", ["", "its engine broke"])
def test_nodes_hear_how_their_worker_ended(settings: NodesSettings, failure: str) -> None:
    with both(settings) as (leader, follower):
        leader.close(failure)
        over = follower.over_within(WAIT_S)
    assert over == Over(f"the worker ends: {failure or 'its leader ended'}", bool(failure))


def test_nodes_that_have_much_to_say_hear_it_too(settings: NodesSettings) -> None:
    """What the leader has not read when it closes the connection would undo what it has just sent."""
    with both(settings) as (leader, follower):
        said = threading.Event()

        def say() -> None:
            while follower.over_within(0) is None:
                follower.tell(Free(1))
                said.set()
                time.sleep(0.0005)

        telling = threading.Thread(target=say)
        telling.start()
        assert said.wait(WAIT_S)
        leader.close()
        over = follower.over_within(WAIT_S)
        telling.join(WAIT_S)
    assert over == Over("the worker ends: its leader ended", False)


def test_nodes_hear_that_their_leader_is_gone(settings: NodesSettings) -> None:
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        leader = stack.enter_context(context.socket(zmq.ROUTER))
        leader.bind(f"tcp://127.0.0.1:{settings.port}")
        follower = stack.enter_context(follower_of(settings))
        identity, _ = leader.recv_multipart()
        leader.send_multipart([identity, msgspec.msgpack.encode({"type": "welcome", "uuid": "uuid"})])
        assert follower.join() == "uuid"
        leader.close(0)
        over = follower.over_within(WAIT_S)
    assert over is not None
    assert over.failed
    assert over.reason == f"the leader at 127.0.0.1:{settings.port} is gone: its connection ended"


def test_a_node_that_was_told_to_end_asks_the_leader_to_drain(settings: NodesSettings) -> None:
    asked = threading.Event()
    with both(settings) as (leader, follower):
        leader.on_leaving(asked.set)
        follower.leave()
        assert asked.wait(WAIT_S)
        assert leader.lost_within(0) == ""


def test_waiting_has_a_bound_and_says_for_whom(settings: NodesSettings) -> None:
    sentence = "not all of the worker's nodes came within 0.2 s: node 1 has not joined"
    with leader_of(settings, wait_s=0.2) as leader, pytest.raises(EngineError, match=sentence):
        leader.wait_for_all()
    sentence = f"the leader is to be at 127.0.0.1:{settings.port}: it has not been reached yet, and has not begun"
    with follower_of(settings, wait_s=0.2) as follower, pytest.raises(EngineError, match=sentence):
        follower.join()


def test_a_leader_that_is_told_to_end_waits_no_longer(settings: NodesSettings) -> None:
    with leader_of(settings) as leader:
        threading.Timer(0.1, leader.close).start()
        assert not leader.wait_for_all()


def test_a_leader_says_what_keeps_it_from_listening(settings: NodesSettings) -> None:
    taken = socket.create_server(("127.0.0.1", settings.port))
    with taken, leader_of(settings) as leader, pytest.raises(ConfigError, match=r"nodes.port: .*choose another"):
        leader.wait_for_all()
    with leader_of(settings, leader="192.0.2.1") as leader, pytest.raises(ConfigError, match="this is node 0"):
        leader.wait_for_all()
    with leader_of(settings, leader="0.0.0.0") as leader, pytest.raises(ConfigError, match="no address that peers"):
        leader.wait_for_all()


def test_a_name_that_is_not_known_yet_is_waited_for(settings: NodesSettings) -> None:
    """As a pod's is when it starts."""
    with leader_of(settings, leader="no-such-host.invalid") as leader, follower_of(settings) as follower:
        waits(leader, "can't resolve 'no-such-host.invalid'")
        waits(follower, "it has not been reached yet")
