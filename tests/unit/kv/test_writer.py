"""Which WRITE goes next, and how much is in flight on each link."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from splitserve.core.worker import KvPart
from splitserve.kv.cursor import Cursor, PrefillProgress
from splitserve.kv.layout import Shard, Slice, slice_between
from splitserve.kv.ledger import SourceState
from splitserve.kv.source_ticket import SourceTicket
from splitserve.kv.ticket import Counters, LegKey, Table
from splitserve.kv.transport import TransportError, WriteState
from splitserve.kv.writer import Writer
from tests.unit.kv.numbered import Shape, format_of

SIZE, SLOT, LAYERS = 4, 2, 2
BLOCK = SIZE * SLOT  # bytes
STUCK_S = 10.0


@dataclass(eq=False)
class Posted:
    peer: str
    layer: int
    source: tuple[int, ...]
    state: WriteState = WriteState.IN_FLIGHT

    @property
    def bytes(self) -> int:
        return len(self.source) * BLOCK


@dataclass
class Wire:
    """WRITEs end when the test says so."""

    posted: list[Posted] = field(default_factory=list)
    refuses: str = ""
    keeps: bool = False  # a peer that it is to forget
    address = b""

    def connect(self, peer: str, address: bytes, cut: Slice) -> None: ...

    def disconnect(self, peer: str) -> None:
        if self.keeps:
            raise TransportError("its WRITEs can't be aborted")

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        if peer == self.refuses:
            raise TransportError("the link is broken")
        self.posted.append(Posted(peer, layer, tuple(source)))
        return self.posted[-1]

    def poll(self, handle: object) -> WriteState:
        assert isinstance(handle, Posted)
        return handle.state

    def progress(self) -> None: ...

    def land(self, blocks: Sequence[Sequence[int]]) -> None: ...

    def close(self) -> None: ...

    def in_flight_bytes(self, peer: str) -> int:
        return sum(write.bytes for write in self.posted if write.peer == peer and write.state is WriteState.IN_FLIGHT)


class Desk:
    """A writer with links to "one" and "other", and what it has told."""

    def __init__(self, most_in_flight: int = 64 * BLOCK, most_write: int = 8 * BLOCK) -> None:
        self.wire, self.counters = Wire(), Counters()
        self.wrote: list[LegKey] = []
        self.failed: list[tuple[str, str]] = []
        self.writer = Writer(
            self.wire, self.counters, most_in_flight, most_write, STUCK_S, self._on_wrote, self._on_failed
        )
        shard = Shard(KvPart(0, LAYERS, 0, 1), SIZE, (0,) * LAYERS)
        cut = slice_between(shard, shard, format_of(Shape(), LAYERS, 1, SLOT))
        assert cut is not None
        self.cut = cut
        for peer in ("one", "other"):
            self.writer.link(peer, cut)

    def push(
        self, name: str, first: int, blocks: int, deadline: float, peer: str = "one", now: float = 0.0
    ) -> SourceTicket:
        """A claim on so many computed blocks, numbered from `first` so that the test knows them again."""
        progress = PrefillProgress(0, LAYERS)
        progress.computing([range(first, first + blocks)])
        progress.computed(None, blocks * SIZE)
        cursor = Cursor(progress, self.cut, blocks * SIZE, [Table(0, tuple(range(blocks)))])
        ticket = SourceTicket(LegKey(name, 1, peer), SourceState.PUSHING, cursor=cursor, expires_at=deadline)
        self.writer.push(ticket, now)
        return ticket

    def end(self, count: int = 1, now: float = 0.0, state: WriteState = WriteState.DONE) -> None:
        """The oldest WRITEs end."""
        for write in [write for write in self.wire.posted if write.state is WriteState.IN_FLIGHT][:count]:
            write.state = state
        self.writer.poll(now)

    def order(self) -> list[int]:
        """Hundreds of the blocks that went out, WRITE by WRITE: whose they are."""
        return [write.source[0] // 100 for write in self.wire.posted]

    def _on_wrote(self, ticket: SourceTicket, now: float) -> None:
        self.wrote.append(ticket.key)

    def _on_failed(self, ticket: SourceTicket, reason: str, message: str, now: float) -> None:
        ticket.state = SourceState.STOPPING
        self.failed.append((ticket.key.transfer_id, reason))


def test_what_waits_goes_by_the_earliest_deadline_whoever_came_first() -> None:
    desk = Desk(most_in_flight=2 * BLOCK, most_write=BLOCK)
    desk.push("late", 100, 2, deadline=30.0)
    desk.push("last", 200, 1, deadline=40.0)
    desk.push("soon", 300, 2, deadline=10.0)
    desk.push("later", 400, 1, deadline=35.0)
    while desk.writer.writing:
        desk.end()
    assert desk.order() == [1, 1, 3, 3, 3, 3, 1, 1, 4, 4, 2, 2]


def test_of_equal_deadlines_the_longest_waiting_goes_first() -> None:
    desk = Desk(most_in_flight=BLOCK, most_write=BLOCK)
    desk.push("first", 100, 3, deadline=10.0, now=0.0)
    desk.push("second", 200, 3, deadline=10.0, now=1.0)
    for second in range(2, 7):
        desk.end(now=float(second))
    assert desk.order() == [1, 1, 2, 1, 2, 1], "neither starves the other"


def test_an_urgent_claim_waits_for_one_write_of_a_long_one_and_not_for_all() -> None:
    desk = Desk(most_in_flight=8 * BLOCK, most_write=8 * BLOCK)
    desk.push("long", 100, 80, deadline=60.0)
    desk.push("urgent", 200, 1, deadline=1.0)
    desk.end()
    assert desk.order() == [1, 2, 2, 1]


def test_no_more_is_in_flight_on_a_link_than_the_cap_and_the_room_is_used() -> None:
    desk = Desk(most_in_flight=10 * BLOCK, most_write=4 * BLOCK)
    desk.push("long", 100, 23, deadline=60.0)
    while desk.writer.writing:
        assert desk.wire.in_flight_bytes("one") == desk.writer.in_flight_bytes <= 10 * BLOCK
        left = LAYERS * 23 * BLOCK - sum(write.bytes for write in desk.wire.posted)
        assert desk.writer.in_flight_bytes == 10 * BLOCK or not left
        desk.end()
    assert sum(write.bytes for write in desk.wire.posted) == LAYERS * 23 * BLOCK


def test_each_link_has_a_cap_of_its_own() -> None:
    desk = Desk(most_in_flight=2 * BLOCK, most_write=BLOCK)
    desk.push("busy", 100, 9, deadline=1.0, peer="one")
    desk.push("calm", 200, 9, deadline=60.0, peer="other")
    assert [desk.wire.in_flight_bytes(peer) for peer in ("one", "other")] == [2 * BLOCK, 2 * BLOCK]


def test_no_write_is_larger_than_the_setting_and_none_crosses_layers() -> None:
    desk = Desk(most_write=3 * BLOCK + 1)
    desk.push("long", 100, 7, deadline=60.0)
    assert [(write.layer, len(write.source)) for write in desk.wire.posted] == [
        (0, 3), (0, 3), (0, 1), (1, 3), (1, 3), (1, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(("most_in_flight", "most_write", "at_once"), [(1, 1, 1), (1, 99, 1), (3 * BLOCK, 1, 3)])
def test_a_block_larger_than_a_setting_goes_out_all_the_same(
    most_in_flight: int, most_write: int, at_once: int
) -> None:
    desk = Desk(most_in_flight=most_in_flight, most_write=most_write)
    desk.push("long", 100, 4, deadline=60.0)
    assert [len(write.source) for write in desk.wire.posted] == [1] * at_once
    while desk.writer.writing:
        desk.end()
    assert len(desk.wire.posted) == LAYERS * 4


def test_how_long_a_write_waited_for_room_is_told() -> None:
    desk = Desk(most_in_flight=BLOCK, most_write=BLOCK)
    first = desk.push("first", 100, 1, deadline=10.0, now=1.0)
    second = desk.push("second", 200, 1, deadline=20.0, now=2.0)
    desk.end(now=3.0)
    desk.end(now=7.0)
    desk.end(now=8.0)
    assert (first.queued_s, second.queued_s) == (2.0, 5.0)


def test_what_is_due_of_a_claim_that_is_over_is_not_written() -> None:
    desk = Desk(most_in_flight=BLOCK, most_write=BLOCK)
    over = desk.push("over", 100, 3, deadline=10.0)
    desk.push("other", 200, 1, deadline=20.0)
    over.state = SourceState.STOPPING
    while desk.writer.writing:
        desk.end()
    assert desk.order() == [1, 2, 2]


def test_a_refused_write_fails_its_claim_alone() -> None:
    desk = Desk()
    desk.wire.refuses = "one"
    refused = desk.push("refused", 100, 1, deadline=10.0, peer="one")
    desk.push("fine", 200, 1, deadline=20.0, peer="other")
    assert desk.failed == [("refused", "write")]
    assert (refused.in_flight, desk.writer.in_flight_bytes) == (0, LAYERS * BLOCK)


def test_a_failed_write_fails_its_claim_and_its_bytes_are_not_counted() -> None:
    desk = Desk()
    ticket = desk.push("failing", 100, 1, deadline=10.0)
    desk.end(state=WriteState.FAILED)
    desk.end()
    assert desk.failed == [("failing", "write")]
    assert (ticket.in_flight, ticket.bytes, desk.counters.bytes_written) == (0, BLOCK, BLOCK)
    assert not desk.writer.writing


def test_a_stuck_write_fails_its_claim_once_and_stays_in_flight_until_the_transport_lets_go() -> None:
    desk = Desk(most_write=BLOCK)
    ticket = desk.push("stuck", 100, 1, deadline=10.0)
    desk.writer.poll(STUCK_S - 1.0)
    assert not desk.failed
    for _ in range(3):
        desk.writer.poll(STUCK_S + 1.0)
    assert desk.failed == [("stuck", "stuck")] * LAYERS, "once for each WRITE"
    assert (ticket.in_flight, desk.writer.in_flight_bytes) == (LAYERS, LAYERS * BLOCK)
    desk.end(count=LAYERS)
    assert (ticket.in_flight, desk.writer.writing) == (0, False)


def test_writes_to_a_peer_that_has_ended_are_awaited_and_no_more_are_posted() -> None:
    desk = Desk(most_in_flight=BLOCK, most_write=BLOCK)
    ticket = desk.push("cut off", 100, 3, deadline=10.0)
    desk.wire.keeps = True
    desk.writer.unlink("one")
    assert desk.writer.slice_for("one") is None
    assert desk.counters.dropped == {"disconnect refused by the transport": 1}
    assert ticket.in_flight == 1
    desk.end(state=WriteState.FAILED)
    assert (ticket.in_flight, len(desk.wire.posted), desk.writer.writing) == (0, 1, False)
