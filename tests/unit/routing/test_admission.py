from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, Failure, Job, Pool, PrefillJob
from splitserve.routing.admission import (
    Capacity,
    Limits,
    Refusal,
    fits_decode,
    fits_prefill,
)
from splitserve.routing.promise import Effect, Promise
from tests.unit.peers import TICKET

BLOCK = 16


def capacity(total: int = 100, sequences: int = 8, length: int = 20 * BLOCK, batched: int = 4 * BLOCK) -> Capacity:
    return Capacity(total, BLOCK, sequences, length, batched)


def prefill(job_id: str, tokens: int) -> PrefillJob:
    return PrefillJob(job_id, "r", (7,) * tokens, TICKET, 10.0)


def decode(job_id: str, tokens: int, waits: bool = True, output: int = 0) -> DecodeJob:
    ticket = TICKET if waits else None
    return DecodeJob(job_id, "r", (7,) * tokens, SamplingParams(), 10.0, (8,) * output, ticket)


def refused(held: Capacity, job: Job) -> Refusal:
    refusal = held.admit(job)
    assert refusal is not None
    return refusal


def fill_with_parked_decodes(held: Capacity, tokens: int) -> int:
    """How many were taken before the first NotNow."""
    taken = 0
    while held.admit(decode(f"parked-{taken}", tokens)) is None:
        taken += 1
    return taken


# Blocks -------------------------------------------------------------------------------------------------------------
def test_a_job_holds_its_blocks_until_it_ends() -> None:
    held = capacity()
    assert held.admit(prefill("a", 3 * BLOCK)) is None
    assert held.admit(decode("b", BLOCK)) is None
    assert held.load(Pool.DECODE).free_blocks == 100 - 3 - 2  # a decode starts with room for its first token
    held.ended("a")
    held.ended("b")
    assert held.load(Pool.DECODE) == capacity().load(Pool.DECODE)


def test_a_decode_takes_a_block_more_when_its_tokens_fill_the_last_one() -> None:
    held = capacity()
    held.admit(decode("a", BLOCK - 1))
    assert held.load(Pool.DECODE).free_blocks == 99
    held.progressed("a", 1)
    assert held.load(Pool.DECODE).free_blocks == 99
    held.progressed("a", 1)
    assert held.load(Pool.DECODE).free_blocks == 98


def test_a_resumed_decode_needs_blocks_for_what_it_has_already_made() -> None:
    held = capacity()
    held.admit(decode("a", BLOCK, output=BLOCK))
    assert held.load(Pool.DECODE).free_blocks == 100 - 3


def test_a_job_whose_blocks_are_not_free_is_told_not_now_and_why() -> None:
    held = capacity(total=10, length=10 * BLOCK)
    held.admit(decode("a", 7 * BLOCK, waits=False))
    held.progressed("a", 1)
    refusal = refused(held, decode("b", 3 * BLOCK, waits=False))
    assert (refusal.failure, refusal.reason) == (Failure.NOT_NOW, "4 blocks are needed and 2 are free")


def test_quarantined_blocks_are_not_free_and_count_as_waiting_for_kv() -> None:
    held = capacity()
    before = held.load(Pool.DECODE)
    held.outlived(pinned_blocks=0, quarantined_blocks=30)
    after = held.load(Pool.DECODE)
    assert after.free_blocks == before.free_blocks - 30
    assert after.parked_limit_blocks == before.parked_limit_blocks - 30
    assert held.quarantined_share == pytest.approx(0.3)


def test_a_computed_prefills_blocks_count_once_while_they_are_sent() -> None:
    held = capacity()
    held.admit(prefill("a", 4 * BLOCK))
    held.progressed("a", 0)
    held.outlived(pinned_blocks=4, quarantined_blocks=0)
    assert held.load(Pool.PREFILL).free_blocks == 96
    held.ended("a")
    assert held.load(Pool.PREFILL).free_blocks == 96, "its job is over, its KV is still being read"
    held.outlived(pinned_blocks=0, quarantined_blocks=0)
    assert held.load(Pool.PREFILL).free_blocks == 100


# Prefill slots ------------------------------------------------------------------------------------------------------
def test_a_prefill_is_taken_while_the_waiting_prompt_tokens_are_below_two_steps() -> None:
    held = capacity(batched=2 * BLOCK)
    assert held.admit(prefill("a", 4 * BLOCK - 1)) is None
    assert held.admit(prefill("b", 9 * BLOCK)) is None, "one token is missing to the limit"
    assert refused(held, prefill("c", 1)).failure is Failure.NOT_NOW
    held.progressed("a", 0)
    held.progressed("b", 0)
    assert held.admit(prefill("c", 1)) is None


