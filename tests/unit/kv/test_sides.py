"""Both sides of a transfer against a model of everything between them: messages that wait, vanish and repeat, WRITEs
that take their time or fail, processes that die. Random walks never break a safety rule and always come to rest.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.worker import KvFormat, KvMode, KvPeer
from splitserve.kv.destination import DestinationSide
from splitserve.kv.ledger import (
    DESTINATION,
    SOURCE,
    DestinationAction,
    DestinationEvent,
    DestinationState,
    SourceAction,
    SourceEvent,
    SourceState,
)
from splitserve.kv.messages import Cancel, Cancelled, Done, Failed, Message, Progress, Register
from splitserve.kv.outlet import Outlet
from splitserve.kv.source import SourceSide
from splitserve.kv.ticket import Claim, Counters, Offer, Results, TransferEnded, TransferKey
from splitserve.kv.transport import TransportError, WriteState

LAYERS = 2
KV = KvFormat("m", "float32", 16, LAYERS, 1, 8, 64, KvMode.PUSH, "model")
PREFILLER, DECODER = KvPeer("prefiller", "tcp://127.0.0.1:1"), KvPeer("decoder", "tcp://127.0.0.1:2")
PROMPT_BLOCKS = 4
KEYS = [TransferKey("one", 1), TransferKey("one", 2)]
HASHES = {"one": b"1" * 16}


def own_blocks(key: TransferKey) -> list[int]:
    return [100 * (KEYS.index(key) + 1) + block for block in range(PROMPT_BLOCKS)]


def claimed_blocks(key: TransferKey) -> list[int]:
    return [1000 + block for block in own_blocks(key)]


@dataclass(eq=False)
class ModelWrite:
    source: tuple[int, ...]
    destination: tuple[int, ...]
    state: WriteState = WriteState.IN_FLIGHT


@dataclass
class ModelTransport:
    """WRITEs stay in flight until the walk ends them."""

    connected: bool = True
    writes: list[ModelWrite] = field(default_factory=list)
    arrived: list[tuple[int, int, int]] = field(default_factory=list)

    address = b""

    def connect(self, peer: str, address: bytes) -> None:
        self.connected = True

    def disconnect(self, peer: str) -> None:
        self.connected = False
        for write in self.in_flight:
            write.state = WriteState.FAILED

    def write(self, peer: str, layer: int, source: Sequence[int], destination: Sequence[int]) -> object:
        if not self.connected:
            raise TransportError("not connected")
        self.arrived += [(layer, *pair) for pair in zip(source, destination, strict=True)]
        self.writes.append(ModelWrite(tuple(source), tuple(destination)))
        return self.writes[-1]

    def poll(self, handle: object) -> WriteState:
        assert isinstance(handle, ModelWrite)
        return handle.state

    def progress(self) -> None: ...

    def close(self) -> None: ...

    @property
    def in_flight(self) -> list[ModelWrite]:
        return [write for write in self.writes if write.state is WriteState.IN_FLIGHT]


class Walk:
    """One prefill worker, one decode worker, a few transfers, and everything that can happen to them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.to_source: list[Message] = []
        self.to_destination: list[Message] = []
        self.transport = ModelTransport()
        self.source_events: list[TransferEnded] = []
        self.destination_events: list[TransferEnded] = []
        self.source_out = Outlet(self._to_destination, self.source_events.append, Counters())
        self.destination_out = Outlet(self._to_source, self.destination_events.append, Counters())
        self.source = SourceSide(self.transport, self.source_out, KV, lease_s=30.0, stuck_s=10.0)
        self.destination = DestinationSide(self.destination_out, lambda _: None, retry_s=1.0)
        self.source_alive = self.destination_alive = True
        self.computed_blocks = dict.fromkeys(KEYS, 0)
        self.offered: set[TransferKey] = set()
        self.prefilled: set[TransferKey] = set()
        self.claimed: dict[TransferKey, bytes] = {}
        self.told_source = Results()
        self.told_destination = Results()

    # The engines -----------------------------------------------------------------------------------------------------
    def offer(self, key: TransferKey) -> None:
        if self.source_alive and key not in self.offered:
            self.offered.add(key)
            self.source.offer(Offer(key, DECODER, HASHES[key.transfer_id], PROMPT_BLOCKS), self.now)

    def chunk(self, key: TransferKey, blocks: int, layers: int = LAYERS) -> None:
        """A forward over `blocks` more blocks, or over its first layers only."""
        if self._runs(key):
            done = self.computed_blocks[key]
            end = min(done + blocks, PROMPT_BLOCKS)
            self.source.computing(key, own_blocks(key)[:end], done, self.now)
            for layer in range(layers):
                self.source.computed(layer, [(key, end)], self.now)
            if layers == LAYERS:
                self.computed_blocks[key] = end

    def end_prefill(self, key: TransferKey) -> None:
        if self._runs(key):
            self.chunk(key, PROMPT_BLOCKS)
            self.prefilled.add(key)
            self.source.prefill_ended(key, self.now, self.now)

    def abort_prefill(self, key: TransferKey) -> None:
        if self.source_alive and key in self.offered and key not in self.told_source.sent:
            self.prefilled.add(key)
            self.source.prefill_aborted(key, self.now)

    def preempt(self, key: TransferKey) -> None:
        """The engine waits until no WRITE reads the blocks, then gives them to somebody else."""
        if self._runs(key):
            over = threading.Event()
            self.source.drain([key], over)
            self.computed_blocks[key] = 0
            self.end_writes(WriteState.DONE)
            assert over.is_set()

    def claim(self, key: TransferKey, first: int = 0, limit_s: float = 60.0, wrong: bool = False) -> None:
        if self.destination_alive and key not in self.claimed:
            self.claimed[key] = b"x" * 16 if wrong else HASHES[key.transfer_id]
            blocks = tuple(claimed_blocks(key)[first:])
            self.destination.claim(Claim(key, PREFILLER, self.claimed[key], first, blocks, limit_s), self.now)

    def abandon(self, key: TransferKey) -> None:
        if self.destination_alive and key in self.claimed:
            self.destination.abandon(key, self.now)

    # Network, transport, time, death ---------------------------------------------------------------------------------
    def deliver_to_source(self) -> None:
        message = self.to_source.pop(0) if self.to_source else None
        if not self.source_alive or message is None:
            return
        if isinstance(message, Register):
            self.source.on_register("decoder", message, self.now)
        else:
            assert isinstance(message, Cancel)
            self.source.on_cancel("decoder", message, self.now)

    def deliver_to_destination(self) -> None:
        message = self.to_destination.pop(0) if self.to_destination else None
        if self.destination_alive and message is not None:
            assert isinstance(message, Progress | Done | Failed | Cancelled)
            self.destination.on_message("prefiller", message, self.now)

    def exchange(self) -> None:
        while self.to_source or self.to_destination:
            self.deliver_to_source()
            self.deliver_to_destination()

    def lose(self) -> None:
        for queue in (self.to_source, self.to_destination):
            del queue[:1]

    def repeat(self) -> None:
        for queue in (self.to_source, self.to_destination):
            queue[:1] = queue[:1] * 2

    def end_writes(self, state: WriteState, most: int = 1000) -> None:
        for write in self.transport.in_flight[:most]:
            write.state = state
        if self.source_alive:
            self.source.poll(self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.source_alive:
            self.source.poll(self.now)
            self.source.expire(self.now)
        if self.destination_alive:
            self.destination.expire(self.now)

    def hear_from_prefiller(self) -> None:
        if self.source_alive and self.destination_alive:
            self.destination.peer_up("prefiller", self.now)

    def miss_prefiller(self) -> None:
        if self.destination_alive:
            self.destination.peer_silent("prefiller", self.now)

    def kill_prefiller(self) -> None:
        """What it had sent is lost or late; the proof of its end is all that is sure to come."""
        if self.source_alive and self.destination_alive:
            self.source_alive = False
            self.end_writes(WriteState.FAILED)
            self.destination.peer_ended("prefiller", self.now)

    def kill_decoder(self) -> None:
        if self.source_alive and self.destination_alive:
            self.destination_alive = False
            self.source.peer_ended("decoder", self.now)

    # What must hold after every step ---------------------------------------------------------------------------------
    def check(self) -> None:
        _merge(self.told_source, self.source_out.take())
        _merge(self.told_destination, self.destination_out.take())
        told = self.told_destination
        fenced = told.received + told.failed + told.released
        self._check_writes(fenced)
        assert len(fenced) == len(set(fenced)), "a claim was named twice"
        assert len(self.told_source.sent) == len(set(self.told_source.sent)), "a prefill was named twice"
        for events in (self.source_events, self.destination_events):
            assert len(events) == len({event.key for event in events}), "an event came twice"
        for layer, source, destination in self.transport.arrived:
            assert destination == source + 1000, f"layer {layer}: a block went to the wrong place"
        for key in told.received:
            self._check_received(key)

    def _check_writes(self, fenced: Sequence[TransferKey]) -> None:
        given_back = {block for key in fenced for block in claimed_blocks(key)}
        freed = {block for key in self.told_source.sent for block in own_blocks(key)}
        for write in self.transport.in_flight:
            assert not (self.destination_alive and given_back.intersection(write.destination)), (
                "written after the fence"
            )
            assert not (self.source_alive and freed.intersection(write.source)), "read after it was given back"

    def _check_received(self, key: TransferKey) -> None:
        assert self.claimed[key] == HASHES[key.transfer_id], "KV of another prompt"
        arrived = {(layer, destination) for layer, _, destination in self.transport.arrived}
        assert (LAYERS - 1, claimed_blocks(key)[-1]) in arrived, "received before it was written"

    def come_to_rest(self) -> None:
        """Whatever happened: once both sides may speak and every prefill ends, all is given back."""
        self.hear_from_prefiller()
        for key in KEYS:
            self.end_prefill(key)
        for _ in range(40):
            self.end_writes(WriteState.DONE)
            self.check()
            self.exchange()
            self.check()
            self.pass_time(3.0)
        if self.source_alive:
            assert set(self.told_source.sent) == self.offered
            assert (self.source.pinned_blocks, self.source.owed, self.source.writing) == (0, 0, False)
        if self.destination_alive:
            told = self.told_destination
            assert set(told.received + told.failed + told.released) == set(self.claimed)
            assert (self.destination.quarantined_blocks, self.destination.open_claims) == (0, 0)

    def _runs(self, key: TransferKey) -> bool:
        return self.source_alive and key in self.offered and key not in self.prefilled

    def _to_destination(self, _: str, message: Message) -> None:
        self.to_destination.append(message)

    def _to_source(self, _: str, message: Message) -> None:
        self.to_source.append(message)


def _merge(all_told: Results, new: Results) -> None:
    all_told.received += new.received
    all_told.failed += new.failed
    all_told.released += new.released
    all_told.sent += new.sent


STEPS: list[Callable[[Walk, TransferKey], None]] = [
    Walk.offer,
    Walk.offer,
    lambda walk, key: walk.chunk(key, 1),
    lambda walk, key: walk.chunk(key, 2),
    lambda walk, key: walk.chunk(key, PROMPT_BLOCKS),
    lambda walk, key: walk.chunk(key, 2, layers=1),
    Walk.end_prefill,
    Walk.end_prefill,
    Walk.abort_prefill,
    Walk.preempt,
    Walk.claim,
    Walk.claim,
    lambda walk, key: walk.claim(key, first=2, limit_s=2.0),
    lambda walk, key: walk.claim(key, wrong=True),
    Walk.abandon,
    Walk.abandon,
    *[lambda walk, _: walk.exchange()] * 4,
    lambda walk, _: walk.deliver_to_source(),
    lambda walk, _: walk.deliver_to_destination(),
    lambda walk, _: walk.lose(),
    lambda walk, _: walk.repeat(),
    lambda walk, _: walk.end_writes(WriteState.DONE),
    lambda walk, _: walk.end_writes(WriteState.DONE, most=1),
    lambda walk, _: walk.end_writes(WriteState.FAILED, most=1),
    lambda walk, _: walk.pass_time(1.5),
    lambda walk, _: walk.pass_time(11.0),
    lambda walk, _: walk.pass_time(31.0),
    lambda walk, _: walk.miss_prefiller(),
    *[lambda walk, _: walk.hear_from_prefiller()] * 2,
    lambda walk, _: walk.kill_prefiller(),
    lambda walk, _: walk.kill_decoder(),
]


@settings(max_examples=1500)
@given(st.booleans(), st.binary(min_size=60, max_size=60))
def test_no_walk_breaks_a_safety_rule_and_every_walk_comes_to_rest(connected: bool, taken: bytes) -> None:
    take_walk(connected, taken)


def take_walks(count: int) -> None:
    dice = random.Random(0)
    for _ in range(count):
        take_walk(dice.random() < 0.5, dice.randbytes(60))


def take_walk(connected: bool, taken: bytes) -> None:
    """A byte is a step of one transfer or, above 190, of the other."""
    walk = Walk()
    if connected:
        walk.hear_from_prefiller()
    for byte in taken:
        STEPS[byte % len(STEPS)](walk, KEYS[byte > 190])
        walk.check()
    walk.come_to_rest()


_S, _E, _A = SourceState, SourceEvent, SourceAction
_D, _F, _B = DestinationState, DestinationEvent, DestinationAction


@pytest.mark.parametrize(
    ("table", "pair", "wrong"),
    [
        (SOURCE, (_S.PUSHING, _E.CANCEL), (_S.STOPPED, (_A.STOP, _A.CONFIRM_CANCEL))),
        (SOURCE, (_S.FINISHING, _E.CANCEL), (_S.ENDED, (_A.CONFIRM_CANCEL, _A.SENT))),
        (SOURCE, (_S.STOPPING, _E.PREFILL_ENDED), (_S.ENDED, (_A.SENT,))),
        (SOURCE, (_S.DELIVERED, _E.PREFILL_ENDED), (_S.ENDED, ())),
        (SOURCE, (_S.EARLY, _E.OFFER_MISMATCH), (_S.PUSHING, ())),
        (DESTINATION, (_D.REGISTERED, _F.ABANDON), (_D.ENDED, (_B.CANCEL, _B.RELEASED))),
        (DESTINATION, (_D.REGISTERED, _F.DEADLINE), (_D.ENDED, (_B.CANCEL, _B.FAILED))),
        (DESTINATION, (_D.REGISTERED, _F.PEER_SILENT), (_D.ENDED, (_B.FAILED,))),
        (DESTINATION, (_D.ABANDONED, _F.CANCELLED), (_D.ENDED, (_B.FAILED, _B.RELEASED))),
    ],
)
def test_a_table_that_breaks_a_rule_is_caught_by_the_walk(
    monkeypatch: pytest.MonkeyPatch, table: dict[object, object], pair: object, wrong: object
) -> None:
    monkeypatch.setitem(table, pair, wrong)
    with pytest.raises(AssertionError):
        take_walks(3000)


KEY = KEYS[0]


def connected() -> Walk:
    walk = Walk()
    walk.hear_from_prefiller()
    return walk


def pushing() -> Walk:
    """A claim with one block of each layer in flight."""
    walk = connected()
    walk.offer(KEY)
    walk.claim(KEY)
    walk.exchange()
    walk.chunk(KEY, 1)
    assert len(walk.transport.in_flight) == LAYERS
    return walk


def registration(walk: Walk) -> Register:
    """The Register that this walk's claim sends."""
    ticket = walk.destination._ledger.get(KEY)
    assert ticket is not None
    return ticket.register(walk.now)


def dropped(walk: Walk) -> dict[str, int]:
    return dict(walk.source_out.counters.dropped + walk.destination_out.counters.dropped)


def test_a_cancel_is_answered_only_after_the_last_write_ended() -> None:
    walk = pushing()
    walk.abandon(KEY)
    walk.exchange()
    assert walk.destination.quarantined_blocks == PROMPT_BLOCKS
    walk.chunk(KEY, PROMPT_BLOCKS)
    assert len(walk.transport.in_flight) == LAYERS, "a cancelled claim was written on"
    finish(walk)
    assert walk.destination_out.take().released == [KEY]
    assert walk.destination.quarantined_blocks == 0


def test_a_stuck_write_fails_its_claim_but_frees_nothing_until_it_ends() -> None:
    walk = pushing()
    walk.end_prefill(KEY)
    walk.now += 11.0
    walk.source.poll(walk.now)
    walk.exchange()
    assert not walk.source_out.take()
    assert not walk.destination_out.take()
    assert walk.source.pinned_blocks == PROMPT_BLOCKS
    finish(walk)
    assert walk.source_out.take().sent == [KEY]
    assert walk.destination_out.take().failed == [KEY]
    assert walk.source_out.counters.failures == {"stuck": 1}


def test_a_duplicate_register_is_answered_and_its_blocks_are_not_written_again() -> None:
    walk = pushing()
    written = list(walk.transport.arrived)
    for _ in range(3):
        walk.source.on_register("decoder", registration(walk), walk.now)
    assert walk.transport.arrived == written
    assert len(walk.to_destination) == 3
    assert all(isinstance(message, Progress) for message in walk.to_destination)


def test_a_register_after_the_end_hears_the_same_answer_again() -> None:
    walk = pushing()
    walk.end_prefill(KEY)
    late = registration(walk)
    finish(walk)
    walk.source.on_register("decoder", late, walk.now)
    assert isinstance(walk.to_destination[-1], Done)
    walk.exchange()
    assert dropped(walk) == {"destination done while ended": 1}


def test_a_transfer_that_has_ended_keeps_no_block_tables() -> None:
    """Thousands are remembered, and a long prompt has thousands of blocks."""
    walk = pushing()
    late = registration(walk)
    walk.chunk(KEY, PROMPT_BLOCKS)
    walk.end_prefill(KEY)
    finish(walk)
    source, destination = walk.source._ledger.get(KEY), walk.destination._ledger.get(KEY)
    assert source is not None
    assert destination is not None
    assert (source.register, source.cursor.table, destination.claim.blocks) == (None, (), ())
    walk.source.on_register("decoder", msgspec.structs.replace(late, blocks=late.blocks[::-1]), walk.now)
    assert isinstance(walk.to_destination[-1], Failed), "another claim under this ticket"
    walk.source.on_register("decoder", late, walk.now)
    assert isinstance(walk.to_destination[-1], Done), "a repetition of the claim"


def test_a_used_ticket_offered_again_for_another_prompt_gives_its_blocks_back() -> None:
    walk = pushing()
    walk.end_prefill(KEY)
    finish(walk)
    assert walk.source_out.take().sent == [KEY]
    walk.source.offer(Offer(KEY, DECODER, b"q" * 16, 1), walk.now)
    walk.source.prefill_ended(KEY, walk.now, walk.now)
    assert walk.source_out.take().sent == [KEY]


def test_messages_of_another_worker_are_counted_and_change_nothing() -> None:
    walk = pushing()
    walk.source.on_cancel("stranger", Cancel(KEY.transfer_id, KEY.epoch), walk.now)
    walk.destination.on_message("stranger", Failed(KEY.transfer_id, KEY.epoch, "forged"), walk.now)
    assert dropped(walk) == {"message from another worker": 2}
    walk.exchange()
    assert not walk.destination_out.take()


def test_an_early_claim_of_another_worker_does_not_get_the_offer() -> None:
    walk = connected()
    stolen = Register(KEY.transfer_id, KEY.epoch, HASHES["one"], 0, (1, 2, 3, 4), 60.0)
    walk.source.on_register("stranger", stolen, 0.0)
    walk.offer(KEY)
    walk.chunk(KEY, PROMPT_BLOCKS)
    assert not walk.transport.arrived
    assert dropped(walk) == {"message from another worker": 1}


def test_an_answer_of_another_epoch_is_dropped() -> None:
    walk = pushing()
    walk.destination.on_message("prefiller", Cancelled(KEY.transfer_id, 99), walk.now)
    assert dropped(walk) == {"cancelled for no claim": 1}
    assert not walk.destination_out.take()


def test_a_claim_beyond_the_prompt_is_refused() -> None:
    walk = connected()
    walk.offer(KEY)
    beyond = Register(KEY.transfer_id, KEY.epoch, HASHES["one"], 2, (1, 2, 3), 60.0)
    walk.source.on_register("decoder", beyond, 0.0)
    answer = walk.to_destination[-1]
    assert isinstance(answer, Failed)
    assert answer.message == "the claim names blocks 2 to 4, the prompt has 4"


def test_an_unclaimed_prefill_is_given_back_when_its_lease_ends_and_a_later_claim_fails() -> None:
    walk = connected()
    walk.offer(KEY)
    walk.end_prefill(KEY)
    walk.pass_time(29.0)
    assert walk.source.pinned_blocks == PROMPT_BLOCKS
    walk.pass_time(2.0)
    assert walk.source_out.take().sent == [KEY]
    walk.claim(KEY)
    walk.exchange()
    assert walk.destination_out.take().failed == [KEY]
    assert "nobody claimed" in walk.destination_events[-1].error
    assert not walk.transport.arrived, "blocks were read after the lease ended"


def test_an_early_claim_fails_at_its_deadline_if_no_prefill_comes() -> None:
    walk = connected()
    walk.claim(KEY, limit_s=2.0)
    walk.exchange()
    walk.source.expire(2.5)
    walk.exchange()
    assert walk.destination_out.take().failed == [KEY]
    assert walk.source.open_tickets == 0


def test_an_unacknowledged_register_is_repeated_and_an_acknowledged_one_rarely() -> None:
    walk = connected()
    walk.claim(KEY)
    walk.to_source.clear()
    walk.pass_time(1.5)
    assert len(walk.to_source) == 1
    walk.exchange()
    walk.pass_time(1.5)
    assert not walk.to_source
    walk.pass_time(11.0)
    assert len(walk.to_source) == 1


def test_nothing_is_repeated_to_a_silent_worker() -> None:
    walk = pushing()
    walk.miss_prefiller()
    walk.abandon(KEY)
    walk.to_source.clear()
    for _ in range(50):
        walk.now += 1.0
        walk.destination.expire(walk.now)
    assert not walk.to_source
    walk.hear_from_prefiller()
    assert [type(message) for message in walk.to_source] == [Cancel]


def test_writes_before_and_after_the_end_of_the_prefill_are_told_apart() -> None:
    walk = pushing()
    finish(walk)
    walk.now = 5.0
    walk.end_prefill(KEY)
    walk.now = 7.0
    finish(walk)
    stats = walk.source_events[0].stats
    block_bytes = KV.block_bytes * LAYERS
    assert (stats.bytes, stats.bytes_before_prefill_ended) == (PROMPT_BLOCKS * block_bytes, block_bytes)
    assert stats.uncovered_s == 2.0
    assert walk.destination_events[0].stats == stats


def test_a_claim_written_before_the_prefill_ends_is_done_at_once_and_its_end_is_told_once() -> None:
    walk = pushing()
    walk.chunk(KEY, PROMPT_BLOCKS)
    finish(walk)
    assert walk.destination_out.take().received == [KEY]
    assert not walk.source_out.take()
    walk.now = 3.0
    walk.end_prefill(KEY)
    assert walk.source_out.take().sent == [KEY]
    assert walk.source_events[0].stats.uncovered_s == -3.0


def finish(walk: Walk) -> None:
    while walk.transport.in_flight:
        walk.end_writes(WriteState.DONE)
    walk.exchange()
