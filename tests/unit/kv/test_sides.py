"""What both sides of a transfer between two ranks do, step by step: the test delivers letters and ends WRITEs."""

import msgspec
import pytest

from splitserve.kv.layout import prompt_hash
from splitserve.kv.messages import Cancel, Cancelled, Done, Failed, GroupTable, Progress, Register
from tests.unit.kv.bench import (
    BLOCK_BYTES,
    DECODER,
    KEY,
    LAYERS,
    PREFILLER,
    PROMPT_BLOCKS,
    SIZE,
    TOKENS,
    Bench,
    connected,
    pushing,
)
from tests.unit.kv.blocks import GROUPS, Prompt
from tests.unit.kv.rank import peers


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
    bench.prefiller.offer(KEY, Prompt.of(2, SIZE, LAYERS, 1), peers(bench.b))
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
    bench.decoder.claim(KEY, bench.prompt, peers(bench.a), tokens=TOKENS - 3)
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