def test_a_decode_that_computes_its_prompt_itself_needs_a_prefill_slot() -> None:
    held = capacity(batched=BLOCK)
    assert held.admit(decode("a", 2 * BLOCK, waits=False)) is None
    assert held.load(Pool.DECODE).prefill_tokens == 2 * BLOCK
    assert refused(held, decode("b", 1, waits=False)).failure is Failure.NOT_NOW
    assert held.admit(decode("c", 1, waits=True)) is None


# Sequences ----------------------------------------------------------------------------------------------------------
def test_one_sequence_stays_free_for_a_prefill() -> None:
    held = capacity(sequences=3)
    assert fill_with_parked_decodes(held, 1) == 2
    assert refused(held, decode("late", 1)).reason == "every sequence is taken"
    assert held.admit(prefill("a", BLOCK)) is None


def test_a_worker_with_one_sequence_decodes_with_it() -> None:
    assert fill_with_parked_decodes(capacity(sequences=1), 1) == 1


# The prefill reserve ------------------------------------------------------------------------------------------------
@given(
    total=st.integers(1, 60),
    length=st.integers(1, 80 * BLOCK),
    tokens=st.integers(1, 40 * BLOCK),
)
def test_whatever_a_parked_decode_waits_for_fits_beside_all_that_can_be_parked(
    total: int, length: int, tokens: int
) -> None:
    """The no-cycle rule: two workers alike, each full of decodes that wait for the other, can both still prefill."""
    held = capacity(total, sequences=1000, length=length)
    taken = fill_with_parked_decodes(held, tokens)
    if taken:
        assert held.admit(prefill("theirs", tokens)) is None


def test_without_the_reserve_parked_decodes_would_shut_out_the_prefill() -> None:
    """The twin of the rule above: with nothing kept back the same jobs stand still."""
    held = capacity(total=40)
    held._limits = replace(held._limits, reserve=0)
    assert fill_with_parked_decodes(held, 9 * BLOCK) == 4
    assert not fits_prefill(held.load(Pool.PREFILL), 9 * BLOCK, BLOCK)


def test_kv_that_has_arrived_no_longer_counts_as_parked() -> None:
    held = capacity(total=40)
    assert fill_with_parked_decodes(held, 9 * BLOCK) == 2
    held.progressed("parked-0", 1)
    assert (held.parked_jobs, held.parked_blocks) == (1, 10)
    assert held.load(Pool.DECODE).parked_limit_blocks == 10
    assert held.admit(decode("next", 9 * BLOCK)) is None


@pytest.mark.parametrize(
    ("total", "reserve", "parked"), [(100, 20, 80), (40, 20, 20), (39, 20, 19), (10, 5, 5), (1, 1, 0)]
)
def test_the_reserve_is_a_full_length_prompt_but_at_most_half(total: int, reserve: int, parked: int) -> None:
    limits = Limits.of(total, 20 * BLOCK, BLOCK)
    assert (limits.reserve, limits.parked_limit) == (reserve, parked)


# Never --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "job", [prefill("a", 20 * BLOCK + 1), decode("a", 20 * BLOCK), decode("a", 1, output=20 * BLOCK)]
)
def test_a_job_beyond_the_models_length_is_invalid_rather_than_not_now(job: Job) -> None:
    refusal = refused(capacity(), job)
    assert (refusal.failure, refusal.field) == (Failure.INVALID, "prompt")


def test_a_job_that_no_empty_worker_holds_is_invalid() -> None:
    assert refused(capacity(total=5), decode("a", 6 * BLOCK, waits=False)).failure is Failure.INVALID


@pytest.mark.parametrize("job", [prefill("a", 8 * BLOCK), decode("a", 8 * BLOCK)])
def test_a_prompt_too_long_to_be_parked_is_told_to_be_computed_where_it_decodes(job: Job) -> None:
    held = capacity(total=10)
    assert refused(held, job).failure is Failure.TRANSFER
    assert held.admit(decode("b", 8 * BLOCK, waits=False)) is None


def test_a_job_id_can_run_once_at_a_time() -> None:
    held = capacity()
    held.admit(decode("a", 1))
    assert refused(held, decode("a", 1)).field == "job_id"


