"""A deployment under a workload."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.slo import Slo, attainment
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import PrefillChunk, Step
from splitserve.planner.deployment import Deployment, Link, Role
from splitserve.planner.simulator.outcome import Outcome
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.requests import Prefixes, Requests
from tests.unit.planner.simulator.stepwise import stepwise
from tests.unit.planner.simulator.worlds import (
    COLOCATED,
    DECODE,
    FREE,
    LATENCY,
    PREFILL,
    deployment,
    poisson,
    requests,
    worker,
)

ONE_EACH = deployment(PREFILL, DECODE)


def all_ended(outcome: Outcome) -> bool:
    return bool(np.isfinite(outcome.timelines.last_token).all())


# One request ----------------------------------------------------------------------------------------------------------
def test_a_request_alone_takes_its_prefill_and_one_step_a_token() -> None:
    outcome = simulate(ONE_EACH, requests([1.0], prompt=300, output=3))
    prefill_s = LATENCY.step_s(Step.of([PrefillChunk(300)]))
    steps = [LATENCY.step_s(Step.of(decodes=[300 + n])) for n in range(3)]
    assert outcome.timelines.ttft_s[0] == pytest.approx(prefill_s + steps[0])
    assert outcome.timelines.tpot_s[0] == pytest.approx((steps[1] + steps[2]) / 2)


def test_a_colocated_worker_has_the_first_token_from_the_prefill_itself() -> None:
    outcome = simulate(deployment(COLOCATED), requests([0.0], prompt=300, output=1))
    assert outcome.timelines.ttft_s[0] == pytest.approx(LATENCY.step_s(Step.of([PrefillChunk(300)])))
    assert outcome.timelines.last_token[0] == outcome.timelines.first_token[0]


def test_where_the_prefill_worker_answers_its_token_is_the_first_and_the_decode_worker_makes_the_rest() -> None:
    answering = replace(ONE_EACH, prefill_answers=True)
    outcome = simulate(answering, requests([0.0, 5.0], prompt=300, output=[3, 1]))
    prefill_s = LATENCY.step_s(Step.of([PrefillChunk(300)]))
    steps = [LATENCY.step_s(Step.of(decodes=[301 + n])) for n in range(2)]
    np.testing.assert_allclose(outcome.timelines.ttft_s, prefill_s)
    assert outcome.timelines.tpot_s[0] == pytest.approx(sum(steps) / 2, rel=1e-6)
    assert all_ended(outcome)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    tight = deployment(worker(Role.PREFILL, max_batched_tokens=128), worker(Role.DECODE, FREE))
    outcome = simulate(tight, requests([0.0], prompt=300, output=1))
    chunks = [PrefillChunk(128), PrefillChunk(128, 128), PrefillChunk(44, 256)]
    assert outcome.prefill_end[0] == pytest.approx(sum(LATENCY.step_s(Step.of([chunk])) for chunk in chunks))


# Against the plain simulation -----------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.floats(0, 2.0), min_size=1, max_size=12),
    lengths=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 60)), min_size=12, max_size=12),
    chunk=st.sampled_from([64, 128, 1024]),
)
def test_the_fast_simulation_agrees_with_one_step_at_a_time(
    arrivals: list[float], lengths: list[tuple[int, int]], chunk: int
) -> None:
    arrivals = sorted(arrivals)
    served = requests(
        arrivals, [each[0] for each in lengths[: len(arrivals)]], [each[1] for each in lengths[: len(arrivals)]]
    )
    first, last = stepwise(LATENCY, served, chunk)
    alone = deployment(worker(Role.COLOCATED, kv_blocks=100_000, max_batched_tokens=chunk))
    timelines = simulate(alone, served).timelines
    np.testing.assert_allclose(timelines.first_token, first, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(timelines.last_token, last, rtol=1e-9, atol=1e-9)


def test_a_server_without_batching_waits_as_m_d_1_says() -> None:
    """Mean wait of M/D/1: load * service / (2 * (1 - load)) (Pollaczek-Khinchine)."""
    service_s, load = 0.1, 0.7
    latency = LinearLatency(0.0, service_s / 100, 0.0)
    alone = deployment(
        worker(Role.PREFILL, latency, 100_000, max_batched_tokens=100), worker(Role.DECODE, FREE, 100_000)
    )
    waits = []
    for seed in range(12):
        arrivals = np.cumsum(np.random.default_rng(seed).exponential(service_s / load, 20_000))
        outcome = simulate(alone, requests(arrivals.tolist(), prompt=100, output=1))
        waits.append(float(outcome.timelines.ttft_s.mean()) - service_s)
    expected = load * service_s / (2 * (1 - load))
    half_width = 2.2 * np.std(waits, ddof=1) / np.sqrt(len(waits))  # Student's t, 11 degrees of freedom, 95%
    assert abs(np.mean(waits) - expected) < half_width
    assert half_width < 0.05 * expected


# Many requests --------------------------------------------------------------------------------------------------------
DEPLOYMENTS = {
    "one each": ONE_EACH,
    "colocated": deployment(COLOCATED, COLOCATED),
    "many": deployment(*[PREFILL] * 3, *[DECODE] * 2),
    "stages": deployment(
        worker(Role.PREFILL, replace(LATENCY, stages=2)), worker(Role.DECODE, replace(LATENCY, stages=4))
    ),
    "stages, colocated": deployment(worker(Role.COLOCATED, replace(LATENCY, stages=2))),
    "little memory": deployment(PREFILL, worker(Role.DECODE, kv_blocks=600, max_model_len=6000)),
    "little memory, colocated": deployment(worker(Role.COLOCATED, kv_blocks=600, max_model_len=6000)),
    "slow link": deployment(PREFILL, DECODE, link=Link(2e6)),
    "large": deployment(*[PREFILL] * 60, *[DECODE] * 40),
}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_request_ends_and_its_moments_are_in_order(name: str) -> None:
    served = poisson(400, 12.0, seed=3)
    outcome = simulate(DEPLOYMENTS[name], served)
    assert all_ended(outcome)
    timelines = outcome.timelines
    moments = [timelines.arrival, outcome.bound, outcome.prefill_start, outcome.prefill_end, outcome.kv_ready]
    for earlier, later in zip(moments, [*moments[1:], timelines.first_token], strict=True):
        assert (later - earlier >= -1e-9).all()
    assert (timelines.last_token >= timelines.first_token).all()
    assert sum(use.requests for use in outcome.workers if use.role != "prefill") == len(served)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_same_seed_gives_the_same_timelines(name: str) -> None:
    served = poisson(300, 12.0, seed=4)
    one, other = (simulate(DEPLOYMENTS[name], served, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.timelines.last_token, other.timelines.last_token)
    assert one.workers == other.workers


def test_with_little_memory_decodes_are_preempted_and_end_all_the_same() -> None:
    outcome = simulate(DEPLOYMENTS["little memory, colocated"], poisson(300, 20.0, prompt=100, output=400))
    assert all_ended(outcome)
    assert sum(use.preemptions for use in outcome.workers) > 0
    assert max(use.peak_kv_share for use in outcome.workers) > 0.9


def test_a_worker_given_in_another_place_changes_nothing() -> None:
    served = poisson(400, 14.0, seed=6)
    timelines = [
        simulate(deployment(*order), served).timelines
        for order in ([PREFILL, PREFILL, DECODE, DECODE], [DECODE, PREFILL, DECODE, PREFILL])
    ]
    np.testing.assert_array_equal(timelines[0].last_token, timelines[1].last_token)


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (deployment(PREFILL, DECODE), deployment(PREFILL, PREFILL, DECODE)),
        (deployment(PREFILL, DECODE), deployment(PREFILL, DECODE, DECODE)),
        (deployment(COLOCATED), deployment(COLOCATED, COLOCATED)),
        (deployment(PREFILL, DECODE, link=Link(3e6)), deployment(PREFILL, DECODE, link=Link(3e7))),
    ],
)
def test_more_workers_or_a_faster_link_never_serve_fewer_in_time(less: Deployment, more: Deployment) -> None:
    slo = Slo(0.15, 0.014)
    for seed in range(3):
        served = poisson(500, 12.0, seed)
        shares = [attainment(simulate(each, served).timelines, slo) for each in (less, more)]
        assert shares[0] <= shares[1] + 0.01


# Stages, links, caches ------------------------------------------------------------------------------------------------
def test_prompts_flow_through_stages_one_behind_the_other() -> None:
    """Ten prompts of a second each through two stages: the first after a second, then one every half."""
    latency = LinearLatency(1.0, 0.0, 0.0, stages=2)
    stages = deployment(worker(Role.PREFILL, latency, max_batched_tokens=100), worker(Role.DECODE, FREE))
    outcome = simulate(stages, requests([0.0] * 10, prompt=100, output=1))
    np.testing.assert_allclose(np.sort(outcome.prefill_end), [1.0 + 0.5 * n for n in range(10)])


def test_a_prompt_that_comes_while_only_the_last_stage_is_busy_starts_at_once() -> None:
    latency = LinearLatency(1.0, 0.0, 0.0, stages=2)
    stages = deployment(worker(Role.PREFILL, latency, max_batched_tokens=100), worker(Role.DECODE, FREE))
    outcome = simulate(stages, requests([0.0, 0.7], prompt=100, output=1))
    np.testing.assert_allclose(outcome.prefill_start, [0.0, 0.7])


def test_pushed_layer_by_layer_only_the_last_layer_is_left_after_prefill() -> None:
    """1,000 tokens of 1,000 bytes in 10 layers over 1e8 B/s: 10 ms for all, 1 ms for a layer."""
    served, slow = requests([0.0], prompt=1000, output=1), Link(1e8)
    pushed = simulate(deployment(PREFILL, DECODE, link=slow), served)
    serial = simulate(deployment(PREFILL, DECODE, link=slow, layerwise=False), served)
    assert pushed.kv_ready[0] - pushed.prefill_end[0] == pytest.approx(0.001)
    assert serial.kv_ready[0] - serial.prefill_end[0] == pytest.approx(0.010)


def test_transfers_queue_on_a_shared_link() -> None:
    """Two prefill workers of one node send over its one NIC; on two nodes each has its own."""
    served, slow = requests([0.0, 0.0], prompt=1000, output=1), Link(1e7)
    ends = {}
    for nodes in ((0, 0), (0, 2)):
        senders = [worker(Role.PREFILL, node=node) for node in nodes]
        receivers = [worker(Role.DECODE, FREE, node=node) for node in (1, 3)]
        ends[nodes] = np.sort(simulate(deployment(*senders, *receivers, link=slow), served).kv_ready)
    assert ends[0, 0][1] - ends[0, 0][0] == pytest.approx(0.1)
    assert ends[0, 2][1] == pytest.approx(ends[0, 2][0])


def prefixed(ids: list[list[int]], block_tokens: int) -> Prefixes:
    offsets = np.cumsum([0, *map(len, ids)])
    return Prefixes(np.array([each for row in ids for each in row]), offsets, block_tokens)


def test_a_cached_prefix_is_not_computed_again_but_is_sent() -> None:
    served = requests([0.0, 5.0], 1024, 1, prefixed([[1, 2], [1, 3]], 512))
    outcome = simulate(ONE_EACH, served)
    assert outcome.cached_tokens.tolist() == [0, 512]
    taken = outcome.prefill_end - outcome.prefill_start
    assert taken[1] == pytest.approx(LATENCY.step_s(Step.of([PrefillChunk(512, 512)])))
    (sent, received) = outcome.links
    assert sent.carried_bytes == received.carried_bytes == 2 * 1024 * 1000.0


def test_a_cache_holds_no_more_than_there_is_room_for() -> None:
    rows = [[2 * n, 2 * n + 1] for n in range(20)] * 2
    served = requests([float(n) for n in range(40)], 1024, 1, prefixed(rows, 512))
    roomy = simulate(ONE_EACH, served)
    tight = simulate(deployment(worker(Role.PREFILL, kv_blocks=400), DECODE), served)
    assert (roomy.cached_tokens[20:] == 1023).all()
    assert tight.cached_tokens.sum() == 0


# Starts and refusals --------------------------------------------------------------------------------------------------
def test_nothing_goes_to_a_worker_that_is_not_up_yet() -> None:
    late = deployment(worker(Role.PREFILL, cold_start_s=3.0), DECODE)
    assert simulate(late, requests([0.0], 100, 1)).bound[0] == 3.0


def test_a_request_longer_than_any_worker_takes_never_ends_and_holds_up_nobody() -> None:
    short = deployment(worker(Role.PREFILL, max_model_len=512), worker(Role.DECODE, max_model_len=512))
    outcome = simulate(short, requests([0.0, 0.1], [600, 100], 1))
    assert np.isinf(outcome.timelines.last_token).tolist() == [True, False]
    assert attainment(outcome.timelines, Slo(10.0, 10.0)) == 0.5


def test_at_the_horizon_what_has_not_ended_has_missed_its_objectives() -> None:
    outcome = simulate(ONE_EACH, poisson(200, 20.0), horizon_s=2.0)
    assert outcome.simulated_s <= 2.0
    assert 0.0 < np.isfinite(outcome.timelines.last_token).mean() < 1.0


def test_no_requests_are_served_in_no_time() -> None:
    empty = Requests(np.array([]), np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    assert simulate(ONE_EACH, empty).simulated_s == 0.0
