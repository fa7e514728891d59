"""What both sides of a transfer do, step by step: the test delivers each letter and ends each WRITE."""

import msgspec
import pytest

from splitserve.kv.layout import prompt_hash
from splitserve.kv.messages import Cancel, Cancelled, Codec, Done, Failed, GroupTable, Message, Progress, Register
from splitserve.kv.ticket import Offer, Table, TransferKey
from splitserve.kv.transport import WriteState
from tests.unit.kv.blocks import GROUPS, SLOT, Prompt
from tests.unit.kv.numbered import Shape
from tests.unit.kv.rank import Rank
from tests.unit.kv.world import World

KEY = TransferKey("one", 1)
LAYERS, SIZE, PROMPT_BLOCKS = 2, 4, 4
TOKENS = PROMPT_BLOCKS * SIZE
BLOCK_BYTES = SIZE * SLOT
PREFILLER, DECODER = "a/0", "b/0"


class Bench(World):
    """One transfer from worker "a" to worker "b", over the ranks that the test says."""

    def __init__(self, one: Shape | None = None, other: Shape | None = None, heads: int = 1) -> None:
        super().__init__(one or Shape(), other or Shape(), LAYERS, heads)
        self.prompts[KEY] = Prompt.of(1, TOKENS, LAYERS, heads)
        self.prompt = self.prompts[KEY]
        self.prefiller, self.decoder = self.a[0], self.b[0]

    def offer(self) -> None:
        for rank in self.a:
            rank.offer(KEY, self.prompt, self.b)

    def claim(self, limit_s: float = 60.0) -> None:
        for rank in self.b:
            rank.claim(KEY, self.prompt, self.a, limit_s=limit_s)

    def chunk(self, blocks: int) -> None:
        """A forward, up to this block."""
        for rank in self.a:
            rank.chunk(KEY, blocks * SIZE)

    def end_prefill(self) -> None:
        for rank in self.a:
            rank.end_prefill(KEY)

    def abandon(self) -> None:
        for rank in self.b:
            rank.abandon(KEY)

    def registration(self, rank: Rank | None = None, peer: str = PREFILLER) -> Register:
        """The Register that this rank's claim sends."""
        ticket = (rank or self.decoder).destination._ledger.get(KEY.leg(peer))
        assert ticket is not None
        assert ticket.register is not None
        return ticket.register

    def waiting(self, recipient: str) -> list[Message]:
        """Letters to this rank that are not delivered, in order."""
        letters = (*self.returned, *self.letters)
        return [Codec("test").decode(frame)[2] for _, to, frame in letters if to == recipient]

    def dropped(self) -> dict[str, int]:
        counts = [rank.outlet.counters.dropped for rank in self.ranks.values()]
        return dict(sum(counts[1:], counts[0]))

    def failures(self, rank: Rank) -> dict[str, int]:
        return dict(rank.outlet.counters.failures)


def connected(one: Shape | None = None, other: Shape | None = None, heads: int = 1) -> Bench:
    bench = Bench(one, other, heads)
    bench.meet()
    return bench


def pushing(one: Shape | None = None, other: Shape | None = None, heads: int = 1) -> Bench:
    """A claim with one block of each layer in flight."""
    bench = connected(one, other, heads)
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.chunk(1)
    return bench


# Answers -------------------------------------------------------------------------------------------------------------
def test_a_cancel_is_answered_only_after_the_last_write_ended() -> None:
    bench = pushing()
    bench.abandon()
    bench.exchange()
    assert bench.decoder.destination.quarantined_blocks == PROMPT_BLOCKS * GROUPS
    bench.chunk(PROMPT_BLOCKS)
    assert len(bench.in_flight) == LAYERS, "a cancelled claim was written on"
    assert not bench.decoder.told
    bench.finish()
    assert bench.decoder.told.released == [KEY]
    bench.end_prefill()
    bench.assert_at_rest()


def test_a_stuck_write_fails_its_claim_but_frees_nothing_until_it_ends() -> None:
    bench = pushing()
    bench.end_prefill()
    bench.now += 11.0
    bench.prefiller.poll()
    bench.exchange()
    assert not bench.prefiller.told
    assert not bench.decoder.told
    assert bench.prefiller.source.pinned_blocks == PROMPT_BLOCKS * GROUPS
    bench.finish()
    assert bench.prefiller.told.sent == [KEY]
    assert bench.decoder.told.failed == [KEY]
    assert bench.failures(bench.prefiller) == {"stuck": 1}
    bench.assert_at_rest()