def test_a_draining_worker_takes_nothing_more() -> None:
    held = capacity()
    held.draining = True
    assert refused(held, prefill("a", 1)).reason == refused(held, decode("b", 1)).reason == "the worker is draining"
    assert held.load(Pool.PREFILL).draining


# Prediction ---------------------------------------------------------------------------------------------------------
JOBS = st.lists(st.tuples(st.sampled_from(["prefill", "parked", "local"]), st.integers(1, 12 * BLOCK)), max_size=25)


@given(jobs=JOBS, total=st.integers(40, 120))
def test_a_router_predicts_exactly_what_the_worker_decides(jobs: list[tuple[str, int]], total: int) -> None:
    held = capacity(total)
    load = held.load(Pool.DECODE)
    for number, (kind, tokens) in enumerate(jobs):
        waits = kind == "parked"
        if kind == "prefill":
            promise = Promise(Pool.PREFILL, tokens)
            fits, after = fits_prefill(load, tokens, BLOCK), Effect.of(promise, BLOCK).on(load)
            job: Job = prefill(str(number), tokens)
        else:
            promise = Promise(Pool.DECODE, tokens, waits)
            fits, after = fits_decode(load, tokens, BLOCK, waits), Effect.of(promise, BLOCK).on(load)
            job = decode(str(number), tokens, waits)
        assert fits == (held.admit(job) is None)
        load = after if fits else load
        assert load == held.load(Pool.DECODE)


def test_two_routers_share_one_worker_and_the_second_hears_not_now() -> None:
    held = capacity(total=40)
    first = second = held.load(Pool.DECODE)
    assert fits_decode(first, 15 * BLOCK, BLOCK, True)
    assert fits_decode(second, 15 * BLOCK, BLOCK, True)
    assert held.admit(decode("of the first", 15 * BLOCK)) is None
    assert refused(held, decode("of the second", 15 * BLOCK)).failure is Failure.NOT_NOW
    assert held.load(Pool.DECODE, seen_jobs=1).seen_jobs == 1


# Growth -------------------------------------------------------------------------------------------------------------
def with_outputs_of(tokens: int, total: int = 100) -> Capacity:
    """A worker on which outputs of that length have ended lately."""
    held = capacity(total=total, sequences=64, length=total * BLOCK)
    for number in range(32):
        assert held.admit(decode(f"past-{number}", 1, waits=False)) is None
        held.progressed(f"past-{number}", tokens)
        held.ended(f"past-{number}", finished=True)
    return held


def test_what_running_decodes_will_need_yet_is_no_new_decodes() -> None:
    """Ten outputs of 64 tokens each are five blocks with their prompt; two are held at first."""
    held = with_outputs_of(64, total=60)
    taken = fill_with_parked_decodes(held, BLOCK)
    load = held.load(Pool.DECODE)
    assert taken < 60 // 5
    assert load.free_blocks > 2
    assert not fits_decode(load, BLOCK, BLOCK, waits_for_kv=True)
    assert "will make yet" in refused(held, decode("more", BLOCK)).reason


def test_a_prefill_may_have_the_blocks_that_decodes_will_need_later() -> None:
    """It is gone by then; and a decode elsewhere may wait for it."""
    held = with_outputs_of(64, total=60)
    fill_with_parked_decodes(held, BLOCK)
    assert held.admit(prefill("p", BLOCK)) is None


def test_growth_is_held_as_it_comes_and_never_counted_twice() -> None:
    held = with_outputs_of(64)
    assert held.admit(decode("d", BLOCK, waits=False)) is None
    before = held.load(Pool.DECODE)
    assert before.growth_blocks >= 4
    for _ in range(64):
        held.progressed("d", 1)
        load = held.load(Pool.DECODE)
        assert abs(load.free_blocks - load.growth_blocks - before.free_blocks + before.growth_blocks) <= 2


def test_a_worker_that_decodes_nothing_takes_whatever_fits() -> None:
    held = with_outputs_of(10_000, total=40)
    assert held.load(Pool.DECODE).growth_blocks == 0
    assert held.admit(decode("d", 30 * BLOCK, waits=False)) is None


def test_outputs_that_were_cut_short_say_nothing_about_lengths() -> None:
    held = capacity(sequences=64)
    for number in range(32):
        held.admit(decode(f"d{number}", 1, waits=False))
        held.progressed(f"d{number}", 64)
        held.ended(f"d{number}")
    held.admit(decode("d", 1, waits=False))
    assert held.load(Pool.DECODE).growth_blocks == 0
