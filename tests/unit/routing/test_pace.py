"""An engine's account of its jobs' objectives, and how many prompt tokens it reads beside them."""

from math import inf

import pytest

from splitserve.core.worker import Objectives, Pace
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import Step, pairs
from splitserve.routing.lengths import FEWEST
from splitserve.routing.pace import MOST_SLOWDOWN, Batch, PacedJobs
from splitserve.routing.slack import ITL_MARGIN, LEAST_CHUNK, STEPS_WITHOUT, TOKENS_IN_HAND

LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0005)
ONE = Batch(1, 500)
MOST = 1023
TPOT_S = 0.02


@pytest.fixture
def jobs() -> PacedJobs:
    """Of which enough have ended, with one token each, that none is expected to go on."""
    found = PacedJobs(LATENCY)
    for number in range(FEWEST):
        found.add(str(number), Objectives(tpot_s=TPOT_S), waits_for_kv=False, now=0.0)
        found.end(str(number), output_tokens=1)
    return found


def decode(jobs: PacedJobs, name: str, objectives: Objectives, made: int = 1, at: float = 0.0) -> None:
    """One whose first token came out then."""
    jobs.add(name, objectives, waits_for_kv=False, now=at)
    jobs.made(name, 1, at)
    jobs.made(name, made, at)


def chunk(jobs: PacedJobs, now: float, batch: Batch = ONE, due_in_s: float = inf) -> int:
    jobs.add("prompt", Objectives(due_in_s), waits_for_kv=False, now=now)
    found = jobs.chunk("prompt", 2000, 0, batch, MOST, now)
    jobs.end("prompt")
    return found


def step_s(tokens: int) -> float:
    return LATENCY.step_s(Step(tokens, pairs(tokens, 0), 1, ONE.decodes, ONE.context))


def test_without_objectives_a_step_is_filled(jobs: PacedJobs) -> None:
    decode(jobs, "d", Objectives())
    assert chunk(jobs, now=5.0) == MOST
    assert jobs.pace(ONE, 5.0) == Pace()


def test_an_objective_of_a_request_that_has_no_token_yet_bounds_nothing(jobs: PacedJobs) -> None:
    jobs.add("d", Objectives(1.0, TPOT_S), waits_for_kv=False, now=0.0)
    assert chunk(jobs, now=0.0) == MOST