def test_a_duplicate_register_is_answered_and_its_blocks_are_not_written_again() -> None:
    bench = pushing()
    for _ in range(3):
        bench.prefiller.source.on_register(DECODER, bench.registration(), bench.now)
    assert len(bench.in_flight) == LAYERS
    assert [type(message) for message in bench.waiting(DECODER)] == [Progress] * 3


def test_a_register_after_the_end_hears_the_same_answer_again() -> None:
    bench = pushing()
    bench.end_prefill()
    late = bench.registration()
    bench.finish()
    bench.prefiller.source.on_register(DECODER, late, bench.now)
    assert [type(message) for message in bench.waiting(DECODER)] == [Done]
    bench.exchange()
    assert bench.dropped() == {"destination done while ended": 1}


def test_a_transfer_that_has_ended_keeps_no_block_tables() -> None:
    """Thousands are remembered, and a long prompt has thousands of blocks."""
    bench = pushing()
    late = bench.registration()
    bench.end_prefill()
    bench.finish()
    source = bench.prefiller.source._ledger.get(KEY.leg(DECODER))
    destination = bench.decoder.destination._ledger.get(KEY.leg(PREFILLER))
    assert source is not None
    assert destination is not None
    assert (source.offer, source.register, source.cursor, destination.register) == (None, None, None, None)
    assert (bench.prefiller.source.owed, bench.decoder.destination.open_claims) == (0, 0)
    other = msgspec.structs.replace(late, tables=late.tables[::-1])
    bench.prefiller.source.on_register(DECODER, other, bench.now)
    assert isinstance(bench.waiting(DECODER)[-1], Failed), "another claim under this ticket"
    bench.prefiller.source.on_register(DECODER, late, bench.now)
    assert isinstance(bench.waiting(DECODER)[-1], Done), "a repetition of the claim"


def test_a_used_ticket_offered_again_for_another_prompt_gives_its_blocks_back() -> None:
    bench = pushing()
    bench.end_prefill()
    bench.finish()
    assert bench.prefiller.told.sent == [KEY]
    posted = bench.transports[PREFILLER].posted
    bench.prefiller.offer(KEY, Prompt.of(2, SIZE, LAYERS, 1), bench.b)
    bench.end_prefill()
    bench.step()
    assert bench.prefiller.told.sent == [KEY, KEY]
    assert bench.transports[PREFILLER].posted == posted
    bench.assert_at_rest()


def test_a_ticket_used_before_is_refused_at_the_destination_at_once() -> None:
    bench = pushing()
    bench.end_prefill()
    bench.finish()
    bench.decoder.end_decode(KEY)
    bench.claim()
    bench.step()
    assert bench.decoder.told.failed == [KEY]
    assert "was used before" in bench.decoder.events[-1].error
    assert not bench.letters
    bench.assert_at_rest()


def test_a_claim_that_its_source_calls_cancelled_without_being_asked_has_failed() -> None:
    bench = pushing()
    bench.end_writes()
    bench.decoder.destination.on_message(PREFILLER, Cancelled(KEY.transfer_id, KEY.epoch), bench.now)
    bench.step()
    assert bench.decoder.told.failed == [KEY]
    assert bench.decoder.events[0].error == "the prefill worker had this claim cancelled"


def test_an_answer_of_another_epoch_is_dropped() -> None:
    bench = pushing()
    bench.decoder.destination.on_message(PREFILLER, Cancelled(KEY.transfer_id, 99), bench.now)
    assert bench.dropped() == {"cancelled for no claim": 1}
    assert not bench.decoder.outlet.take()


# Strangers -----------------------------------------------------------------------------------------------------------
def test_messages_of_another_worker_are_counted_and_change_nothing() -> None:
    bench = pushing()
    bench.prefiller.source.on_cancel("stranger", Cancel(KEY.transfer_id, KEY.epoch), bench.now)
    bench.decoder.destination.on_message("stranger", Failed(KEY.transfer_id, KEY.epoch, "forged"), bench.now)
    assert bench.dropped() == {"message from another worker": 1, "failed for no claim": 1}
    bench.end_prefill()
    bench.finish()
    assert bench.decoder.told.received == [KEY]
    bench.decoder.end_decode(KEY)
    bench.assert_at_rest()


