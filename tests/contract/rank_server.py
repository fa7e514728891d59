"""A rank in a process of its own, told what to do through a pipe: a real transfer service over a real transport, and an
engine where the test wants one.

It may be rank after rank: `begin` makes its service, `end` closes it. What it computes and what it has received is
`blocks.Prompt`'s, made from the same number in whatever process asks, so that checksums can be compared.
"""

import heapq
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import numpy as np

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat, KvPeer
from splitserve.kv.blocks import Blocks
from splitserve.kv.layout import Shard
from splitserve.kv.messages import Message
from splitserve.kv.shm import ShmTransport
from splitserve.kv.tcp import TcpTransport
from splitserve.kv.transfer import Results, TransferEnded, TransferKey, TransferService
from splitserve.kv.transport import Transport
from tests.contract.kv_endpoints import memory_of, memory_of_shm, regions_of
from tests.unit.kv.blocks import Prompt
from tests.unit.kv.engine import Engine
from tests.unit.kv.numbered import Array, place, there

SLOT, BLOCKS = 1024, 256  # bytes of one token of one head of one layer; blocks of a rank
SETTINGS = KvTransferSettings(peer_silent_s=1.0, lease_s=60.0)
TIMEOUT_S = 60.0
ENGINE_STEP_S = 0.002


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


@dataclass(frozen=True, slots=True)
class Chances:
    """Of a letter: to be lost, to come twice, to be so late at most that others overtake it."""

    lose: float = 0.0
    double: float = 0.0
    late_s: float = 0.0


class Postman:
    """Sends a service's letters by the dice, from a thread of its own, until it is calm."""

    def __init__(self, send: Callable[[str, Message], None], seed: int, chances: Chances) -> None:
        self._send = send
        self._dice = Random(seed)
        self._chances = chances
        self._letters: list[tuple[float, int, str, Message]] = []
        self._number = count()
        self._change = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._run, name="postman", daemon=True)
        self._thread.start()

    def post(self, recipient: str, message: Message) -> None:
        with self._change:
            if self._dice.random() < self._chances.lose:
                return
            for _ in range(2 if self._dice.random() < self._chances.double else 1):
                due = time.monotonic() + self._dice.uniform(0.0, self._chances.late_s)
                heapq.heappush(self._letters, (due, next(self._number), recipient, message))
            self._change.notify()

    def calm(self) -> None:
        with self._change:
            self._chances = Chances()

    def close(self) -> None:
        with self._change:
            self._open = False
            self._change.notify()
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        with self._change:
            while self._open:
                while self._letters and self._letters[0][0] <= time.monotonic():
                    _, _, recipient, message = heapq.heappop(self._letters)
                    self._send(recipient, message)
                next_at = self._letters[0][0] if self._letters else math.inf
                self._change.wait(min(1.0, max(0.0, next_at - time.monotonic())))


# The child -----------------------------------------------------------------------------------------------------------
class Server:
    """What the pipe calls by name, besides the service's own methods."""

    def __init__(self) -> None:
        self.service: TransferService | None = None
        self.memory: Array = np.zeros(0)
        self.events: list[TransferEnded] = []
        self.told = Results()
        self.engine: Engine | None = None
        self.postman: Postman | None = None
        self.fault = ""

    def begin(self, kind: str, uuid: str, kv: KvFormat, shard: Shard, settings: KvTransferSettings) -> KvPeer:
        self.events, self.told, self.shard = [], Results(), shard
        self.service = TransferService(uuid, lambda: self._make(kind, uuid), kv, shard, settings, self.events.append)
        return self.service.start()

    def end(self) -> None:
        if self.postman is not None:
            self.postman.close()
        if self.service is not None:
            self.service.close()
        self.service = self.engine = self.postman = None

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

    def wait_for_writes(self) -> str:
        """Until it has written: the claim was heard, and a layer computed. Answers why not after a while."""
        pause, deadline = threading.Event(), time.monotonic() + TIMEOUT_S / 2
        while not self._service.counters.writes:
            if time.monotonic() > deadline:
                return f"nothing was written: {self.told}, {self.events}, {self._service.counters}"
            pause.wait(0.001)
        return ""

    # An engine of its own, for runs in which nobody waits for anybody -------------------------------------------------
    def run_engine(self, seed: int, chances: Chances) -> None:
        """From now on blocks are this process's to give, and letters of its service go by the postman."""
        service = self._service

        def drain(key: TransferKey, over: threading.Event) -> None:
            """As `service.drain`, but the engine goes on meanwhile: here a drain may take as long as a stopped peer."""
            service._do(lambda _: service._running.source.drain([key], over))

        self.engine, self.fault = Engine(service, drain, self.shard, self.memory), ""
        outlet = service._running.outlet
        self.postman = Postman(outlet.send, seed, chances)
        outlet.send = self.postman.post

    def engine_does(self, name: str, key: TransferKey, read: Read, *args: object) -> None:
        getattr(self._engine, name)(key, read.prompt(), *args)

    def engine_ends(self, name: str, key: TransferKey, *args: object) -> None:
        getattr(self._engine, name)(key, *args)

    def state(self) -> str:
        """For whoever wonders why it does not rest."""
        service, engine = self._service, self._engine
        loop = service._running
        tickets = [list(side._ledger.live()) for side in (loop.source, loop.destination)]
        owes = (service.busy, service.pinned_blocks, service.quarantined_blocks, service.in_flight_bytes)
        return f"{engine.prefills} {engine.claims} {owes} {tickets} {service.connected} {service.counters}"

    def finish(self) -> None:
        """No more letters are late or lost, and every prefill ends."""
        assert self.postman is not None
        self.postman.calm()
        for key, prefill in self._engine.prefills.items():
            if not prefill.over:
                self._engine.end_prefill(key)

    def engine_rests(self) -> bool:
        engine, service = self._engine, self._service
        kept = service.pinned_blocks or service.quarantined_blocks or service.in_flight_bytes
        return not (engine.prefills or engine.claims or service.busy or kept) or bool(self.fault)

    def books(self) -> tuple[str, Results]:
        """The first rule that was broken here, if any, and what the engine was told. Its blocks must all be back."""
        if not self.fault:
            self._engine.assert_given_back()
        return self.fault, self._engine.told

    def idle(self) -> None:
        if self.engine is not None and not self.fault:
            try:
                self.engine.step()
            except AssertionError as error:
                self.fault = str(error)

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None
        return self.engine

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
        if kind == "tcp":
            blocks = Blocks.made(shape[0], BLOCKS, math.prod(shape[2:]))
            self.memory = memory_of(blocks, shape)
            return TcpTransport(uuid, "127.0.0.1", blocks)
        from splitserve.kv.nixl import NixlTransport

        self.memory = np.zeros(shape, np.uint8)
        return NixlTransport(uuid, *regions_of(self.memory))


def serve(pipe: Connection) -> None:
    """Does what the pipe says until it ends. What goes wrong is the caller's to raise."""
    server = Server()
    while True:
        while not pipe.poll(ENGINE_STEP_S if server.engine is not None else None):
            server.idle()
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = server.call(name, args)
        except Exception as error:
            answer = error
        pipe.send(answer)
