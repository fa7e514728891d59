"""Workers of which each rank is a process of its own (`rank_server.py`), driven through pipes."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvPeer, rank_uuid
from splitserve.kv.layout import Shard, blocks_for, prompt_hash
from splitserve.kv.transfer import Claim, Offer, Table, TransferKey
from tests.contract.rank_server import SETTINGS, SLOT, TIMEOUT_S, Place, Read, checksum, serve
from tests.unit.kv.blocks import GROUPS, Prompt
from tests.unit.kv.numbered import Shape, due, format_of


@dataclass
class Child:
    process: SpawnProcess
    pipe: Connection
    unanswered: int = 0

    def send(self, name: str, *args: object) -> None:
        self.pipe.send((name, args))
        self.unanswered += 1

    def catch_up(self) -> None:
        """Takes the answers that nobody waited for."""
        while self.unanswered:
            self.answer()

    def answer(self) -> Any:
        assert self.pipe.poll(TIMEOUT_S), "a rank's process does not answer"
        answer = self.pipe.recv()
        self.unanswered -= 1
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
    with ExitStack() as stack:
        yield [stack.enter_context(child_process()) for _ in range(count)]


@contextmanager
def child_process() -> Iterator[Child]:
    """A process that is killed when the test is over, whatever state it is in."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Child(process, ours)
    finally:
        process.kill()
        process.join(TIMEOUT_S)
        process.close()
        ours.close()


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
        living = [child for child, _ in used if child.process.is_alive()]
        for child in living:
            child.send("end")
        for child in living:
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
