"""What vLLM publishes of its prefix cache. The publisher here speaks as vLLM's does, over the same sockets."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from splitserve.core.cached import CacheEvent, Cleared, Removed, Stored
from splitserve.core.config import VllmSettings
from splitserve.engine.vllm.cache_events import CacheListener, follows_cache

TIMEOUT_S = 20.0


def stored(*hashes: int | bytes, parent: int | bytes | None = None, **others: Any) -> dict[str, Any]:
    tokens = list(range(2 * len(hashes)))
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens}
    return event | {"block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None} | others


def removed(*hashes: int | bytes, **others: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"} | others


class Publisher:
    """Sends what a test says, whoever listens, and again who asks for it; `keeps` of the last batches."""

    def __init__(self, directory: Path, keeps: int) -> None:
        self.addresses = f"ipc://{directory / 'a'}", f"ipc://{directory / 'b'}"
        self.heard: queue.SimpleQueue[Sequence[CacheEvent]] = queue.SimpleQueue()
        self._keeps = keeps
        self._sent: list[bytes] = []
        self._closing = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.bind(self.addresses[0])
        self._replays = self._context.socket(zmq.ROUTER)
        self._replays.bind(self.addresses[1])
        self._thread = threading.Thread(target=self._replay)
        self._thread.start()

    def publish(self, *events: dict[str, Any], lost: bool = False) -> None:
        number = len(self._sent)
        self._sent.append(msgspec.msgpack.encode([0.5, events, 0]))
        if not lost:
            self._socket.send_multipart([b"", number.to_bytes(8, "big"), self._sent[-1]])

    def wait_for_subscriber(self) -> None:
        assert self._socket.poll(int(TIMEOUT_S * 1000))
        assert self._socket.recv() == b"\x01"

    def next(self) -> Sequence[CacheEvent]:
        return self.heard.get(timeout=TIMEOUT_S)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _replay(self) -> None:
        while not self._closing.is_set():
            if self._replays.poll(10):
                who, empty, first = self._replays.recv_multipart()
                kept = range(max(int.from_bytes(first, "big"), len(self._sent) - self._keeps), len(self._sent))
                for number in kept:
                    self._replays.send_multipart([who, empty, b"", number.to_bytes(8, "big"), self._sent[number]])
                self._replays.send_multipart([who, empty, b"", (-1).to_bytes(8, "big", signed=True), b""])


@contextmanager
def listened_to(directory: Path, keeps: int = 100) -> Iterator[Publisher]:
    publisher = Publisher(directory, keeps)
    listener = CacheListener(*publisher.addresses, publisher.heard.put)
    listener.start()
    try:
        publisher.wait_for_subscriber()
        yield publisher
    finally:
        listener.close()
        publisher.close()


def test_what_is_published_is_passed_on_in_order(tmp_path: Path) -> None:
    with listened_to(tmp_path) as publisher:
        publisher.publish(stored(1, 2), stored(3, parent=2))
        publisher.publish(removed(3), {"type": "AllBlocksCleared"})
        assert publisher.next() == (Stored((1, 2), None, [0, 1, 2, 3], 2), Stored((3,), 2, [0, 1], 2))
        assert publisher.next() == (Removed((3,)), Cleared())


def test_a_hash_keeps_its_last_64_bits(tmp_path: Path) -> None:
    with listened_to(tmp_path) as publisher:
        publisher.publish(stored(b"\x01" + bytes(23) + b"\x07" + bytes(7), parent=b"\x05"), removed(b"\x05"))
        assert publisher.next() == (Stored((7 << 56,), 5, [0, 1], 2), Removed((5,)))


def test_what_else_keys_a_block_goes_along(tmp_path: Path) -> None:
    with listened_to(tmp_path) as publisher:
        publisher.publish(stored(1, 2, extra_keys=[("adapter", "salt"), None]), stored(3, extra_keys=[None]))
        publisher.publish(stored(1, extra_keys=[[["image", 3]]]))
        said, plain = publisher.next()
        assert isinstance(said, Stored)
        assert said.extras == (("adapter", "salt"), None)
        assert isinstance(plain, Stored)
        assert plain.extras == ()
        (pictured,) = publisher.next()
        assert isinstance(pictured, Stored)
        assert pictured.extras[0] is not None


@pytest.mark.parametrize("elsewhere", [{"medium": "CPU"}, {"group_idx": 1}, {"locality": "REMOTE"}])
def test_blocks_that_are_elsewhere_do_not_count(tmp_path: Path, elsewhere: dict[str, Any]) -> None:
    with listened_to(tmp_path) as publisher:
        publisher.publish(stored(1, **elsewhere), removed(1, **elsewhere), stored(2, group_idx=0))
        assert publisher.next() == (Stored((2,), None, [0, 1], 2),)


def test_what_was_missed_is_asked_for(tmp_path: Path) -> None:
    with listened_to(tmp_path) as publisher:
        publisher.publish(stored(1), lost=True)
        publisher.publish(stored(2), lost=True)
        publisher.publish(stored(3))
        publisher.publish(stored(4))
        hashes = [event.hashes for _ in range(4) for event in publisher.next() if isinstance(event, Stored)]
        assert hashes == [(1,), (2,), (3,), (4,)]


def test_what_can_not_be_had_any_more_makes_all_before_it_unknown(tmp_path: Path) -> None:
    with listened_to(tmp_path, keeps=2) as publisher:
        publisher.publish(stored(1))
        assert len(publisher.next()) == 1
        for number in (2, 3, 4):
            publisher.publish(stored(number), lost=True)
        publisher.publish(stored(5))
        assert publisher.next() == (Cleared(),)
        assert publisher.next() == (Stored((5,), None, [0, 1], 2),)


def test_a_cache_that_is_off_or_followed_by_somebody_else_is_not_followed() -> None:
    assert follows_cache(VllmSettings())
    assert not follows_cache(VllmSettings(enable_prefix_caching=False))
    assert not follows_cache(VllmSettings(extra={"kv_events_config": {"publisher": "zmq"}}))