@pytest.mark.parametrize("early", [False, True])
def test_a_strangers_claim_gets_nothing_of_a_prefill_and_costs_it_nothing(early: bool) -> None:
    bench = connected()
    stolen = Register(KEY.transfer_id, KEY.epoch, prompt_hash(bench.prompt.tokens), TOKENS, _tables(4, 4), 60.0)
    if early:
        bench.prefiller.source.on_register("stranger", stolen, 0.0)
    bench.offer()
    if not early:
        bench.prefiller.source.on_register("stranger", stolen, 0.0)
        assert bench.dropped() == {"message from another worker": 1}
    bench.chunk(PROMPT_BLOCKS)
    assert not bench.in_flight
    bench.claim()
    bench.end_prefill()
    bench.exchange()
    bench.finish()
    assert bench.decoder.told.received == [KEY]
    assert bench.prefiller.told.sent == [KEY]
    bench.decoder.end_decode(KEY)
    bench.pass_time(61.0)
    bench.assert_at_rest()
    answers = [message for message in bench.waiting("stranger") if not isinstance(message, Progress)]
    assert [type(message) for message in answers] == ([Failed] if early else [])


def test_a_strangers_cancel_before_the_offer_does_not_stop_the_claim_that_comes() -> None:
    bench = connected()
    bench.prefiller.source.on_cancel("stranger", Cancel(KEY.transfer_id, KEY.epoch), 0.0)
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.end_prefill()
    bench.finish()
    assert bench.decoder.told.received == [KEY]


# Claims that do not fit ----------------------------------------------------------------------------------------------
def _tables(*blocks: int, first: int = 0) -> tuple[GroupTable, ...]:
    return tuple(GroupTable(first, tuple(range(count))) for count in blocks)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("tokens", "tables", "sentence"),
    [
        (TOKENS + 1, _tables(5, 5), f"the claim names {TOKENS + 1} tokens, the prompt has {TOKENS}"),
        (TOKENS, _tables(3, 3, first=2), "the claim names blocks 2 to 4, its tokens take 4"),
        (TOKENS, _tables(3, 4), "the claim names blocks 0 to 2, its tokens take 4"),
        (TOKENS - SIZE, _tables(4, 3), "the claim names blocks 0 to 3, its tokens take 3"),
        (TOKENS, (), "the claim has 0 block tables, none for KV group 0"),
    ],
)
def test_a_claim_whose_blocks_are_not_its_tokens_is_refused_with_the_reason(
    early: bool, tokens: int, tables: tuple[GroupTable, ...], sentence: str
) -> None:
    bench = connected()
    hashed = prompt_hash(bench.prompt.tokens[:tokens])
    claim = Register(KEY.transfer_id, KEY.epoch, hashed, tokens, tables, 60.0)
    if early:
        bench.prefiller.source.on_register(DECODER, claim, 0.0)
    bench.offer()
    if not early:
        bench.prefiller.source.on_register(DECODER, claim, 0.0)
    answer = bench.waiting(DECODER)[-1]
    assert isinstance(answer, Failed)
    assert answer.message == sentence
    bench.chunk(PROMPT_BLOCKS)
    bench.end_prefill()
    bench.step()
    assert bench.transports[PREFILLER].posted == 0
    assert bench.prefiller.told.sent == [KEY]


def test_a_claim_needs_tables_for_the_groups_of_its_own_layers_alone() -> None:
    """A table that nobody reads may be missing: a rank of a later stage has other groups."""
    bench = connected()
    hashed = prompt_hash(bench.prompt.tokens)
    claim = Register(KEY.transfer_id, KEY.epoch, hashed, TOKENS, _tables(PROMPT_BLOCKS), 60.0)
    bench.offer()
    bench.prefiller.source.on_register(DECODER, claim, 0.0)
    assert isinstance(bench.waiting(DECODER)[-1], Progress)


def test_a_claim_on_the_beginning_of_a_prompt_is_checked_by_the_hash_of_that_beginning() -> None:
    bench = connected()
    bench.offer()
    bench.decoder.claim(KEY, bench.prompt, bench.a, tokens=TOKENS - 3)
    bench.exchange()
    bench.end_prefill()
    bench.finish()
    assert bench.decoder.told.received == [KEY]


