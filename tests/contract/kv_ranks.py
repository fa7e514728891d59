"""Ranks in processes of their own, each with a real transfer service over a real transport; driven through pipes.

A process is started once and may be rank after rank: `begin` makes its service, `end` closes it. What a rank computes
and what it has received is `blocks.Prompt`'s, made from the same number in whatever process asks, so that checksums of
it can be compared.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat, KvPeer, rank_uuid
from splitserve.kv.layout import Shard, blocks_for, prompt_hash
from splitserve.kv.shm import ShmTransport
from splitserve.kv.transfer import Claim, Offer, Results, Table, TransferEnded, TransferKey, TransferService
from splitserve.kv.transport import Transport
from tests.contract.kv_endpoints import memory_of_shm, regions_of
from tests.unit.kv.blocks import GROUPS, Prompt
from tests.unit.kv.numbered import Array, Shape, due, format_of, place, there

SLOT, BLOCKS = 64, 64  # bytes of one token of one head of one layer; blocks of a rank
SETTINGS = KvTransferSettings(peer_silent_s=1.0, lease_s=60.0)
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """Tokens of a prompt in a rank's blocks: group g has those of `tokens[g]` in `tables[g]`, numbered from block 0."""

    tables: tuple[tuple[int, ...], ...]
    tokens: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Which prompt: `Prompt.of` makes it."""

    number: int
    tokens: int
    layers: int
    heads: int

    def prompt(self) -> Prompt:
        return Prompt.of(self.number, self.tokens, self.layers, self.heads, SLOT)


def checksum(layers: Iterable[Array]) -> bytes:
    summed = blake2b(digest_size=16)
    for layer in layers:
        summed.update(np.ascontiguousarray(layer).tobytes())
    return summed.digest()


# The child -----------------------------------------------------------------------------------------------------------
class Server:
    """What the pipe calls by name, besides the service's own methods."""

    def __init__(self) -> None:
        self.service: TransferService | None = None
        self.memory: Array = np.zeros(0)
        self.events: list[TransferEnded] = []
        self.told = Results()

    def begin(self, kind: str, uuid: str, kv: KvFormat, shard: Shard, settings: KvTransferSettings) -> KvPeer:
        self.events, self.told, self.shard = [], Results(), shard
        self.service = TransferService(uuid, lambda: self._make(kind, uuid), kv, shard, settings, self.events.append)
        return self.service.start()

    def end(self) -> None:
        if self.service is not None:
            self.service.close()
            self.service = None

    def place(self, read: Read, where: Place, only: int | None = None) -> None:
        """Computes these tokens, or their KV in one layer."""
        for group, tokens in enumerate(where.tokens):
            part = [table if number == group else () for number, table in enumerate(where.tables)]
            layers = [layer for layer, owner in enumerate(self.shard.groups) if owner == group]
            for layer in layers if only is None else [only] if only in layers else []:
                place(self.memory, self.shard, part, read.prompt().kv, tokens, layer)

    def wipe(self, blocks: Sequence[int]) -> None:
        self.memory[:, list(blocks)] = 0

    def checksum(self, where: Place) -> bytes:
        return checksum(there(self.memory, self.shard, where.tables, where.tokens))

    def touched(self) -> list[int]:
        """Blocks that are not empty."""
        return [block for block in range(BLOCKS) if self.memory[:, block].any()]

    def wait_for(self, name: str, key: TransferKey) -> str:
        """Until the engine is told so. Answers what was told instead after a while, empty if all went well."""
        pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S / 2
        while key not in getattr(self.collect(), name):
            if time.monotonic() > deadline:
                return f"{key} is not {name}: {self.told}, {self.events}, {self._service.counters}"
            pause.wait(0.001)
        return ""

    def collect(self) -> Results:
        new = self._service.take_results()
        for name in ("received", "failed", "released", "sent"):
            getattr(self.told, name).extend(getattr(new, name))
        return self.told

    def errors(self, key: TransferKey, source_side: bool) -> list[str]:
        return [event.error for event in self.events if (event.key, event.source_side) == (key, source_side)]

    def rests(self) -> bool:
        """Nothing is owed to its engine, and nothing of its is kept."""
        self.collect()
        service = self._service
        kept = service.pinned_blocks or service.quarantined_blocks or service.in_flight_bytes
        return not (service.busy or kept)

    @property
    def connected(self) -> frozenset[str]:
        return self._service.connected

    def call(self, name: str, args: Sequence[Any]) -> Any:
        target = self if hasattr(self, name) else self._service
        found = getattr(target, name)
        return found(*args) if callable(found) else found

    @property
    def _service(self) -> TransferService:
        assert self.service is not None
        return self.service

    def _make(self, kind: str, uuid: str) -> Transport:
        shape = (self.shard.part.layers, BLOCKS, self.shard.part.heads, self.shard.block_size, SLOT)
        if kind == "shm":
            transport = ShmTransport(shape[0], BLOCKS, math.prod(shape[2:]))
            self.memory = memory_of_shm(transport, shape)
            return transport
        from splitserve.kv.nixl import NixlTransport

        self.memory = np.zeros(shape, np.uint8)
        return NixlTransport(uuid, *regions_of(self.memory))


