"""Frames: what goes in comes out, what is malformed is named and nothing else."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.versions import Versions
from splitserve.core.worker import KvFormat, KvMode, KvPart, TransferStats
from splitserve.kv.layout import Shard
from splitserve.kv.messages import (
    MAX_MESSAGE_BYTES,
    SPOKEN,
    Cancel,
    Cancelled,
    Codec,
    Done,
    Failed,
    Goodbye,
    GroupTable,
    Hello,
    HelloReply,
    Malformed,
    Message,
    Ping,
    Pong,
    Progress,
    Register,
    version_difference,
)

KV = KvFormat("abc", "float32", 16, 4, 2, 8, 2048, KvMode.PUSH, "shm")
SHARD = Shard(KvPart(2, 2, 1, 1, tensor_rank=1, replica=0, replicas=1), 16, (0, 1))
MESSAGES: list[Message] = [
    Hello("tcp://127.0.0.1:5000", KV, SHARD, b"address"),
    Hello("tcp://[::1]:5000", KV, SHARD, b""),
    HelloReply("b", KV, SHARD, b"address", "kv.dtype is ..."),
    Register("t", 1, b"h" * 16, 60, (GroupTable(2, (5, 6)), GroupTable(3, (7,))), 3.5),
    Progress("t", 1, 7),
    Done("t", 1, TransferStats(1, 2, -0.5, 3, 0.25, 0.125)),
    Failed("t", 1, "write", "sentence"),
    Cancel("t", 1),
    Cancelled("t", 1),
    Ping(),
    Pong(),
    Goodbye(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert Codec("b").decode(Codec("a").encode("b", message)) == ("a", "b", message)


def test_every_kind_of_message_is_covered_above() -> None:
    assert {type(message) for message in MESSAGES} == set(Message.__args__)


_BUILTINS = (msgspec.to_builtins(KV), msgspec.to_builtins(SHARD))


def _kind(frame: bytes) -> str:
    with pytest.raises(Malformed) as caught:
        Codec("b").decode(frame)
    return caught.value.kind


def _frame(body: object, version: int = SPOKEN.highest) -> bytes:
    return msgspec.msgpack.encode([version, "a", "b", body])


def test_another_version_is_named_even_if_its_body_is_unknown() -> None:
    assert _kind(_frame(["brand new", 1], version=SPOKEN.highest + 1)) == "version"


def test_every_version_that_is_spoken_is_read_and_the_one_that_is_said_is_written() -> None:
    both, old, new = Codec("b", Versions(2, 3)), Codec("a", Versions(2, 2)), Codec("a", Versions(3, 4))
    assert both.decode(old.encode("b", Ping())) == ("a", "b", Ping())
    assert both.decode(new.encode("b", Ping(), 3)) == ("a", "b", Ping())
    assert old.decode(both.encode("a", Ping(), 2)) == ("b", "a", Ping())
    with pytest.raises(Malformed, match="version"):
        both.decode(new.encode("b", Ping(), 4))
    with pytest.raises(Malformed, match="version"):
        old.decode(both.encode("a", Ping()))


@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        (Versions(2, 3), Versions(3, 4), ""),
        (Versions(2, 2), Versions(3, 4), "of version 2 here and 3 to 4 there; upgrade the worker here"),
        (Versions(4, 5), Versions(2, 3), "of version 4 to 5 here and 2 to 3 there; upgrade the worker there"),
    ],
)
def test_workers_without_a_common_version_are_told_which_to_upgrade(
    ours: Versions, theirs: Versions, sentence: str
) -> None:
    said = version_difference(ours, theirs)
    assert sentence in said
    assert bool(said) == bool(sentence)


def test_a_hello_of_before_ranges_were_said_is_read_as_of_version_2() -> None:
    """And one that says its range is read by whoever knows nothing of ranges."""
    said = msgspec.msgpack.decode(Codec("a").encode("b", Hello("tcp://127.0.0.1:80", KV, SHARD, b"", Versions(2, 3))))
    *before, _ = said[3]
    _, _, hello = Codec("b").decode(_frame(before))
    assert isinstance(hello, Hello)
    assert hello.control == Versions(2, 2)
    older = msgspec.defstruct("hello", [("endpoint", str), ("kv", dict)], array_like=True, tag="hello")
    assert msgspec.to_builtins(msgspec.convert(said[3], older))[1] == "tcp://127.0.0.1:80"


def test_an_unknown_message_is_malformed() -> None:
    assert _kind(_frame(["teleport", 1])) == "malformed"


@pytest.mark.parametrize(
    "body",
    [
        ["register", "t", 1, b"short", 16, [[0, [1]]], 1.0],
        ["register", "t", -1, b"h" * 16, 16, [[0, [1]]], 1.0],
        ["register", "t", 1, b"h" * 16, -1, [[0, [1]]], 1.0],
        ["register", "t", 1, b"h" * 16, 16, [[0, [-1]]], 1.0],
        ["register", "t", 1, b"h" * 16, 16, [[0, [2**31]]], 1.0],
        ["register", "t", 1, b"h" * 16, 16, [[-1, [1]]], 1.0],
        ["register", "t", 1, b"h" * 16, 16, [[0, [1]]] * 257, 1.0],
        ["register", "", 1, b"h" * 16, 16, [[0, [1]]], 1.0],
        ["register", "t" * 300, 1, b"h" * 16, 16, [[0, [1]]], 1.0],
        ["hello", "tcp://somewhere.example:80", *_BUILTINS, b""],
        ["hello", "ipc:///tmp/socket", *_BUILTINS, b""],
        ["done", "t", 1],
    ],
)
def test_a_field_out_of_bounds_is_malformed(body: object) -> None:
    assert _kind(_frame(body)) == "malformed"


@pytest.mark.parametrize(
    "body",
    [
        ["register", "t", 1, b"h" * 16, 16, [[0, [1]]], 1.0],
        ["hello", "tcp://127.0.0.1:80", *_BUILTINS, b""],
    ],
)
def test_the_same_bodies_within_bounds_are_read(body: object) -> None:
    """The negative twin of the test above: each of its bodies fails by the one field that is wrong."""
    assert Codec("b").decode(_frame(body))[0] == "a"


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    assert _kind(b"\x00" * (MAX_MESSAGE_BYTES + 1)) == "oversized"


def test_an_oversized_message_is_never_made() -> None:
    with pytest.raises(Malformed, match="oversized"):
        Codec("a").encode("b", Hello("tcp://127.0.0.1:1", KV, SHARD, b"x" * MAX_MESSAGE_BYTES))


@given(st.binary(max_size=300))
def test_noise_is_malformed_and_nothing_worse(noise: bytes) -> None:
    assert _kind(noise) in ("malformed", "version")


@given(st.data(), st.sampled_from(MESSAGES))
def test_a_damaged_frame_is_read_or_malformed_and_nothing_worse(data: st.DataObject, message: Message) -> None:
    frame = bytearray(Codec("a").encode("b", message))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    del frame[data.draw(st.integers(0, len(frame))) :]
    try:
        sender, _, read = Codec("b").decode(bytes(frame))
    except Malformed:
        return
    assert isinstance(sender, str)
    assert isinstance(read, Message)