def test_a_claim_of_a_rank_that_could_not_be_connected_is_refused() -> None:
    bench = Bench()
    bench.decoder.meet(bench.prefiller)
    bench.prefiller.known.add(DECODER)  # it speaks, but its memory can't be reached
    bench.offer()
    bench.claim()
    bench.exchange()
    assert bench.failures(bench.decoder) == {"unconnected": 1}
    bench.end_prefill()
    bench.assert_at_rest()


# Time ----------------------------------------------------------------------------------------------------------------
def test_an_unclaimed_prefill_is_given_back_when_its_lease_ends_and_a_later_claim_fails() -> None:
    bench = connected()
    bench.offer()
    bench.end_prefill()
    bench.pass_time(29.0)
    assert bench.prefiller.source.pinned_blocks == PROMPT_BLOCKS * GROUPS
    bench.pass_time(2.0)
    assert bench.prefiller.told.sent == [KEY]
    bench.claim()
    bench.exchange()
    assert bench.decoder.told.failed == [KEY]
    assert "nobody claimed" in bench.decoder.events[-1].error
    assert bench.transports[PREFILLER].posted == 0, "blocks were read after the lease ended"
    bench.assert_at_rest()


def test_an_early_claim_fails_at_its_deadline_if_no_prefill_comes() -> None:
    bench = connected()
    bench.claim(limit_s=2.0)
    bench.exchange()
    bench.prefiller.source.expire(2.5)
    bench.exchange()
    assert bench.decoder.told.failed == [KEY]
    bench.assert_at_rest()


def test_an_unacknowledged_register_is_repeated_and_an_acknowledged_one_rarely() -> None:
    bench = connected()
    bench.claim()
    bench.letters.clear()
    bench.pass_time(1.5)
    assert len(bench.letters) == 1
    bench.exchange()
    bench.pass_time(1.5)
    assert not bench.letters
    bench.pass_time(11.0)
    assert len(bench.letters) == 1


def test_a_cancel_that_was_lost_is_repeated_although_the_source_tells_of_progress() -> None:
    bench = pushing()
    bench.abandon()
    bench.letters.clear()
    for _ in range(10):
        bench.pass_time(0.6)
        if any(isinstance(message, Cancel) for message in bench.waiting(PREFILLER)):
            break
        bench.exchange()
    else:
        pytest.fail("the Cancel is not repeated")
    bench.finish()
    assert bench.decoder.told.released == [KEY]


def test_nothing_is_repeated_to_a_silent_worker() -> None:
    bench = pushing()
    bench.decoder.miss(bench.prefiller)
    bench.abandon()
    bench.letters.clear()
    for _ in range(50):
        bench.now += 1.0
        bench.decoder.expire()
    assert not bench.letters
    bench.decoder.meet(bench.prefiller)
    assert [type(message) for message in bench.waiting(PREFILLER)] == [Cancel]


def test_writes_before_and_after_the_end_of_the_prefill_are_told_apart() -> None:
    bench = pushing()
    bench.finish()
    bench.now = 5.0
    bench.end_prefill()
    bench.now = 7.0
    bench.finish()
    stats = bench.prefiller.events[0].stats
    layer_bytes = BLOCK_BYTES * LAYERS
    assert (stats.bytes, stats.bytes_before_prefill_ended) == (PROMPT_BLOCKS * layer_bytes, layer_bytes)
    assert stats.uncovered_s == 2.0
    assert (stats.writes, stats.writing_s) == (2 * LAYERS, LAYERS * 2.0)
    assert bench.decoder.events[0].stats == stats


def test_a_claim_written_before_the_prefill_ends_is_done_at_once_and_its_end_is_told_once() -> None:
    bench = pushing()
    bench.chunk(PROMPT_BLOCKS)
    bench.finish()
    assert bench.decoder.told.received == [KEY]
    assert not bench.prefiller.told
    bench.now = 3.0
    bench.end_prefill()
    bench.step()
    assert bench.prefiller.told.sent == [KEY]
    assert bench.prefiller.events[0].stats.uncovered_s == -3.0
    bench.assert_at_rest()


