"""Two processes with a paged KV cache each, of which one writes into the other's: the parts of `benchmarks/gpu/push`.

The destination is a child. It only helps the transport along and compares, when asked, every byte of its cache with
what should be there. One thread of each process owns its NIXL agent.
"""

import multiprocessing
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.gpu.push.paced_prefill import ModelShape, content, differing_bytes
from splitserve.core.worker import KvFormat, KvMode, KvPart
from splitserve.kv.layout import Shard, Slice, slice_between
from splitserve.kv.nixl import NixlTransport
from splitserve.kv.transport import Fence, Region, TransportError, WriteState

PEER = "destination"
SPARE_BLOCKS = 16  # of each cache, which nobody may touch
ANSWER_TIMEOUT_S = 120.0
PUSH_TIMEOUT_S = 60.0
POLL_S = 0.0002  # as the transfer service polls
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Limits:
    """As `kv_transfer.write_mib` and `link_in_flight_mib`."""

    write_bytes: int = 8 * MIB
    in_flight_bytes: int = 64 * MIB


@dataclass(frozen=True, slots=True)
class Pushed:
    """Times on the monotonic clock. `computed_at`: when the last layer was seen to be computed."""

    computed_at: float
    written_at: float
    writes: int


class Source:
    """The process that writes. `cache[l]` is layer l as (block, element)."""

    def __init__(self, shape: ModelShape, blocks: int, device: str, limits: Limits) -> None:
        self.cache = a_cache(shape, blocks, device)
        self._transport = a_transport("source", self.cache)
        self._shape = shape
        self._limits = limits

    def connect(self, address: bytes) -> None:
        self._transport.connect(PEER, address, whole(self._shape))

    def push(self, computed: "deque[tuple[int, Fence]]", source: Sequence[int], destination: Sequence[int]) -> Pushed:
        """Writes each layer of these blocks once its fence is passed. `computed` fills meanwhile."""
        per_write = max(1, self._limits.write_bytes // self._shape.block_bytes)
        due: deque[tuple[int, int]] = deque()  # layer, first block's place in the tables
        writing: list[tuple[object, int]] = []
        layers = writes = 0
        computed_at, give_up_at = 0.0, time.monotonic() + PUSH_TIMEOUT_S
        while layers < self._shape.layers or due or writing:
            while computed and computed[0][1]():
                layer, _ = computed.popleft()
                layers, computed_at = layers + 1, time.monotonic()
                due.extend((layer, place) for place in range(0, len(source), per_write))
            while due and sum(size for _, size in writing) < self._limits.in_flight_bytes:
                layer, place = due.popleft()
                ids = slice(place, place + per_write)
                handle = self._transport.write(PEER, layer, source[ids], destination[ids])
                writing.append((handle, len(source[ids]) * self._shape.block_bytes))
                writes += 1
            writing = [write for write in writing if not self._ended(write[0])]
            if time.monotonic() > give_up_at:
                raise TransportError(f"{layers} layers computed, {len(writing)} WRITEs in flight: stuck")
            time.sleep(POLL_S)
        return Pushed(computed_at, time.monotonic(), writes)

    def close(self) -> None:
        self._transport.close()

    def _ended(self, handle: object) -> bool:
        state = self._transport.poll(handle)
        if state is WriteState.FAILED:
            raise TransportError("a WRITE failed")
        return state is WriteState.DONE


class Destination:
    """The other process, seen from this one."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.address: bytes = self._answer()

    def clear(self) -> None:
        self._ask("clear")

    def wrong_bytes(self, table: Sequence[int]) -> int:
        """Of its whole cache, if the prompt's blocks should be in these and nothing in any other."""
        wrong: int = self._ask("wrong_bytes", list(table))
        return wrong

    def _ask(self, name: str, *arguments: object) -> Any:
        self._pipe.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(ANSWER_TIMEOUT_S):
            raise TransportError(f"the other process did not answer within {ANSWER_TIMEOUT_S:.0f} s")
        answer = self._pipe.recv()
        if isinstance(answer, TransportError):
            raise answer
        return answer


@contextmanager
def destination(shape: ModelShape, blocks: int, device: str) -> Iterator[Destination]:
    """Runs the child; it ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs, shape, blocks, device), daemon=True)
    child.start()
    theirs.close()
    try:
        yield Destination(ours)
        ours.send(("close", ()))
        child.join(ANSWER_TIMEOUT_S)
    finally:
        child.kill()
        child.join()
        ours.close()


class _Served:
    """What the child does when asked."""

    def __init__(self, shape: ModelShape, blocks: int, device: str) -> None:
        self._shape = shape
        self._cache = a_cache(shape, blocks, device)
        self.transport = a_transport(PEER, self._cache)

    def clear(self) -> None:
        self._cache.zero_()
        _synchronise(self._cache)

    def wrong_bytes(self, table: Sequence[int]) -> int:
        blocks = torch.tensor(table, device=self._cache.device)
        wrong = 0
        for layer in range(self._shape.layers):
            expected = torch.zeros_like(self._cache[layer])
            expected[blocks] = content(self._shape, layer, len(table), str(self._cache.device))
            wrong += differing_bytes(self._cache[layer], expected)
        return wrong


def _serve(pipe: Connection, shape: ModelShape, blocks: int, device: str) -> None:
    torch.set_num_threads(1)
    try:
        served = _Served(shape, blocks, device)
    except TransportError as error:
        pipe.send(error)
        return
    pipe.send(served.transport.address)
    while True:
        while not pipe.poll(POLL_S):
            served.transport.progress()
        name, arguments = pipe.recv()
        if name == "close":
            served.transport.close()
            return
        pipe.send(getattr(served, name)(*arguments))


def a_cache(shape: ModelShape, blocks: int, device: str) -> torch.Tensor:
    """Zeros, (layer, block, element of two bytes), with the spare blocks at the end."""
    size = (shape.layers, blocks + SPARE_BLOCKS, shape.block_elements)
    cache = torch.zeros(size, dtype=torch.int16, device=device)
    _synchronise(cache)
    return cache


def a_transport(uuid: str, cache: torch.Tensor) -> NixlTransport:
    """With the cache registered. Raises TransportError, with what NIXL says, when it can't be."""
    regions = [
        Region(layer.data_ptr(), layer.stride(0) * layer.itemsize, layer[0].nbytes, len(layer)) for layer in cache
    ]
    memory_type, device = ("VRAM", cache.get_device()) if cache.is_cuda else ("DRAM", 0)
    return NixlTransport(uuid, regions, [(cache.data_ptr(), cache.nbytes)], memory_type, device)


def whole(shape: ModelShape) -> Slice:
    """All of one rank's blocks, for a rank of the same kind."""
    shard = Shard(KvPart(0, shape.layers, 0, shape.kv_heads), shape.block_size, (0,) * shape.layers)
    kv = KvFormat(
        model_fingerprint="random",
        dtype="bfloat16",
        block_size=shape.block_size,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        block_bytes=shape.block_bytes,
        mode=KvMode.PUSH,
        transport="nixl",
    )
    cut = slice_between(shard, shard, kv)
    assert cut is not None
    return cut


def _synchronise(cache: torch.Tensor) -> None:
    if cache.is_cuda:
        torch.cuda.synchronize(cache.device)
