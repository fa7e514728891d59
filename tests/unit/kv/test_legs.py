"""Transfers between several ranks: a leg each, and one end for all of them."""

from splitserve.kv.ticket import Offer, Table
from splitserve.kv.transport import WriteState
from tests.unit.kv.bench import KEY, LAYERS, PROMPT_BLOCKS, TOKENS, Bench, connected, pushing
from tests.unit.kv.blocks import GROUPS, SLOT
from tests.unit.kv.numbered import Shape
from tests.unit.kv.rank import peers


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
    bench.decoder.claim(KEY, bench.prompt, peers(bench.a[1:]))
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