def serve(pipe: Connection) -> None:
    """Does what the pipe says until it ends. What goes wrong is the caller's to raise."""
    server = Server()
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = server.call(name, args)
        except Exception as error:
            answer = error
        pipe.send(answer)


# The test's side -----------------------------------------------------------------------------------------------------
@dataclass
class Child:
    process: SpawnProcess
    pipe: Connection

    def send(self, name: str, *args: object) -> None:
        self.pipe.send((name, args))

    def answer(self) -> Any:
        assert self.pipe.poll(TIMEOUT_S), "a rank's process does not answer"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def call(self, name: str, *args: object) -> Any:
        self.send(name, *args)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(TIMEOUT_S)


@contextmanager
def children(count: int) -> Iterator[list[Child]]:
    """Processes that are killed when the test is over, whatever state they are in."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            stack.callback(_put_down, process, ours)
            made.append(Child(process, ours))
        yield made


def _put_down(process: SpawnProcess, pipe: Connection) -> None:
    process.kill()
    process.join(TIMEOUT_S)
    process.close()
    pipe.close()


@dataclass
class Rank:
    """A child as a rank of a worker."""

    child: Child
    shard: Shard
    peer: KvPeer

    def call(self, name: str, *args: object) -> Any:
        return self.child.call(name, *args)


@dataclass
class Worker:
    """All ranks of one."""

    shape: Shape
    ranks: list[Rank]

    @property
    def peers(self) -> tuple[KvPeer, ...]:
        return tuple(rank.peer for rank in self.ranks)

    def each(self, name: str, *args: object) -> list[Any]:
        """The same of all ranks, at the same time."""
        for rank in self.ranks:
            rank.child.send(name, *args)
        return [rank.child.answer() for rank in self.ranks]


@dataclass
class Workers:
    """Two workers of children."""

    kind: str
    layers: int
    heads: int
    source: Worker
    destination: Worker

    @classmethod
    @contextmanager
    def begun(
        cls,
        made: Sequence[Child],
        kind: str,
        source: Shape,
        destination: Shape,
        layers: int = 2,
        heads: int = 2,
        settings: KvTransferSettings = SETTINGS,
    ) -> Iterator["Workers"]:
        """As many of the children as the shapes need; they are free again afterwards."""
        shapes = (("source", source), ("destination", destination))
        parts = [
            (rank_uuid(f"{name}-{time.monotonic_ns()}", number), shape, shard)
            for name, shape in shapes
            for number, shard in enumerate(shape.shards(layers, heads))
        ]
        used = list(zip(made, parts, strict=False))
        assert len(used) == len(parts), "not enough children"
        for child, (uuid, shape, shard) in used:
            kv = replace(format_of(shape, layers, heads, SLOT), transport=kind)
            child.send("begin", kind, uuid, kv, shard, settings)
        ranks = [Rank(child, shard, child.answer()) for child, (_, _, shard) in used]
        size = len(source.shards(layers, heads))
        yield cls(kind, layers, heads, Worker(source, ranks[:size]), Worker(destination, ranks[size:]))
        for child, _ in used:
            child.send("end")
        for child, _ in used:
            child.answer()

    def assert_at_rest(self) -> None:
        pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
        while not all([*self.source.each("rests"), *self.destination.each("rests")]):
            assert time.monotonic() < deadline, "a rank does not come to rest"
            pause.wait(0.01)


@dataclass
class Transfer:
    """One prompt from all ranks of one worker to all of the other. In group g the destination has the blocks before
    `first[g]`; it takes `tokens` tokens, by default all."""

    workers: Workers
    key: TransferKey
    read: Read
    first: tuple[int, ...] = (0,) * GROUPS
    tokens: int = 0
    source_block: int = 1  # tables begin with these blocks
    destination_block: int = 2
    prompt: Prompt = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.tokens or self.read.tokens
        self.prompt = self.read.prompt()

    def source_place(self, begin: int, end: int) -> Place:
        size = self.workers.source.shape.block_size
        tables = _tables(blocks_for(end, size), blocks_for(self.read.tokens, size), self.source_block)
        return Place(tables, (range(begin, end),) * GROUPS)

    def destination_place(self) -> Place:
        size = self.workers.destination.shape.block_size
        total = blocks_for(self.tokens, size)
        tables = _tables(total, total, self.destination_block)
        return Place(tables, tuple(range(min(first * size, self.tokens), self.tokens) for first in self.first))

    def claim(self, limit_s: float = 60.0) -> None:
        where = self.destination_place()
        tables = tuple(
            Table(min(first, len(table)), table[first:]) for first, table in zip(self.first, where.tables, strict=True)
        )
        hashed = prompt_hash(self.prompt.tokens[: self.tokens])
        claim = Claim(self.key, self.workers.source.peers, hashed, self.tokens, tables, limit_s)
        self.workers.destination.each("claim", claim)

    def offer(self) -> None:
        where = self.source_place(0, self.read.tokens)
        blocks = sum(map(len, where.tables))
        offer = Offer(self.key, self.workers.destination.peers, self.prompt.tokens, blocks)
        self.workers.source.each("offer", offer)

    def chunk(self, begin: int, end: int) -> None:
        """A forward over these tokens: layer by layer, on every rank."""
        where = self.source_place(begin, end)
        self.workers.source.each("computing", self.key, where.tables, begin)
        for rank in self.workers.source.ranks:
            for layer in range(rank.shard.part.layers):
                rank.call("place", self.read, where, layer)
                rank.call("computed", rank.shard.part.first_layer + layer, [(self.key, end)])

    def end_prefill(self) -> None:
        self.workers.source.each("prefill_ended", self.key)

    def wait_for(self, worker: Worker, name: str) -> None:
        faults = worker.each("wait_for", name, self.key)
        assert not any(faults), faults

    def arrived(self) -> bool:
        """Whether each rank of the destination holds what the model computed."""
        where = self.destination_place()
        sums = self.workers.destination.each("checksum", where)
        ranks = self.workers.destination.ranks
        return sums == [checksum(due(rank.shard, self.prompt.kv, where.tokens)) for rank in ranks]


def _tables(count: int, total: int, begin: int) -> tuple[tuple[int, ...], ...]:
    """Out of order, a group after the other; the first `count` of `total` blocks."""
    return tuple(
        tuple(range(begin + (group + 1) * total - 1, begin + group * total - 1, -1))[:count] for group in range(GROUPS)
    )
