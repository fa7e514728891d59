"""Whom a decision looks at."""

from dataclasses import replace
from math import inf
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.fleet import Health
from splitserve.core.worker import KvFormat, KvMode, Load, Pool, WorkerInfo
from splitserve.latency.linear import LinearLatency
from splitserve.routing.admission import Limits
from splitserve.routing.candidate import Candidate
from splitserve.routing.sample import SHARES, Doing, Sample, doing

KV = KvFormat("print", "float32", 16, 4, 2, 64, 1024, KvMode.PUSH, "shm")
LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.001, context_token_s=1e-5)
BLOCKS, SEQUENCES = 200, 33
MOST = sum(SHARES.values())


def worker(number: int, decodes: int = 0, pool: Pool = Pool.DECODE, tpot_s: float = 0.02, **load: object) -> Candidate:
    """Each decode has 6 blocks: a step takes 6 ms and 1.96 for each. It may take 18."""
    info = WorkerInfo(f"u{number}", f"w{number}", pool, "m", KV, (), BLOCKS, SEQUENCES, 1024, "sim")
    limits, blocks = Limits.of(BLOCKS, 1024, 16), BLOCKS - 6 * decodes
    free = max(0, SEQUENCES - 1 - decodes)
    grants = Load(0, blocks, free, 0, 2048, limits.parked_limit, decodes, 0, 0, pool, False, 0)
    grants = replace(grants, **load)  # type: ignore[arg-type]
    return Candidate(
        info, limits, 0, pool, Health.READY, grants, True, LATENCY, tpot_s=tpot_s if decodes else inf, slack_s=0.0
    )


def sample_of(candidates: list[Candidate]) -> Sample:
    sample = Sample()
    for candidate in candidates:
        sample.put(candidate)
    return sample


def test_a_worker_is_known_by_what_it_does() -> None:
    assert doing(worker(0)) is Doing.NOTHING
    assert doing(worker(0, prefill_tokens=100)) is Doing.READING
    assert doing(worker(0, decodes=3)) is Doing.DECODING
    assert doing(worker(0, decodes=3, prefill_tokens=100)) is Doing.DECODING


@pytest.mark.parametrize("out_of", ["free_sequences", "free_blocks", "parked_limit_blocks"])
def test_a_worker_that_takes_no_decode_is_full(out_of: str) -> None:
    assert doing(worker(0, decodes=3, **{out_of: 0})) is Doing.FULL  # type: ignore[arg-type]


def test_a_worker_is_full_if_one_more_like_its_decodes_would_break_their_objective() -> None:
    """Six take 6 + 6 * 1.96 ms of the 18 that they may, nine 6 + 9 * 1.96."""
    assert doing(worker(0, decodes=5)) is Doing.DECODING
    assert doing(worker(0, decodes=8)) is Doing.FULL
    assert doing(worker(0, decodes=8, tpot_s=inf)) is Doing.DECODING
    unknown = worker(0, decodes=8)
    unknown.latency = None
    assert doing(unknown) is Doing.DECODING


@pytest.mark.parametrize("rare", [{}, {"decodes": 3}, {"prefill_tokens": 100}, {"decodes": 20}], ids=str)
def test_the_few_that_do_something_else_than_the_rest_are_always_seen(rare: dict[str, int]) -> None:
    """One worker in a thousand; another of the rest has changed last."""
    others = [{}, {"decodes": 3}, {"prefill_tokens": 100}, {"decodes": 20}]
    for other in (each for each in others if each != rare):
        sample = sample_of([worker(number, **(rare if number == 7 else other)) for number in range(1000)])  # type: ignore[arg-type]
        for seed in range(10):
            assert "u7" in {each.info.uuid for each in sample.draw(Random(seed))}


def test_whoever_is_of_a_kind_is_drawn_as_often_as_every_other() -> None:
    sample = sample_of([worker(number, decodes=3) for number in range(100)])
    counts = dict.fromkeys(range(99), 0)
    for seed in range(3000):
        for each in sample.draw(Random(seed))[1:]:  # the first is the one that changed last
            if (number := int(each.info.uuid[1:])) in counts:
                counts[number] += 1
    expected = 3000 * SHARES[Doing.DECODING] / 100
    assert all(0.7 * expected < count < 1.3 * expected for count in counts.values())


def test_nobody_is_drawn_twice_but_who_changed_last() -> None:
    sample = sample_of([worker(number, decodes=3) for number in range(11)])
    for seed in range(50):
        drawn = [each.info.uuid for each in sample.draw(Random(seed))][1:]
        assert len(set(drawn)) == len(drawn) == SHARES[Doing.DECODING]


def test_the_same_random_numbers_draw_the_same() -> None:
    fleet = [worker(number, decodes=number % 5) for number in range(300)]
    assert sample_of(fleet).draw(Random(3)) == sample_of(fleet).draw(Random(3))


states = st.tuples(
    st.integers(0, 30), st.sampled_from(Pool), st.sampled_from([0, 3, 20]), st.sampled_from([0, 100]), st.booleans()
)


@given(st.lists(states, max_size=80), st.integers(0, 2**32))
def test_only_who_is_there_is_drawn_and_some_of_every_kind_that_there_is(
    changes: list[tuple[int, Pool, int, int, bool]], seed: int
) -> None:
    sample, here = Sample(), dict[int, Candidate]()
    for number, pool, decodes, tokens, leaves in changes:
        old = here.pop(number, None)
        if leaves:
            sample.remove(old or worker(number))
            continue
        now = worker(number, decodes, pool, prefill_tokens=tokens)
        if old is not None:
            old.pool, old.load, old.tpot_s = now.pool, now.load, now.tpot_s
            old.changed()
        here[number] = old or now
        sample.put(here[number])
    assert sample.workers == len(here)
    assert sample.decoding == sum(each.decodes > 0 for each in here.values())
    drawn = sample.draw(Random(seed))
    assert all(any(each is other for other in here.values()) for each in drawn)
    kinds = {(each.pool, doing(each)) for each in here.values()}
    assert {(each.pool, doing(each)) for each in drawn} == kinds
    assert len(drawn) <= MOST + len(kinds)
    if len(here) <= min(SHARES.values()) // 2:
        assert {each.info.uuid for each in drawn} == {each.info.uuid for each in here.values()}