# What the device has not computed ------------------------------------------------------------------------------------
def test_nothing_is_written_before_its_fence_is_passed_and_fences_are_passed_in_order() -> None:
    bench = connected()
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.prefiller.chunk(KEY, SIZE, fenced=True)
    first, second = (fence for _, fence in bench.prefiller.fences)
    second.open()
    bench.prefiller.poll()
    assert not bench.in_flight, "the device computes in order: the second layer can't be there before the first"
    assert bench.prefiller.source.writing, "the transfer thread must keep asking"
    first.open()
    bench.prefiller.poll()
    assert len(bench.in_flight) == LAYERS
    assert not bench.prefiller.source._fenced


def test_a_chunk_that_the_device_still_computes_is_not_written_because_the_next_forward_counts_on_it() -> None:
    """An engine schedules its next step while the last one runs."""
    bench = connected()
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.prefiller.chunk(KEY, SIZE, fenced=True)
    bench.prefiller.chunk(KEY, 2 * SIZE, fenced=True)
    bench.prefiller.poll()
    assert not bench.in_flight
    bench.prefiller.open_fences()
    bench.prefiller.poll()
    assert sum(write.bytes for write in bench.in_flight) == 2 * BLOCK_BYTES * LAYERS


def test_a_prefix_hit_is_written_once_its_own_fence_is_passed() -> None:
    """What another prompt has computed may still be on the device's list when this one finds it cached."""
    bench = connected()
    bench.offer()
    bench.claim()
    bench.exchange()
    tables, passed = bench.prefiller.prefills[KEY].holding.tables, [False]
    bench.prefiller.source.computing(KEY, tables, SIZE, lambda: passed[0], bench.now)
    bench.prefiller.poll()
    assert not bench.in_flight
    passed[0] = True
    bench.prefiller.poll()
    assert len(bench.in_flight) == LAYERS


def test_what_needs_no_fence_waits_for_those_before_it() -> None:
    bench = connected()
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.prefiller.chunk(KEY, SIZE, fenced=True)
    bench.prefiller.chunk(KEY, TOKENS)
    bench.prefiller.poll()
    assert not bench.in_flight
    bench.prefiller.open_fences()
    bench.prefiller.poll()
    bench.end_prefill()
    bench.finish()
    assert bench.decoder.told.received == [KEY]


def test_a_prefill_may_end_while_its_last_fences_are_awaited() -> None:
    bench = connected()
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.prefiller.chunk(KEY, TOKENS, fenced=True)
    bench.prefiller.source.prefill_ended(KEY, bench.now, bench.now)
    bench.prefiller.prefills[KEY].over = True
    bench.prefiller.poll()
    assert not bench.in_flight
    bench.prefiller.open_fences()
    bench.prefiller.poll()
    bench.finish()
    assert bench.decoder.told.received == [KEY]
    assert bench.prefiller.told.sent == [KEY]
    bench.assert_at_rest()


def test_the_fences_of_a_preempted_prefill_are_forgotten_and_those_of_others_are_not() -> None:
    bench, other = connected(), TransferKey("other", 1)
    bench.prompts[other] = bench.prompt
    for key in (KEY, other):
        bench.prefiller.offer(key, bench.prompt, bench.b)
        bench.decoder.claim(key, bench.prompt, bench.a)
    bench.exchange()
    for key in (KEY, other):
        bench.prefiller.chunk(key, SIZE, fenced=True)
    fences = [fence for _, fence in bench.prefiller.fences]
    bench.prefiller.preempt(KEY)
    bench.step()
    for fence in fences[:LAYERS]:
        fence.passed = True  # the device got so far, into blocks that are somebody else's now
    bench.prefiller.open_fences()
    bench.prefiller.poll()
    assert {write.holding.key for write in bench.in_flight} == {other}
    bench.finish()
    for key in (KEY, other):
        bench.prefiller.end_prefill(key)
    bench.finish()
    assert sorted(bench.decoder.told.received) == [KEY, other]
    bench.assert_at_rest()


def test_a_preempted_prefill_waits_for_its_writes_and_is_written_on_from_its_new_blocks() -> None:
    bench = pushing()
    old = bench.prefiller.prefills[KEY].holding
    bench.prefiller.preempt(KEY)
    assert bench.prefiller.prefills[KEY].draining is not None
    bench.end_writes(most=1)
    assert bench.prefiller.prefills[KEY].holding is old, "a WRITE still reads the old blocks"
    bench.end_writes()
    assert bench.prefiller.prefills[KEY].holding is not old
    bench.end_prefill()
    bench.finish()
    assert bench.decoder.told.received == [KEY]
    assert bench.decoder.events[0].stats.bytes == TOKENS * SLOT * LAYERS, "what was written stays written"
    bench.assert_at_rest()


