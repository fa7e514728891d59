"""KV that a device computes and takes: what is not there yet is not written, what has not landed is not received."""

from splitserve.kv.ticket import TransferKey
from tests.unit.kv.bench import (
    BLOCK_BYTES,
    DECODER,
    KEY,
    LAYERS,
    PROMPT_BLOCKS,
    SIZE,
    TOKENS,
    Bench,
    connected,
    pushing,
)
from tests.unit.kv.blocks import GROUPS, SLOT
from tests.unit.kv.rank import peers


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
    for key in (KEY, other):
        bench.prefiller.offer(key, bench.prompt, peers(bench.b))
        bench.decoder.claim(key, bench.prompt, peers(bench.a))
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
