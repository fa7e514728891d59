"""Both sides of a transfer against a model of everything between them: messages that wait, vanish and repeat, WRITEs that
take their time or fail, processes that die. Random walks over it never break a safety rule and always come to rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from splitserve.core.worker import KvFormat, KvMode, KvPeer
from splitserve.kv.destination import DestinationSide
from splitserve.kv.messages import Cancel, Cancelled, Done, Failed, Message, Progress, Register
from splitserve.kv.outlet import Outlet
from splitserve.kv.source import SourceSide
from splitserve.kv.ticket import Claim, Counters, Offer, Results, TransferEnded, TransferKey
from splitserve.kv.transport import TransportError, WriteState

LAYERS = 2
KV = KvFormat("m", "float32", 16, LAYERS, 1, 8, 64, KvMode.PUSH, "model")
PREFILLER, DECODER = KvPeer("prefiller", "tcp://127.0.0.1:1"), KvPeer("decoder", "tcp://127.0.0.1:2")
PROMPT_BLOCKS = 4
KEYS = [TransferKey("one", 1), TransferKey("two", 1), TransferKey("two", 2)]
HASHES = {"one": b"1" * 16, "two": b"2" * 16}
keys = st.sampled_from(KEYS)


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


class TransferWalk(RuleBasedStateMachine):
    """One prefill worker, one decode worker, three transfers."""

    def __init__(self) -> None:
        super().__init__()
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
        self.offered: set[TransferKey] = set()
        self.ended: set[TransferKey] = set()
        self.claimed: set[TransferKey] = set()
        self.told_source = Results()
        self.told_destination = Results()

    def _to_destination(self, _: str, message: Message) -> None:
        self.to_destination.append(message)

    def _to_source(self, _: str, message: Message) -> None:
        self.to_source.append(message)

    # The engines -----------------------------------------------------------------------------------------------------
    @initialize(early=st.booleans())
    def meet(self, early: bool) -> None:
        if early:
            self.destination.peer_up("prefiller", self.now)

    @rule(key=keys)
    @precondition(lambda self: self.source_alive)
    def offer(self, key: TransferKey) -> None:
        if key not in self.offered:
            self.offered.add(key)
            self.source.offer(Offer(key, DECODER, HASHES[key.transfer_id], PROMPT_BLOCKS), self.now)

    @rule(key=keys, blocks=st.integers(1, PROMPT_BLOCKS), cached=st.integers(0, PROMPT_BLOCKS))
    def computing(self, key: TransferKey, blocks: int, cached: int) -> None:
        if self._runs(key):
            self.source.computing(key, own_blocks(key)[:blocks], cached, self.now)

    @rule(key=keys, layer=st.integers(0, LAYERS - 1), blocks=st.integers(0, PROMPT_BLOCKS))
    def computed(self, key: TransferKey, layer: int, blocks: int) -> None:
        if self._runs(key):
            self.source.computed(layer, [(key, blocks)], self.now)

    @rule(key=keys)
    def prefill_ended(self, key: TransferKey) -> None:
        if self._runs(key):
            self.ended.add(key)
            self.source.computing(key, own_blocks(key), PROMPT_BLOCKS, self.now)
            self.source.prefill_ended(key, self.now, self.now)

    @rule(key=keys)
    def prefill_aborted(self, key: TransferKey) -> None:
        if self.source_alive and key in self.offered and key not in self.told_source.sent:
            self.ended.add(key)
            self.source.prefill_aborted(key, self.now)

    @rule(key=keys, first=st.integers(0, PROMPT_BLOCKS - 1), wrong=st.booleans(), limit_s=st.sampled_from([2.0, 60.0]))
    @precondition(lambda self: self.destination_alive)
    def claim(self, key: TransferKey, first: int, wrong: bool, limit_s: float) -> None:
        if key not in self.claimed:
            self.claimed.add(key)
            digest = b"x" * 16 if wrong else HASHES[key.transfer_id]
            claim = Claim(key, PREFILLER, digest, first, tuple(claimed_blocks(key)[first:]), limit_s)
            self.destination.claim(claim, self.now)

    @rule(key=keys)
    @precondition(lambda self: self.destination_alive)
    def abandon(self, key: TransferKey) -> None:
        if key in self.claimed:
            self.destination.abandon(key, self.now)

    # The network, the transport, time --------------------------------------------------------------------------------
    @rule()
    def deliver_to_source(self) -> None:
        if self.to_source and self.source_alive:
            self._source_hears(self.to_source.pop(0))

    @rule()
    def deliver_to_destination(self) -> None:
        if self.to_destination and self.destination_alive:
            self._destination_hears(self.to_destination.pop(0))

    @rule(towards_source=st.booleans(), again=st.booleans())
    def lose_or_repeat(self, towards_source: bool, again: bool) -> None:
        queue = self.to_source if towards_source else self.to_destination
        if queue:
            queue[:1] = [queue[0]] * 2 if again else []

    @rule(which=st.integers(0, 5), state=st.sampled_from([WriteState.DONE, WriteState.DONE, WriteState.FAILED]))
    def end_a_write(self, which: int, state: WriteState) -> None:
        if self.transport.in_flight:
            in_flight = self.transport.in_flight
            in_flight[which % len(in_flight)].state = state

    @rule()
    @precondition(lambda self: self.source_alive)
    def poll(self) -> None:
        self.source.poll(self.now)

    @rule(seconds=st.sampled_from([0.1, 1.5, 11.0, 31.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if self.source_alive:
            self.source.expire(self.now)
        if self.destination_alive:
            self.destination.expire(self.now)

    @rule(up=st.booleans())
    @precondition(lambda self: self.destination_alive and self.source_alive)
    def prefiller_is_silent_or_back(self, up: bool) -> None:
        (self.destination.peer_up if up else self.destination.peer_silent)("prefiller", self.now)

    @rule()
    @precondition(lambda self: self.source_alive and self.destination_alive)
    def prefiller_dies(self) -> None:
        self.source_alive = False
        for write in self.transport.in_flight:
            write.state = WriteState.FAILED
        self.destination.peer_ended("prefiller", self.now)

    @rule()
    @precondition(lambda self: self.source_alive and self.destination_alive)
    def decoder_dies(self) -> None:
        self.destination_alive = False
        self.source.peer_ended("decoder", self.now)

    # What must hold at every step ------------------------------------------------------------------------------------
    @invariant()
    def nobody_writes_blocks_that_the_destination_was_given_back(self) -> None:
        self._collect()
        told = self.told_destination
        free = {block for key in told.received + told.failed + told.released for block in claimed_blocks(key)}
        written = {block for write in self.transport.in_flight for block in write.destination}
        assert not (self.destination_alive and written & free)

    @invariant()
    def nobody_reads_blocks_that_the_source_was_given_back(self) -> None:
        free = {block for key in self.told_source.sent for block in own_blocks(key)}
        read = {block for write in self.transport.in_flight for block in write.source}
        assert not (self.source_alive and read & free)

    @invariant()
    def nothing_is_told_twice(self) -> None:
        told = self.told_destination
        for names in (self.told_source.sent, told.received + told.failed + told.released):
            assert len(names) == len(set(names))
        for events in (self.source_events, self.destination_events):
            assert len(events) == len({event.key for event in events})

    @invariant()
    def what_was_received_was_all_written(self) -> None:
        for event in self.destination_events:
            if not event.error:
                claimed = {arrived[2] for arrived in self.transport.arrived}
                last = claimed_blocks(event.key)[-1]
                assert last in claimed
        for layer, source, destination in self.transport.arrived:
            assert destination == source + 1000, layer

    @invariant()
    def no_claim_of_another_prompt_is_ever_written(self) -> None:
        for key in self.told_destination.received:
            assert self._digest(key) == HASHES[key.transfer_id]

    # In the end ------------------------------------------------------------------------------------------------------
    def teardown(self) -> None:
        """Whatever happened: once both sides may speak and every prefill ends, all comes to rest."""
        if self.source_alive and self.destination_alive:
            self.destination.peer_up("prefiller", self.now)
        for key in KEYS:
            self.prefill_ended(key)
        for _ in range(40):
            self._breathe()
        self._collect()
        told = self.told_destination
        if self.source_alive:
            assert set(self.told_source.sent) == self.offered
            assert (self.source.pinned_blocks, self.source.owed, self.source.writing) == (0, 0, False)
        if self.destination_alive:
            assert set(told.received + told.failed + told.released) == self.claimed
            assert (self.destination.quarantined_blocks, self.destination.open_claims) == (0, 0)

    def _breathe(self) -> None:
        for write in self.transport.in_flight:
            write.state = WriteState.DONE
        if self.source_alive:
            self.source.poll(self.now)
        while self.to_source and self.source_alive:
            self._source_hears(self.to_source.pop(0))
        while self.to_destination and self.destination_alive:
            self._destination_hears(self.to_destination.pop(0))
        self.pass_time(3.0)
        self._hold_all()

    def _hold_all(self) -> None:
        for check in (
            self.nobody_writes_blocks_that_the_destination_was_given_back,
            self.nobody_reads_blocks_that_the_source_was_given_back,
            self.nothing_is_told_twice,
        ):
            check()

    def _runs(self, key: TransferKey) -> bool:
        return self.source_alive and key in self.offered and key not in self.ended

    def _digest(self, key: TransferKey) -> bytes:
        ticket = self.destination._ledger.get(key)
        assert ticket is not None
        return ticket.claim.prompt_hash

    def _source_hears(self, message: Message) -> None:
        if isinstance(message, Register):
            self.source.on_register("decoder", message, self.now)
        else:
            assert isinstance(message, Cancel)
            self.source.on_cancel("decoder", message, self.now)

    def _destination_hears(self, message: Message) -> None:
        assert isinstance(message, Progress | Done | Failed | Cancelled)
        self.destination.on_message("prefiller", message, self.now)

    def _collect(self) -> None:
        _merge(self.told_source, self.source_out.take())
        _merge(self.told_destination, self.destination_out.take())


def _merge(all_told: Results, new: Results) -> None:
    all_told.received += new.received
    all_told.failed += new.failed
    all_told.released += new.released
    all_told.sent += new.sent


TestTransferWalk = TransferWalk.TestCase
TestTransferWalk.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


# Rules that a random walk meets too rarely ---------------------------------------------------------------------------
class Sides:
    """A walk that a test steers."""

    def __init__(self, key: TransferKey = KEYS[0]) -> None:
        self.walk = TransferWalk()
        self.key = key
        self.walk.meet(early=True)

    def exchange(self) -> None:
        self.walk.deliver_to_source()
        while self.walk.to_source or self.walk.to_destination:
            self.walk.deliver_to_source()
            self.walk.deliver_to_destination()

    def dropped(self) -> dict[str, int]:
        return dict(self.walk.source_out.counters.dropped + self.walk.destination_out.counters.dropped)


def pushing() -> Sides:
    """A claim with a WRITE in flight."""
    sides = Sides()
    sides.walk.offer(sides.key)
    sides.walk.claim(sides.key, 0, False, 60.0)
    sides.exchange()
    sides.walk.computing(sides.key, PROMPT_BLOCKS, 1)
    assert sides.walk.transport.in_flight
    return sides


def test_a_cancel_is_answered_only_after_the_last_write_ended() -> None:
    sides = pushing()
    sides.walk.abandon(sides.key)
    sides.exchange()
    assert sides.walk.destination.quarantined_blocks == PROMPT_BLOCKS
    sides.walk.computed(sides.key, 0, PROMPT_BLOCKS)
    assert len(sides.walk.transport.in_flight) == LAYERS, "a cancelled claim was written on"
    _end_writes(sides)
    assert sides.walk.destination_out.take().released == [sides.key]
    assert sides.walk.destination.quarantined_blocks == 0


def test_a_stuck_write_fails_its_claim_but_frees_nothing_until_it_ends() -> None:
    sides = pushing()
    sides.walk.prefill_ended(sides.key)
    sides.walk.now += 11.0
    sides.walk.source.poll(sides.walk.now)
    sides.exchange()
    assert not sides.walk.source_out.take()
    assert not sides.walk.destination_out.take()
    assert sides.walk.source.pinned_blocks == PROMPT_BLOCKS
    _end_writes(sides)
    assert sides.walk.source_out.take().sent == [sides.key]
    assert sides.walk.destination_out.take().failed == [sides.key]
    assert sides.walk.source_out.counters.failures == {"stuck": 1}


def test_a_duplicate_register_is_answered_and_its_blocks_are_not_written_again() -> None:
    sides = pushing()
    ticket = sides.walk.destination._ledger.get(sides.key)
    assert ticket is not None
    written = list(sides.walk.transport.arrived)
    for _ in range(3):
        sides.walk.source.on_register("decoder", ticket.register(sides.walk.now), sides.walk.now)
    assert sides.walk.transport.arrived == written
    assert len(sides.walk.to_destination) == 3
    assert all(isinstance(message, Progress) for message in sides.walk.to_destination)


def test_a_register_after_the_end_hears_the_same_answer_again() -> None:
    sides = pushing()
    sides.walk.prefill_ended(sides.key)
    ticket = sides.walk.destination._ledger.get(sides.key)
    assert ticket is not None
    _end_writes(sides)
    sides.walk.source.on_register("decoder", ticket.register(sides.walk.now), sides.walk.now)
    assert isinstance(sides.walk.to_destination[-1], Done)
    sides.exchange()
    assert sides.dropped() == {"destination done while ended": 1}


def test_messages_of_another_worker_are_counted_and_change_nothing() -> None:
    sides = pushing()
    walk, key = sides.walk, sides.key
    walk.source.on_cancel("stranger", Cancel(key.transfer_id, key.epoch), walk.now)
    walk.destination.on_message("stranger", Failed(key.transfer_id, key.epoch, "forged"), walk.now)
    assert sides.dropped() == {"message from another worker": 2}
    sides.exchange()
    assert not walk.destination_out.take()


def test_an_early_claim_of_another_worker_does_not_get_the_offer() -> None:
    sides = Sides()
    stolen = Register(sides.key.transfer_id, sides.key.epoch, HASHES["one"], 0, (1, 2, 3, 4), 60.0)
    sides.walk.source.on_register("stranger", stolen, 0.0)
    sides.walk.offer(sides.key)
    sides.walk.computing(sides.key, PROMPT_BLOCKS, PROMPT_BLOCKS)
    assert not sides.walk.transport.arrived
    assert sides.dropped() == {"message from another worker": 1}


def test_an_answer_of_another_epoch_is_dropped() -> None:
    sides = pushing()
    sides.walk.destination.on_message("prefiller", Cancelled(sides.key.transfer_id, 99), sides.walk.now)
    assert sides.dropped() == {"cancelled for no claim": 1}
    assert not sides.walk.destination_out.take()


def test_a_claim_beyond_the_prompt_is_refused() -> None:
    sides = Sides()
    sides.walk.offer(sides.key)
    beyond = Register(sides.key.transfer_id, sides.key.epoch, HASHES["one"], 2, (1, 2, 3), 60.0)
    sides.walk.source.on_register("decoder", beyond, 0.0)
    answer = sides.walk.to_destination[-1]
    assert isinstance(answer, Failed)
    assert answer.message == "the claim names blocks 2 to 4, the prompt has 4"


def test_an_unclaimed_prefill_is_given_back_when_its_lease_ends_and_a_later_claim_fails() -> None:
    sides = Sides()
    sides.walk.offer(sides.key)
    sides.walk.prefill_ended(sides.key)
    sides.walk.pass_time(29.0)
    assert sides.walk.source.pinned_blocks == PROMPT_BLOCKS
    sides.walk.pass_time(2.0)
    assert sides.walk.source_out.take().sent == [sides.key]
    sides.walk.claim(sides.key, 0, False, 60.0)
    sides.exchange()
    assert sides.walk.destination_out.take().failed == [sides.key]
    assert "nobody claimed" in sides.walk.destination_events[-1].error
    assert not sides.walk.transport.arrived, "blocks were read after the lease ended"


def test_an_early_claim_fails_at_its_deadline_if_no_prefill_comes() -> None:
    sides = Sides()
    sides.walk.claim(sides.key, 0, False, 2.0)
    sides.exchange()
    sides.walk.source.expire(2.5)
    sides.exchange()
    assert sides.walk.destination_out.take().failed == [sides.key]
    assert sides.walk.source.open_tickets == 0


def test_an_unacknowledged_register_is_repeated_and_an_acknowledged_one_rarely() -> None:
    sides = Sides()
    sides.walk.claim(sides.key, 0, False, 60.0)
    sides.walk.to_source.clear()
    sides.walk.pass_time(1.5)
    assert len(sides.walk.to_source) == 1
    sides.exchange()
    sides.walk.pass_time(1.5)
    assert not sides.walk.to_source
    sides.walk.pass_time(11.0)
    assert len(sides.walk.to_source) == 1


def test_nothing_is_repeated_to_a_silent_worker() -> None:
    sides = pushing()
    sides.walk.prefiller_is_silent_or_back(up=False)
    sides.walk.abandon(sides.key)
    sides.walk.to_source.clear()
    for _ in range(50):
        sides.walk.now += 1.0
        sides.walk.destination.expire(sides.walk.now)
    assert not sides.walk.to_source
    sides.walk.prefiller_is_silent_or_back(up=True)
    assert [type(message) for message in sides.walk.to_source] == [Cancel]


def test_writes_before_and_after_the_end_of_the_prefill_are_told_apart() -> None:
    sides = pushing()
    _end_writes(sides)
    sides.walk.now = 5.0
    sides.walk.prefill_ended(sides.key)
    sides.walk.now = 7.0
    _end_writes(sides)
    stats = sides.walk.source_events[0].stats
    block_bytes = KV.block_bytes * LAYERS
    assert (stats.bytes, stats.bytes_before_prefill_ended) == (PROMPT_BLOCKS * block_bytes, block_bytes)
    assert stats.uncovered_s == 2.0
    assert sides.walk.destination_events[0].stats == stats


def test_a_claim_written_before_the_prefill_ends_is_done_at_once_and_its_end_is_told_once() -> None:
    sides = pushing()
    for layer in range(LAYERS):
        sides.walk.computed(sides.key, layer, PROMPT_BLOCKS)
    _end_writes(sides)
    assert sides.walk.destination_out.take().received == [sides.key]
    assert not sides.walk.source_out.take()
    sides.walk.now = 3.0
    sides.walk.prefill_ended(sides.key)
    assert sides.walk.source_out.take().sent == [sides.key]
    assert sides.walk.source_events[0].stats.uncovered_s == -3.0


def _end_writes(sides: Sides) -> None:
    ending: Callable[[], list[ModelWrite]] = lambda: sides.walk.transport.in_flight  # noqa: E731
    while ending():
        for write in ending():
            write.state = WriteState.DONE
        sides.walk.source.poll(sides.walk.now)
    sides.exchange()
