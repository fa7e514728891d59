"""One rank of a worker in tests: an engine, both sides of the transfer service, and what it hears of others. The world
that it is in has the time, the letters and the WRITEs. Owned by the test's thread.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat, KvPeer
from splitserve.kv.destination import DestinationSide, DestinationTicket
from splitserve.kv.layout import Shard, slice_between
from splitserve.kv.ledger import DESTINATION, SOURCE, DestinationEvent, DestinationState, SourceEvent, SourceState
from splitserve.kv.messages import Cancel, Cancelled, Codec, Done, Failed, Malformed, Message, Progress, Register
from splitserve.kv.outlet import Outlet
from splitserve.kv.source import SourceSide
from splitserve.kv.source_ticket import Answer, SourceTicket
from splitserve.kv.ticket import Claim, Counters, LegKey, Offer, Results, Table, TransferEnded, TransferKey
from splitserve.kv.transport import Fence, Transport
from tests.unit.kv.blocks import BLOCKS, SLOT, DeviceFence
from tests.unit.kv.engine import Engine
from tests.unit.kv.numbered import memory_of

Row = tuple[SourceState, SourceEvent] | tuple[DestinationState, DestinationEvent]


class Surroundings(Protocol):
    """What a rank needs of the world."""

    now: float
    kv: KvFormat

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


class Sides:
    """Both sides with the world's time."""

    def __init__(self, world: Surroundings, source: SourceSide, destination: DestinationSide, outlet: Outlet) -> None:
        self._world = world
        self._source = source
        self._destination = destination
        self._outlet = outlet

    def offer(self, offer: Offer) -> None:
        self._source.offer(offer, self._world.now)

    def computing(self, key: TransferKey, tables: Sequence[Sequence[int]], tokens: int) -> None:
        self._source.computing(key, tables, tokens, None, self._world.now)

    def computed(self, layer: int, tokens: Sequence[tuple[TransferKey, int]], fence: Fence | None = None) -> None:
        self._source.computed(layer, tokens, fence, self._world.now)

    def prefill_ended(self, key: TransferKey) -> None:
        self._source.prefill_ended(key, self._world.now, self._world.now)

    def prefill_aborted(self, key: TransferKey) -> None:
        self._source.prefill_aborted(key, self._world.now)

    def drain(self, key: TransferKey, over: threading.Event) -> None:
        self._source.drain([key], over)

    def claim(self, claim: Claim) -> None:
        self._destination.claim(claim, self._world.now)

    def abandon(self, key: TransferKey) -> None:
        self._destination.abandon(key, self._world.now)

    def take_results(self) -> Results:
        return self._outlet.take()


class Rank(Engine):
    """One process: both sides of the transfer service behind its engine."""

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
        self.transport = transport
        self.peer = KvPeer(self.uuid, "tcp://127.0.0.1:1", shard.part)
        self.events: list[TransferEnded] = []
        self.outlet = Outlet(self._send, self.events.append, Counters())
        self.source = WatchedSource(transport, self.outlet, shard, settings)
        retry_s = settings.peer_silent_s / 5
        self.destination = WatchedDestination(self.outlet, shard.part, self._connect, retry_s, self._land)
        self.source.watch = self.destination.watch = self._watch
        memory = memory_of(shard, BLOCKS, SLOT, 0, np.uint8)
        sides = Sides(world, self.source, self.destination, self.outlet)
        super().__init__(sides, sides.drain, shard, memory, memory.copy() if staged else None)
        self.known: set[str] = set()  # peers that said Hello
        self.ended: set[str] = set()  # peers whose end is proven
        self._codec = Codec(self.uuid)
        self.unreadable: Counter[str] = Counter()

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

    @property
    def at_rest(self) -> bool:
        """Nothing is owed to anybody, here or by anybody."""
        source, destination = self.source, self.destination
        counts = (source.pinned_blocks, source.owed, source.open_tickets, source.in_flight_bytes, source.writing)
        return not (any(counts) or destination.quarantined_blocks or destination.open_claims or self.outlet.waiting)

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


def peers(ranks: Sequence[Rank]) -> tuple[KvPeer, ...]:
    return tuple(rank.peer for rank in ranks)
