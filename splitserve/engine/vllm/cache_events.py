"""What vLLM publishes of its prefix cache, as the worker passes it on: one thread that listens and translates.

vLLM's scheduler numbers its batches and keeps the last ones for whoever missed some; both sockets are in the engine's
private directory. A gap is filled from those, or all is said to be cleared, which is true of what is known then. Only
blocks of full attention on the engine's own device count: those alone say whether a prompt's beginning is found.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import zmq

from splitserve.core.cached import CacheEvent, Cleared, Extra, Removed, Stored
from splitserve.core.config import VllmSettings

REPLAY_TIMEOUT_S = 1.0
BUFFER_STEPS = 1000
REPORT_HITS = {"kv_cache_report_mode": "full"}  # of `extra_args`: vLLM also publishes what a request found cached
_POLL_MS = 100
_SIXTY_FOUR_BITS = (1 << 64) - 1
_ON_DEVICE = ("GPU", None)

_Hash = int | bytes


class _Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[_Hash]
    parent_block_hash: _Hash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    locality: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[_Hash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]
    data_parallel_rank: int | None = None


def follows_cache(settings: VllmSettings) -> bool:
    """Whether vLLM is to publish what becomes of its prefix cache: not if there is none, or the user has it published
    elsewhere."""
    return settings.enable_prefix_caching and "kv_events_config" not in settings.extra


class CacheListener:
    """Calls `on_cached` from its own thread, from `start` until `close`. `publisher` and `replayer` are addresses of
    the kind ipc, which vLLM binds."""

    def __init__(self, publisher: str, replayer: str, on_cached: Callable[[Sequence[CacheEvent]], None]) -> None:
        self._publisher = publisher
        self._replayer = replayer
        self._on_cached = on_cached
        self._decoder = msgspec.msgpack.Decoder(_Batch)
        self._expected = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache-listener", daemon=True)

    def config(self) -> Any:
        """What makes vLLM publish: a KVEventsConfig."""
        from vllm.config import KVEventsConfig

        return KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=self._publisher,
            replay_endpoint=self._replayer,
            buffer_steps=BUFFER_STEPS,
        )

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.SUB) as socket:
            socket.linger = 0
            socket.subscribe(b"")
            socket.connect(self._publisher)
            while not self._closing.is_set():
                if socket.poll(_POLL_MS):
                    _, number, payload = socket.recv_multipart()
                    self._hear(int.from_bytes(number, "big"), payload, context)

    def _hear(self, number: int, payload: bytes, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        if number > self._expected:
            for missed, frame in self._replay(context, number):
                self._take(missed, frame)
        if number > self._expected:
            self._expected = number
            self._on_cached((Cleared(),))
        self._take(number, payload)

    def _take(self, number: int, payload: bytes) -> None:
        """If it is the next one."""
        if number != self._expected:
            return
        self._expected += 1
        events = tuple(_meant(self._decoder.decode(payload).events))
        if events:
            self._on_cached(events)

    def _replay(self, context: "zmq.Context[zmq.Socket[bytes]]", before: int) -> Iterator[tuple[int, bytes]]:
        """Those of the missing batches that vLLM still has."""
        until = time.monotonic() + REPLAY_TIMEOUT_S
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(self._replayer)
            socket.send_multipart([b"", self._expected.to_bytes(8, "big")])
            while socket.poll(max(0, int(1000 * (until - time.monotonic())))):
                *_, number_bytes, payload = socket.recv_multipart()
                number = int.from_bytes(number_bytes, "big", signed=True)
                if not 0 <= number < before:
                    return
                yield number, payload


def _meant(events: Iterable[_Stored | _Removed | _Cleared]) -> Iterator[CacheEvent]:
    for event in events:
        if isinstance(event, _Cleared):
            yield Cleared()
        elif event.medium not in _ON_DEVICE or event.group_idx or event.locality == "REMOTE":
            continue
        elif isinstance(event, _Removed):
            yield Removed(_hashes(event.block_hashes))
        else:
            parent = None if event.parent_block_hash is None else _hash(event.parent_block_hash)
            extras = () if not any(event.extra_keys or ()) else tuple(map(_extra, event.extra_keys or ()))
            yield Stored(_hashes(event.block_hashes), parent, event.token_ids, event.block_size, extras)


def _extra(keys: tuple[Any, ...] | None) -> Extra:
    return tuple(key if isinstance(key, str) else repr(key) for key in keys) if keys else None


def _hashes(blocks: Iterable[_Hash]) -> tuple[int, ...]:
    return tuple(map(_hash, blocks))


def _hash(block: _Hash) -> int:
    """As vLLM itself shortens them."""
    return (block if isinstance(block, int) else int.from_bytes(block, "big")) & _SIXTY_FOUR_BITS