def test_a_chunk_takes_no_longer_than_the_decodes_can_wait(jobs: PacedJobs) -> None:
    """Ten tokens and those in hand have come at once: the next is due ten objectives later."""
    decode(jobs, "d", Objectives(tpot_s=TPOT_S), made=10 + TOKENS_IN_HAND)
    found = chunk(jobs, now=0.0)
    assert LEAST_CHUNK < found < MOST
    assert step_s(found) <= 10 * TPOT_S < step_s(found + found // 8)


def test_the_least_patient_decode_decides(jobs: PacedJobs) -> None:
    decode(jobs, "patient", Objectives(tpot_s=TPOT_S), made=100)
    decode(jobs, "late", Objectives(tpot_s=TPOT_S), made=1)
    assert chunk(jobs, now=0.03) == 0
    jobs.end("late")
    assert chunk(jobs, now=0.03) == MOST


def test_a_gap_objective_bounds_every_step_however_far_ahead_the_decode_is(jobs: PacedJobs) -> None:
    decode(jobs, "d", Objectives(tpot_s=1.0, itl_s=0.05), made=1000)
    found = chunk(jobs, now=0.0)
    assert 0 < found < MOST
    assert step_s(found) <= 0.05 * ITL_MARGIN
    assert jobs.pace(ONE, 0.0).slack_s == 0.05 * ITL_MARGIN


def test_a_prompt_is_never_put_off_for_more_than_a_few_steps(jobs: PacedJobs) -> None:
    decode(jobs, "late", Objectives(tpot_s=TPOT_S))
    found = [chunk(jobs, now=1.0) for _ in range(2 * (STEPS_WITHOUT + 1))]
    assert found == 2 * [*([0] * STEPS_WITHOUT), LEAST_CHUNK]


def test_a_request_whose_kv_comes_gets_its_first_token_in_time(jobs: PacedJobs) -> None:
    decode(jobs, "d", Objectives(tpot_s=TPOT_S), made=1000)
    assert chunk(jobs, now=0.0) == MOST
    jobs.add("parked", Objectives(first_token_s=0.1), waits_for_kv=True, now=0.0)
    assert jobs.parked == 1
    found = chunk(jobs, now=0.0)
    assert 0 < found < MOST
    assert step_s(found) <= 0.1 - LATENCY.step_s(Step(0, 0, 0, 1, 500))
    jobs.made("parked", 1, 0.05)
    assert jobs.parked == 0


def test_one_that_is_late_already_holds_up_nobody(jobs: PacedJobs) -> None:
    decode(jobs, "d", Objectives(tpot_s=TPOT_S), made=1000)
    jobs.add("parked", Objectives(first_token_s=0.1), waits_for_kv=True, now=-1.0)
    assert chunk(jobs, now=0.0) == MOST


def test_an_urgent_prompt_spends_what_half_of_the_outputs_will_make_up_for(jobs: PacedJobs) -> None:
    """Of twenty outputs half had 20 tokens and half 200: all but a tenth save little, half of them much."""
    for number in range(40):
        jobs.add(f"e{number}", Objectives(tpot_s=TPOT_S), waits_for_kv=False, now=0.0)
        jobs.end(f"e{number}", 20 if number % 2 else 200)
    decode(jobs, "d", Objectives(tpot_s=TPOT_S))
    calm, urgent = chunk(jobs, now=0.0), chunk(jobs, now=0.0, due_in_s=0.6)
    assert 0 < calm < urgent


def test_outputs_of_jobs_without_objectives_say_nothing_of_those_that_have_some(jobs: PacedJobs) -> None:
    decode(jobs, "d", Objectives(tpot_s=TPOT_S))
    before = chunk(jobs, now=0.0)
    for number in range(40):
        jobs.add(f"e{number}", Objectives(first_token_s=1.0), waits_for_kv=False, now=0.0)
        jobs.end(f"e{number}", 2000)
    assert chunk(jobs, now=0.0) == before


def test_a_preempted_decode_does_not_hold_up_the_reading_of_its_own_tokens(jobs: PacedJobs) -> None:
    decode(jobs, "late", Objectives(tpot_s=TPOT_S))
    assert jobs.chunk("late", 500, 0, ONE, MOST, now=1.0) == MOST
    jobs.add("another", Objectives(), waits_for_kv=False, now=1.0)
    assert jobs.chunk("another", 500, 0, ONE, MOST, now=1.0) == 0


def test_what_steps_really_take_counts(jobs: PacedJobs) -> None:
    decode(jobs, "d", Objectives(tpot_s=TPOT_S), made=10 + TOKENS_IN_HAND)
    as_said = chunk(jobs, now=0.0)
    for _ in range(200):
        jobs.pacer.took(Step(0, 0, 0, 1, 500), 2 * 0.0065)
    assert jobs.pacer.slowdown == pytest.approx(2.0, rel=0.01)
    assert chunk(jobs, now=0.0) < 0.6 * as_said


def test_a_step_that_took_unbelievably_long_is_a_slow_one_and_no_more(jobs: PacedJobs) -> None:
    for _ in range(500):
        jobs.pacer.took(Step(0, 0, 0, 1, 500), 60.0)
    assert jobs.pacer.slowdown == pytest.approx(MOST_SLOWDOWN)
    jobs.pacer.took(Step(), 60.0)  # a step of nothing says nothing


def test_routers_hear_the_tightest_objective_and_the_least_slack(jobs: PacedJobs) -> None:
    decode(jobs, "loose", Objectives(tpot_s=0.1), made=3 + TOKENS_IN_HAND)
    decode(jobs, "tight", Objectives(tpot_s=TPOT_S), made=5 + TOKENS_IN_HAND)
    pace = jobs.pace(ONE, 0.0)
    assert (pace.tpot_s, pace.slowdown) == (TPOT_S, 1.0)
    assert pace.slack_s == pytest.approx(5 * TPOT_S)