# Through host memory -------------------------------------------------------------------------------------------------
class StagedBench(Bench):
    def is_staged(self, uuid: str) -> bool:
        return uuid == DECODER


def landing() -> Bench:
    """Everything is written, and on its way onto the decoder's device."""
    bench = StagedBench()
    bench.meet()
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.end_prefill()
    bench.finish()
    return bench


def test_a_claim_is_received_once_its_bytes_have_landed() -> None:
    bench = landing()
    bench.decoder.poll()
    bench.step()
    assert not bench.decoder.told
    assert bench.decoder.destination.landing
    bench.landing[0].open()
    bench.decoder.poll()
    bench.step()
    assert bench.decoder.told.received == [KEY]
    assert not bench.decoder.destination.landing
    bench.assert_at_rest()


def test_a_claim_abandoned_while_its_bytes_land_keeps_its_blocks_until_they_have() -> None:
    bench = landing()
    bench.abandon()
    bench.decoder.poll()
    bench.step()
    assert not bench.decoder.told
    assert bench.decoder.destination.quarantined_blocks == PROMPT_BLOCKS * GROUPS
    bench.landing[0].open()
    bench.decoder.poll()
    bench.step()
    assert bench.decoder.told.received == [KEY]
    assert bench.decoder.destination.quarantined_blocks == 0


# Several ranks -------------------------------------------------------------------------------------------------------
def test_a_claim_is_received_only_when_all_its_legs_are() -> None:
    bench = pushing(one=Shape(tensor=2), heads=2)
    bench.end_prefill()
    for write in bench.transports["a/0"].in_flight:
        write.end(WriteState.DONE)
    bench.prefiller.poll()
    while not bench.prefiller.told.sent:
        bench.end_writes(most=1)
    bench.exchange()
    assert not bench.decoder.told, "one leg of two is there"
    assert not bench.a[1].told
    bench.finish()
    assert bench.decoder.told.received == [KEY]
    assert [rank.told.sent for rank in bench.a] == [[KEY], [KEY]]
    assert bench.decoder.events[0].stats.bytes == 2 * TOKENS * SLOT * LAYERS
    bench.assert_at_rest()


def test_one_leg_that_fails_cancels_the_others_and_the_claim_is_named_once_when_all_are_fenced() -> None:
    bench = pushing(one=Shape(tensor=2), heads=2)
    first, second = bench.a
    for write in bench.transports["a/0"].in_flight:
        write.end(WriteState.FAILED)
    first.poll()
    bench.exchange()
    assert not bench.decoder.told, "the other leg may still be written"
    assert bench.decoder.events[0].error == "a WRITE failed; the decode worker may have ended"
    assert bench.failures(bench.decoder) == {"write": 1}
    posted = bench.transports["a/1"].posted
    second.chunk(KEY, TOKENS)
    assert bench.transports["a/1"].posted == posted, "the cancelled leg is written on"
    bench.finish()
    assert bench.decoder.told.failed == [KEY]
    assert len(bench.decoder.events) == 1
    bench.end_prefill()
    bench.step()
    bench.assert_at_rest()


def test_an_abandoned_claim_is_released_when_its_last_leg_is_fenced() -> None:
    bench = pushing(one=Shape(tensor=2), heads=2)
    bench.abandon()
    bench.abandon()
    bench.exchange()
    assert bench.decoder.destination.quarantined_blocks == PROMPT_BLOCKS * GROUPS, "its blocks are counted once"
    while bench.transports["a/0"].in_flight:
        bench.end_writes(most=1)
    bench.exchange()
    assert not bench.decoder.told
    bench.finish()
    assert bench.decoder.told.released == [KEY]
    assert len(bench.decoder.events) == 1
    bench.end_prefill()
    bench.assert_at_rest()


def test_a_claim_of_which_one_rank_has_ended_fails_when_the_others_are_fenced() -> None:
    bench = pushing(one=Shape(tensor=2), heads=2)
    bench.a[1].alive = False
    bench.decoder.bury(bench.a[1])
    bench.exchange()
    assert not bench.decoder.told
    bench.finish()
    assert bench.decoder.told.failed == [KEY]
    assert bench.decoder.events[0].error == "the source's rank a/1 has ended"
    bench.end_prefill()
    bench.assert_at_rest()


