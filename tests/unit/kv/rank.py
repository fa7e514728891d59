"""One rank of a worker in tests: both sides of the transfer service, its memory, and a small engine.

The engine gives freed blocks out again at once. What it receives is compared with what the model computed for that
prompt, when it is received and when its decode ends. Owned by the test's thread, which passes the time in by its world.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat, KvPeer
from splitserve.kv.destination import DestinationSide, DestinationTicket
from splitserve.kv.layout import Shard, blocks_for, prompt_hash, slice_between
from splitserve.kv.ledger import DESTINATION, SOURCE, DestinationEvent, DestinationState, SourceEvent, SourceState
from splitserve.kv.messages import Cancel, Cancelled, Codec, Done, Failed, Malformed, Message, Progress, Register
from splitserve.kv.outlet import Outlet
from splitserve.kv.source import SourceSide
from splitserve.kv.source_ticket import Answer, SourceTicket
from splitserve.kv.ticket import Claim, Counters, LegKey, Offer, Results, Table, TransferEnded, TransferKey
from splitserve.kv.transport import Transport
from tests.unit.kv.blocks import BLOCKS, GROUPS, SLOT, DeviceFence, Holding, Pool, Prefill, Prompt
from tests.unit.kv.numbered import held, memory_of, place

Row = tuple[SourceState, SourceEvent] | tuple[DestinationState, DestinationEvent]


class Surroundings(Protocol):
    """What a rank needs of the world."""

    now: float
    kv: KvFormat

    def prompt_of(self, key: TransferKey) -> Prompt:
        """What the prefill of this ticket reads."""

    def on_letter(self, sender: str, recipient: str, frame: bytes) -> None: ...

    def on_land(self, fence: DeviceFence) -> None:
        """Bytes are on their way onto a rank's device, and are there once this is opened."""

    def on_connect(self, rank: "Rank", peer: str) -> None:
        """This rank wants to say Hello to the other."""

    def on_row(self, rank: "Rank", row: Row, leg: LegKey) -> None:
        """It is about to make this transition."""


class WatchedSource(SourceSide):
    """Tells of each transition before it is made."""

    watch: Callable[[Row, LegKey], None]

    def _fire(self, ticket: SourceTicket, event: SourceEvent, now: float, answer: Answer | None = None) -> None:
        if (ticket.state, event) in SOURCE:
            self.watch((ticket.state, event), ticket.key)
        super()._fire(ticket, event, now, answer)


class WatchedDestination(DestinationSide):
    watch: Callable[[Row, LegKey], None]

    def _fire(
        self, ticket: DestinationTicket, event: DestinationEvent, now: float, reason: str = "", error: str = ""
    ) -> None:
        if (ticket.state, event) in DESTINATION:
            self.watch((ticket.state, event), ticket.key)
        super()._fire(ticket, event, now, reason, error)


