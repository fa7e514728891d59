"""Simulations in which the router schedules by objectives."""

from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.slo import Slo
from splitserve.latency.linear import LinearLatency
from splitserve.planner.deployment import Deployment, Role
from splitserve.planner.simulator.simulate import simulate
from splitserve.routing.line import PUT_OFF
from tests.unit.planner.simulator.worlds import deployment, poisson, requests, worker

CPU = LinearLatency(0.006, 2.5e-4, 6e-4)  # a prompt of 800 tokens takes 206 ms
ANY = worker(Role.DECODE, CPU, max_batched_tokens=1024)
EASY = Slo(ttft_s=2.0, tpot_s=0.05)

FLEETS = {
    "one worker": deployment(ANY),
    "two": deployment(ANY, ANY),
    "ten": deployment(*[ANY] * 10),
    "a hundred": deployment(*[ANY] * 100),
    "stages": deployment(*[worker(Role.DECODE, LinearLatency(0.006, 2.5e-4, 6e-4, stages=2))] * 2),
    "little memory": deployment(*[worker(Role.DECODE, CPU, kv_blocks=600, max_model_len=6000)] * 2),
}


@pytest.mark.parametrize("slo", [EASY, Slo(0.3, 0.01), Slo(0.001, 0.001), Slo(5.0, inf)], ids=str)
@pytest.mark.parametrize("name", FLEETS)
def test_every_request_ends_whatever_the_objectives(name: str, slo: Slo) -> None:
    """Also those that nobody can keep, and under a load that the smaller fleets can't carry."""
    served = poisson(300, 8.0, seed=3)
    outcome = simulate(FLEETS[name], served, slo=slo)
    timelines = outcome.timelines
    assert np.isfinite(timelines.last_token).all()
    moments = [timelines.arrival, outcome.bound, outcome.prefill_start, outcome.prefill_end, timelines.first_token]
    for earlier, later in pairwise(moments):
        assert (later - earlier >= -1e-9).all()


def test_the_same_seed_gives_the_same_timelines() -> None:
    served = poisson(300, 12.0, seed=4)
    one, other = (simulate(FLEETS["a hundred"], served, seed=5, slo=EASY) for _ in range(2))
    np.testing.assert_array_equal(one.timelines.last_token, other.timelines.last_token)


def test_a_prompt_is_read_in_what_time_the_decode_beside_it_has() -> None:
    """Alone its tokens take 6.6 ms. The prompt's 500 ms would make that 11.7 in the mean of 99."""
    alone, served = deployment(ANY), requests([0.0, 0.3], prompt=[10, 2000], output=[100, 1])
    assert simulate(alone, served).timelines.tpot_s[0] == pytest.approx(0.0117, rel=0.05)
    kept = simulate(alone, served, slo=Slo(ttft_s=5.0, tpot_s=0.01)).timelines
    assert kept.tpot_s[0] <= 0.01
    assert kept.ttft_s[1] > 0.6


def test_a_prompt_that_would_be_late_is_read_by_the_decode_worker_itself() -> None:
    """Three at once: with time enough one worker reads them one after the other, with little both do."""
    served = requests([0.0, 1.0, 1.01, 1.02], prompt=[10, 800, 800, 800], output=[300, 20, 20, 20])
    easy, tight = (simulate(FLEETS["two"], served, slo=Slo(ttft_s, 0.05)) for ttft_s in (3.0, 0.45))
    assert len(set(easy.decode_worker.tolist())) == 1
    assert (easy.prefill_worker[1:] >= 0).all()
    assert (tight.prefill_worker[1:] < 0).any()
    assert (tight.timelines.ttft_s[1:] <= 0.45).sum() >= 2


def test_who_can_not_be_in_time_any_more_goes_behind_those_who_can() -> None:
    """Six at once, of which one worker reads two in time, and then one more that comes later and would be in time."""
    served = requests([0.0] * 6 + [0.45], prompt=[800] * 7, output=[1] * 7)
    ttft_s = simulate(deployment(ANY), served, slo=Slo(0.45, 0.05)).timelines.ttft_s
    assert (ttft_s[:6] <= 0.45).sum() == 2
    assert ttft_s[6] <= 0.45


def test_put_off_requests_get_their_turn_under_lasting_overload() -> None:
    """Twice as many as can be read, for 20 s; nobody waits for the end of it."""
    served = requests(np.arange(0.0, 20.0, 0.1).tolist(), prompt=800, output=1)
    ttft_s = simulate(deployment(ANY), served, slo=Slo(0.5, 0.05)).timelines.ttft_s
    assert (ttft_s[:50] > 0.5).any()
    assert ttft_s[:50].max() < 15.0


@settings(max_examples=30, deadline=None)
@given(
    workers=st.sampled_from([1, 2, 5, 40]),
    rate_rps=st.floats(1.0, 60.0),
    ttft_per_token_s=st.sampled_from([1e-5, 2.7e-4, 1e-3]),
    tpot_s=st.sampled_from([0.001, 0.01, 0.05]),
    seed=st.integers(0, 1000),
)
def test_everybody_is_bound_before_those_who_are_due_after_his_own_put_off_time(
    workers: int, rate_rps: float, ttft_per_token_s: float, tpot_s: float, seed: int
) -> None:
    slo, served = Slo(0.0, tpot_s, ttft_per_token_s=ttft_per_token_s), poisson(60, rate_rps, seed)
    outcome = simulate(deployment(*[ANY] * workers), served, seed=seed, slo=slo)
    arrival, bound = outcome.timelines.arrival, outcome.bound
    assert np.isfinite(bound).all()
    objective_s = ttft_per_token_s * served.prompt_tokens
    waits = bound[None, :] > arrival[:, None]  # who was bound while the other waited
    later = (arrival + objective_s)[None, :] > (arrival + PUT_OFF * objective_s)[:, None]
    assert (bound[None, :] >= bound[:, None])[waits & later].all()


def split(prefills: int, decodes: int) -> Deployment:
    return deployment(*[worker(Role.PREFILL, CPU)] * prefills, *[worker(Role.DECODE, CPU)] * decodes)


@pytest.mark.parametrize(
    ("ttft_times", "tpot_times", "rate_rps"), [(2, 5, 17.0), (5, 2, 15.0), (5, 3, 18.0)], ids=["TTFT", "TPOT", "both"]
)
def test_no_split_of_eight_workers_serves_more_in_time(ttft_times: int, tpot_times: int, rate_rps: float) -> None:
    """Where TTFT is tight the best is none, where TPOT is tight five read and three decode."""
    slo = Slo(ttft_s=0.0, ttft_per_token_s=ttft_times * 2.7e-4, tpot_s=tpot_times * 0.007)
    served = poisson(1500, rate_rps, seed=1, prompt=600, output=110)
    adaptive = simulate(split(0, 8), served, slo=slo).timelines.met(slo).mean()
    for prefills in range(8):
        assert adaptive >= simulate(split(prefills, 8 - prefills), served).timelines.met(slo).mean() - 0.01