def test_a_leg_that_never_reached_its_rank_fails_the_claim_and_takes_the_other_back() -> None:
    bench = Bench(one=Shape(tensor=2), heads=2)
    bench.decoder.meet(bench.a[0])
    bench.a[0].meet(bench.decoder)
    bench.offer()
    bench.claim()
    bench.exchange()
    bench.decoder.destination.peer_refused("a/1", "kv.dtype is another", bench.now)
    assert bench.decoder.events[0].error == "kv.dtype is another"
    assert not bench.decoder.outlet.take(), "the first rank may still write"
    bench.finish()
    assert bench.decoder.told.failed == [KEY]
    bench.end_prefill()
    bench.pass_time(31.0)
    bench.assert_at_rest()


def test_a_prefill_is_sent_when_all_its_legs_are_over_and_none_waits_for_another() -> None:
    bench = pushing(other=Shape(tensor=2), heads=2)
    bench.b[0].abandon(KEY)
    bench.end_prefill()
    bench.exchange()
    for write in [write for write in bench.in_flight if write.destination is bench.b[0]]:
        write.end(WriteState.DONE)
    bench.prefiller.poll()
    bench.exchange()
    assert bench.b[0].told.released == [KEY]
    assert not bench.prefiller.told
    assert bench.prefiller.source.pinned_blocks == PROMPT_BLOCKS * GROUPS
    bench.finish()
    assert bench.b[1].told.received == [KEY]
    assert bench.prefiller.told.sent == [KEY]
    event = bench.prefiller.events[0]
    assert (len(bench.prefiller.events), event.error) == (1, "the decode worker cancelled its claim")
    bench.assert_at_rest()


def test_each_stage_is_written_by_its_own_rank_alone() -> None:
    bench = pushing(one=Shape(pipeline=2), other=Shape(tensor=1, pipeline=2))
    bench.end_prefill()
    bench.finish()
    assert [rank.told.received for rank in bench.b] == [[KEY], [KEY]]
    assert [len(transport.in_flight) for transport in bench.transports.values()] == [0] * 4
    legs = [rank.source._ledger.get(KEY.leg(other.uuid)) for rank in bench.a for other in bench.b]
    assert [leg is not None for leg in legs] == [True, False, False, True]
    bench.assert_at_rest()


def test_a_prefill_of_which_nobody_needs_anything_is_sent_when_it_ends() -> None:
    """The second of two replicas, where there is one decode rank."""
    bench = pushing(one=Shape(tensor=2), heads=1)
    bench.finish()
    assert bench.a[1].source.owed == 1
    bench.end_prefill()
    bench.step()
    assert bench.a[1].told.sent == [KEY]
    assert bench.transports["a/1"].posted == 0
    event = bench.a[1].events[0]
    assert (event.stats.bytes, event.error) == (0, "")
    bench.finish()
    assert bench.decoder.told.received == [KEY]
    bench.assert_at_rest()


def test_a_claim_on_ranks_that_hold_nothing_of_what_is_needed_fails_at_once() -> None:
    bench = connected(one=Shape(pipeline=2), other=Shape(pipeline=2))
    bench.decoder.claim(KEY, bench.prompt, bench.a[1:])
    bench.step()
    assert bench.decoder.told.failed == [KEY]
    assert bench.decoder.events[0].error == "no rank of the source holds anything of what this rank needs"
    bench.assert_at_rest()


def test_an_offer_made_twice_and_a_claim_made_twice_are_counted_and_change_nothing() -> None:
    bench = pushing()
    bench.prefiller.source.offer(Offer(KEY, (bench.decoder.peer,), bench.prompt.tokens, 8), bench.now)
    register = bench.registration()
    tables = tuple(Table(table.first_block, table.blocks) for table in register.tables)
    again = bench.decoder.destination._claims[KEY].claim
    assert again.tables == tables
    bench.decoder.destination.claim(again, bench.now)
    assert bench.dropped() == {"own offer made twice": 1, "own claim made twice": 1}
    bench.end_prefill()
    bench.finish()
    assert bench.decoder.told.received == [KEY]
    bench.assert_at_rest()