class Rank:
    """One process: both sides, a memory, and the engine that gives its blocks out."""

    def __init__(
        self,
        world: Surroundings,
        uuid: str,
        shard: Shard,
        transport: Transport,
        settings: KvTransferSettings,
        staged: bool,
    ) -> None:
        """`staged`: peers write into its host memory, its engine reads what has landed on its device."""
        self.world = world
        self.uuid = uuid
        self.shard = shard
        self.transport = transport
        self.peer = KvPeer(self.uuid, "tcp://127.0.0.1:1", shard.part)
        self.memory = memory_of(shard, BLOCKS, SLOT, 0, np.uint8)
        self.device = self.memory.copy() if staged else self.memory
        self.pool = Pool(self.memory, self.device)
        self.events: list[TransferEnded] = []
        self.outlet = Outlet(self._send, self.events.append, Counters())
        self.source = WatchedSource(transport, self.outlet, shard, settings)
        retry_s = settings.peer_silent_s / 5
        self.destination = WatchedDestination(self.outlet, shard.part, self._connect, retry_s, self._land)
        self.source.watch = self.destination.watch = self._watch
        self.alive = True
        self.known: set[str] = set()  # peers that said Hello
        self.ended: set[str] = set()  # peers whose end is proven
        self.prefills: dict[TransferKey, Prefill] = {}
        self.claims: dict[TransferKey, Holding] = {}
        self.decoding: dict[TransferKey, Holding] = {}
        self.fences: deque[tuple[TransferKey, DeviceFence]] = deque()
        self.told = Results()
        self._codec = Codec(self.uuid)
        self.unreadable: Counter[str] = Counter()

    # The engine's prefills -------------------------------------------------------------------------------------------
    def offer(self, key: TransferKey, prompt: Prompt, destination: Sequence["Rank"], hit: int = 0) -> None:
        """`hit`: so many tokens are cached here."""
        if not self.alive or key in self.prefills:
            return
        holding = Holding(key, prompt, len(prompt.tokens), (0,) * GROUPS, [])
        self.pool.take(holding, [blocks_for(len(prompt.tokens), self.shard.block_size)] * GROUPS)
        self.prefills[key] = Prefill(holding)
        peers = tuple(rank.peer for rank in destination)
        self.source.offer(Offer(key, peers, prompt.tokens, len(holding.blocks)), self.world.now)
        if hit:
            self._compute(holding, range(hit))
            self.prefills[key].done = hit

    def chunk(self, key: TransferKey, end: int, layers: int | None = None, fenced: bool = False) -> None:
        """A forward up to token `end`, or over its first layers only. Fenced, its bytes come by `open_fences`."""
        prefill = self._running(key)
        if prefill is None:
            return
        holding, begin, end = prefill.holding, prefill.done, min(end, prefill.holding.tokens)
        known = blocks_for(end, self.shard.block_size)
        self.source.computing(key, [table[:known] for table in holding.tables], begin, None, self.world.now)
        for layer in range(self.shard.part.layers)[:layers]:
            fence = DeviceFence(partial(self._compute, holding, range(begin, end), layer))
            if fenced:
                self.fences.append((key, fence))
            else:
                fence.open()
            whole = self.shard.part.first_layer + layer
            self.source.computed(whole, [(key, end)], fence if fenced else None, self.world.now)
        if layers is None:
            prefill.done = end

    def open_fences(self, count: int | None = None) -> None:
        """The device has computed so many layers more."""
        for _, fence in [self.fences.popleft() for _ in range(len(self.fences))[:count]]:
            fence.open()

    def end_prefill(self, key: TransferKey) -> None:
        prefill = self._running(key)
        if prefill is not None:
            if prefill.done < prefill.holding.tokens:
                self.chunk(key, prefill.holding.tokens)
            self.open_fences()
            prefill.over = True
            self.source.prefill_ended(key, self.world.now, self.world.now)

    def abort_prefill(self, key: TransferKey) -> None:
        prefill = self.prefills.get(key)
        if self.alive and prefill is not None and prefill.draining is None:
            prefill.over = True
            self.source.prefill_aborted(key, self.world.now)

    def preempt(self, key: TransferKey) -> None:
        """The engine waits until no WRITE reads the blocks, then gives them to somebody else."""
        prefill = self._running(key)
        if prefill is not None:
            prefill.draining = threading.Event()
            self.source.drain([key], prefill.draining)
            self._end_drain(prefill)

    # Its claims ------------------------------------------------------------------------------------------------------
    def claim(
        self,
        key: TransferKey,
        prompt: Prompt,
        source: Sequence["Rank"],
        tokens: int | None = None,
        first: Sequence[int] = (0,) * GROUPS,
        limit_s: float = 60.0,
        expects: Prompt | None = None,
    ) -> None:
        """`first[g]`: blocks that are there already. `expects`: the prompt that it takes the KV for."""
        if not self.alive or key in self.claims:
            return
        expected = expects or prompt
        count = len(expected.tokens) if tokens is None else tokens
        total = blocks_for(count, self.shard.block_size)
        holding = Holding(key, expected, count, tuple(min(each, total) for each in first), [])
        self.pool.take(holding, [total - each for each in holding.first])
        self.claims[key] = holding
        tables = tuple(Table(*pair) for pair in zip(holding.first, map(tuple, holding.tables), strict=True))
        peers = tuple(rank.peer for rank in source)
        claim = Claim(key, peers, prompt_hash(expected.tokens[:count]), count, tables, limit_s)
        self.destination.claim(claim, self.world.now)

    def abandon(self, key: TransferKey) -> None:
        if self.alive:
            self.destination.abandon(key, self.world.now)

    def end_decode(self, key: TransferKey) -> None:
        holding = self.decoding.pop(key, None)
        if holding is not None:
            self._verify(holding)
            self.pool.give_back(holding)

    # What it hears ---------------------------------------------------------------------------------------------------
    def hear(self, sender: str, frame: bytes) -> None:
        if not self.alive or sender in self.ended or sender not in self.known:
            return
        try:
            _, _, message = self._codec.decode(frame)
        except Malformed as error:
            self.unreadable[error.kind] += 1
            return
        match message:
            case Register():
                self.source.on_register(sender, message, self.world.now)
            case Cancel():
                self.source.on_cancel(sender, message, self.world.now)
            case Progress() | Done() | Failed() | Cancelled():
                self.destination.on_message(sender, message, self.world.now)

    def meet(self, other: "Rank") -> None:
        """It said Hello, or speaks again after silence."""
        if not self.alive or other.uuid in self.ended:
            return
        self.known.add(other.uuid)
        cut = slice_between(self.shard, other.shard, self.world.kv)
        if cut is not None:
            self.transport.connect(other.uuid, b"", cut)
        self.source.peer_up(other.uuid, cut, self.world.now)
        self.destination.peer_up(other.uuid, self.world.now)

    def refuse(self, other: "Rank") -> None:
        """It said Hello, and its memory can't be reached."""
        if self.alive and other.uuid not in self.ended:
            self.known.add(other.uuid)
            self.destination.peer_refused(other.uuid, "its memory can't be reached", self.world.now)

    def miss(self, other: "Rank") -> None:
        if self.alive and other.uuid in self.known - self.ended:
            self.destination.peer_silent(other.uuid, self.world.now)

    def bury(self, other: "Rank") -> None:
        """The end of that process is proven."""
        if self.alive and other.uuid not in self.ended:
            self.ended.add(other.uuid)
            self.source.peer_ended(other.uuid, self.world.now)
            self.destination.peer_ended(other.uuid, self.world.now)

    def poll(self) -> None:
        if self.alive and self.source.writing:
            self.source.poll(self.world.now)
        if self.alive and self.destination.landing:
            self.destination.poll()

    def expire(self) -> None:
        if self.alive:
            self.source.expire(self.world.now)
            self.destination.expire(self.world.now)

    # The engine's step: what it is told ------------------------------------------------------------------------------
    def step(self) -> None:
        new = self.outlet.take()
        if not self.alive:
            return
        for key in new.received:
            self._received(key)
        for key in (*new.failed, *new.released):
            self.pool.give_back(self._named(key))
        for key in new.sent:
            self._sent(key)
        for name in ("received", "failed", "released", "sent"):
            getattr(self.told, name).extend(getattr(new, name))
        for prefill in self.prefills.values():
            self._end_drain(prefill)

    @property
    def at_rest(self) -> bool:
        """Nothing is owed to anybody, here or by anybody."""
        source, destination = self.source, self.destination
        counts = (source.pinned_blocks, source.owed, source.open_tickets, source.in_flight_bytes, source.writing)
        return not (any(counts) or destination.quarantined_blocks or destination.open_claims or self.outlet.waiting)

    def _received(self, key: TransferKey) -> None:
        holding = self._named(key)
        prefilled = self.world.prompt_of(key)
        assert holding.prompt is prefilled, f"{key} was received with the KV of another prompt"
        self._verify(holding)
        self.decoding[key] = holding

    def _named(self, key: TransferKey) -> Holding:
        assert key in self.claims, f"{key} was named twice at {self.uuid}"
        holding = self.claims.pop(key)
        holding.open = False
        return holding

    def _sent(self, key: TransferKey) -> None:
        assert key in self.prefills, f"{key} was sent twice at {self.uuid}"
        prefill = self.prefills.pop(key)
        assert prefill.over, f"{key} was sent before the engine was done with it"
        prefill.holding.open = False
        self.pool.give_back(prefill.holding)

    def _verify(self, holding: Holding) -> None:
        tables = [[-1] * first + table for first, table in zip(holding.first, holding.tables, strict=True)]
        tokens = [range(first * self.shard.block_size, holding.tokens) for first in holding.first]
        right = held(self.device, self.shard, tables, holding.prompt.kv, tokens)
        assert right, f"wrong bytes of {holding.key} at {self.uuid}"

    def _end_drain(self, prefill: Prefill) -> None:
        if prefill.draining is None or not prefill.draining.is_set():
            return
        counts = [len(table) for table in prefill.holding.tables]
        prefill.holding.open = False
        self.pool.give_back(prefill.holding)
        old = prefill.holding
        prefill.holding = Holding(old.key, old.prompt, old.tokens, old.first, [])
        self.pool.take(prefill.holding, counts)
        prefill.draining, prefill.done = None, 0

    def _running(self, key: TransferKey) -> Prefill | None:
        prefill = self.prefills.get(key)
        runs = self.alive and prefill is not None and not prefill.over and prefill.draining is None
        return prefill if runs else None

    def _compute(self, holding: Holding, tokens: range, layer: int | None = None) -> None:
        if holding.open:
            place(self.memory, self.shard, holding.tables, holding.prompt.kv, tokens, layer)

    def _send(self, recipient: str, message: Message) -> None:
        if self.alive:
            self.world.on_letter(self.uuid, recipient, self._codec.encode(recipient, message))

    def _land(self, tables: Sequence[Table]) -> DeviceFence | None:
        if self.device is self.memory:
            return None
        blocks = [block for table in tables for block in table.blocks]
        fence = DeviceFence(lambda: self.device.__setitem__((slice(None), blocks), self.memory[:, blocks]))
        self.world.on_land(fence)
        return fence

    def _connect(self, peer: KvPeer) -> None:
        if self.alive:
            self.world.on_connect(self, peer.uuid)

    def _watch(self, row: Row, leg: LegKey) -> None:
        self.world.on_row(self, row, leg)
