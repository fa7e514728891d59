"""The ranks of two workers and all that is between them: letters that wait, WRITEs that take their time, a clock that
the test turns. Everything is real but sockets, threads, time and the hardware.

Every byte that a WRITE copies is checked against who owns its block at both ends at that moment. Owned by the test's
thread.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat, rank_uuid
from splitserve.kv.layout import Shard, Slice
from splitserve.kv.ticket import LegKey
from splitserve.kv.transport import TransportError, WriteState
from tests.unit.kv.blocks import SLOT, DeviceFence, Holding
from tests.unit.kv.numbered import Array, Shape, elements, flat, format_of
from tests.unit.kv.rank import Rank, Row

SETTINGS = KvTransferSettings(peer_silent_s=5.0, lease_s=30.0)


@dataclass(eq=False, slots=True)
class ModelWrite:
    """A WRITE and how many of its bytes have moved."""

    source: Rank
    destination: Rank
    holding: Holding  # what it reads
    here: tuple[int, Array, Array]  # layer, and for each byte its block and its place therein
    there: tuple[int, Array, Array]
    moved: int = 0
    state: WriteState = WriteState.IN_FLIGHT

    @property
    def bytes(self) -> int:
        return len(self.here[1])

    def move(self, upto: int) -> None:
        """Copies on, reading what is there now. A dead process neither reads nor is written to."""
        part = slice(self.moved, upto)
        self.moved = max(self.moved, upto)
        if not (self.source.alive and self.destination.alive):
            return
        (layer, blocks, within), (to_layer, to_blocks, to_within) = self.here, self.there
        for block in np.unique(blocks[part]):
            assert self.holding.open, f"{self.holding.key} is read after it was given back"
            assert self.source.pool.owner[block] is self.holding, "a block is read that was given to somebody else"
        for block in np.unique(to_blocks[part]):
            owner = self.destination.pool.owner[block]
            assert owner is not None, f"{self.holding.key} is written to a free block"
            assert owner.key == self.holding.key, f"{self.holding.key} is written to a block of {owner.key}"
            assert owner.open, f"{self.holding.key} is written to after its end was told"
        bytes_there = flat(self.destination.memory)
        bytes_there[to_layer, to_blocks[part], to_within[part]] = flat(self.source.memory)[
            layer, blocks[part], within[part]
        ]

    def end(self, state: WriteState) -> None:
        if state is WriteState.DONE:
            self.move(self.bytes)
        self.state = state


class ModelTransport:
    """WRITEs stay in flight until the world ends them. `refuses`: the next so many are refused."""

    address = b""

    def __init__(self, world: "World", uuid: str) -> None:
        self._world = world
        self._uuid = uuid
        self._cuts: dict[str, Slice] = {}
        self._in_flight: list[ModelWrite] = []
        self.posted = 0
        self.refuses = 0

    def connect(self, peer: str, address: bytes, cut: Slice) -> None:
        self._cuts[peer] = cut

    def disconnect(self, peer: str) -> None:
        self._cuts.pop(peer, None)
        for write in self.in_flight:
            if write.destination.uuid == peer:
                write.end(WriteState.FAILED)

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        if peer not in self._cuts or self.refuses:
            self.refuses = max(0, self.refuses - 1)
            raise TransportError("the link is broken")
        cut, rank, other = self._cuts[peer], self._world.ranks[self._uuid], self._world.ranks[peer]
        blocks, within = _flat(elements(cut, cut.source, rank.shard, SLOT, layer, source))
        to_blocks, to_within = _flat(elements(cut, cut.destination, other.shard, SLOT, layer, destination))
        holding = rank.pool.owner[blocks[0]]
        assert holding is not None, "a free block is read"
        here = (cut.source.first_layer + layer, blocks, within)
        write = ModelWrite(rank, other, holding, here, (cut.destination.first_layer + layer, to_blocks, to_within))
        self.posted += 1
        self._in_flight.append(write)
        self._world.on_write(write)
        return write

    def poll(self, handle: object) -> WriteState:
        assert isinstance(handle, ModelWrite)
        return handle.state

    def progress(self) -> None: ...

    def land(self, blocks: Sequence[Sequence[int]]) -> None: ...

    def close(self) -> None: ...

    @property
    def in_flight(self) -> list[ModelWrite]:
        self._in_flight = [write for write in self._in_flight if write.state is WriteState.IN_FLIGHT]
        return self._in_flight


@dataclass
class World:
    """Two workers, "a" and "b", of which each may write to the other. Letters and WRITEs wait in the open for the test;
    a subclass overrides the `on_...` methods."""

    one: Shape = field(default_factory=Shape)
    other: Shape = field(default_factory=Shape)
    layers: int = 2
    heads: int = 1
    settings: KvTransferSettings = SETTINGS

    def __post_init__(self) -> None:
        self.now = 0.0
        self.kv: KvFormat = format_of(self.one, self.layers, self.heads, SLOT)
        self.transports: dict[str, ModelTransport] = {}
        self.a, self.b = self._ranks("a", self.one), self._ranks("b", self.other)
        self.ranks = {rank.uuid: rank for rank in (*self.a, *self.b)}
        self.letters: deque[tuple[str, str, bytes]] = deque()
        self.returned: list[tuple[str, str, bytes]] = []  # to somebody who is not here
        self.landing: list[DeviceFence] = []
        self.rows: Counter[Row] = Counter()

    # What ranks do to the world --------------------------------------------------------------------------------------
    def on_letter(self, sender: str, recipient: str, frame: bytes) -> None:
        self.letters.append((sender, recipient, frame))

    def on_write(self, write: ModelWrite) -> None:
        """It has been posted."""

    def on_land(self, fence: DeviceFence) -> None:
        """Bytes are on their way onto a rank's device, and are there once this is opened."""
        self.landing.append(fence)

    def is_staged(self, uuid: str) -> bool:
        """Whether this rank's KV travels through host memory."""
        return False

    def on_connect(self, rank: Rank, peer: str) -> None:
        """This rank wants to say Hello to the other."""

    def on_row(self, rank: Rank, row: Row, leg: LegKey) -> None:
        self.rows[row] += 1

    # What the world does to ranks ------------------------------------------------------------------------------------
    def meet(self) -> None:
        """Everybody says Hello to everybody."""
        for one, other in self.pairs():
            one.meet(other)

    def pairs(self) -> Iterator[tuple[Rank, Rank]]:
        for one in self.ranks.values():
            for other in self.ranks.values():
                if (one in self.a) != (other in self.a):
                    yield one, other

    def deliver(self) -> None:
        """The oldest letter."""
        sender, recipient, frame = self.letters.popleft()
        if recipient in self.ranks:
            self.ranks[recipient].hear(sender, frame)
        else:
            self.returned.append((sender, recipient, frame))

    def exchange(self) -> None:
        while self.letters:
            self.deliver()
            self.step()

    @property
    def in_flight(self) -> list[ModelWrite]:
        return [write for transport in self.transports.values() for write in transport.in_flight]

    def end_writes(self, state: WriteState = WriteState.DONE, most: int | None = None) -> None:
        for write in self.in_flight[:most]:
            write.end(state)
        for rank in self.ranks.values():
            rank.poll()
        self.step()

    def finish(self) -> None:
        """Every WRITE ends well and every letter arrives, until there is none."""
        while self.in_flight or self.letters:
            self.end_writes()
            self.exchange()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for rank in self.ranks.values():
            rank.poll()
            rank.expire()
        self.step()

    def step(self) -> None:
        for rank in self.ranks.values():
            rank.step()

    def assert_at_rest(self) -> None:
        """What ranks owe each other, what their engines were told, and every byte of theirs."""
        self.step()
        for rank in self.ranks.values():
            if rank.alive:
                rank.assert_given_back()
                self._assert_at_rest(rank)

    def _assert_at_rest(self, rank: Rank) -> None:
        told, events = rank.told, Counter((event.key, event.source_side) for event in rank.events)
        assert rank.at_rest, f"{rank.uuid} is not at rest"
        assert not any(link.due for link in rank.source._writer._links.values()), "a WRITE is queued for ever"
        ended = Counter([(key, False) for key in (*told.received, *told.failed, *told.released)])
        assert events == ended + Counter((key, True) for key in told.sent), "ends and events do not match"

    def _ranks(self, worker: str, shape: Shape) -> list[Rank]:
        shards = shape.shards(self.layers, self.heads)
        return [self._rank(rank_uuid(worker, number), shard) for number, shard in enumerate(shards)]

    def _rank(self, uuid: str, shard: Shard) -> Rank:
        self.transports[uuid] = ModelTransport(self, uuid)
        return Rank(self, uuid, shard, self.transports[uuid], self.settings, self.is_staged(uuid))


def _flat(found: tuple[Array, Array]) -> tuple[Array, Array]:
    blocks, within = found
    return blocks.reshape(-1), within.reshape(-1)
