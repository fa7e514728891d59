from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.slo import Slo
from splitserve.latency.linear import LinearLatency
from splitserve.latency.model import Step
from splitserve.planner.deployment import Deployment, Link, Parallelism, Role, WorkerSpec
from splitserve.planner.question import Costs
from splitserve.planner.search.candidates import Option
from splitserve.planner.search.demand import Demand
from splitserve.planner.search.phases import DecodeTime, Times, simulate_phase
from splitserve.planner.simulator.simulate import simulate
from splitserve.workload.requests import Prefixes, Requests
from tests.unit.planner.fixtures.questions import A100, Mixed

LATENCY = LinearLatency(0.01, 1e-4, 1e-4, 5e-7)


def served(
    role: Role,
    rows: list[tuple[float, int, int]],
    latency: LinearLatency = LATENCY,
    workers: int = 1,
    chunk: int = 2048,
    kv_tokens: int = 100_000,
) -> Times:
    """`rows` are arrival, prompt and output tokens."""
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    demand = Demand.of(Requests(columns[0].astype(float), columns[1], columns[2]))
    option = Option(role, A100, Parallelism(1, latency.stages), chunk, Costs(latency, kv_tokens))
    return simulate_phase(option, workers, demand, 1.0, DecodeTime(latency, 500.0), 256)


def test_one_prefill_worker_without_batching_waits_as_m_d_1_says() -> None:
    """Mean wait of M/D/1 (Pollaczek-Khinchine): load * service / (2 * (1 - load))."""
    service, load, requests = 0.05, 0.7, 40_000
    drawn = Mixed((500,), (1,)).draw(requests, load / service, 1)
    option = Option(Role.PREFILL, A100, Parallelism(), 500, Costs(LinearLatency(0.0, 1e-4, 0.0), 10_000))
    times = simulate_phase(option, 1, Demand.of(drawn), 1.0, DecodeTime(LATENCY, 500.0), 256)
    assert np.mean(times.ttft_s) - service == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)


def test_prompts_that_wait_share_a_step_up_to_the_chunk() -> None:
    ttft = served(Role.PREFILL, [(0.0, 1000, 1), (0.01, 300, 1), (0.02, 200, 1), (0.03, 300, 1)], chunk=1000).ttft_s
    assert ttft == pytest.approx([0.11, 0.11 + 0.09 - 0.01, 0.2 - 0.02, 0.2 - 0.03])


def test_a_prompt_longer_than_the_chunk_takes_several_steps() -> None:
    latency = LinearLatency(0.01, 1e-4, 0.0, prefill_pair_s=1e-7)
    (ttft,) = served(Role.PREFILL, [(0.0, 2500, 1)], latency, chunk=1000).ttft_s
    assert ttft == pytest.approx(3 * 0.01 + 2500 * 1e-4 + 2500 * 2501 / 2 * 1e-7)


def test_the_next_step_enters_a_pipeline_when_its_first_stage_is_free() -> None:
    latency = LinearLatency(0.0, 1e-4, 0.0, stages=2)
    assert served(Role.PREFILL, [(0.0, 1000, 1), (0.0, 1000, 1)], latency, chunk=1000).ttft_s == pytest.approx(
        [0.1, 0.15]
    )


def test_a_free_prefill_worker_takes_what_another_would_make_wait() -> None:
    ttft = served(Role.PREFILL, [(0.0, 1000, 1), (0.01, 1000, 1)], workers=2).ttft_s
    assert ttft == pytest.approx([0.11, 0.11])


def test_cached_prefixes_are_not_computed_again() -> None:
    prefixes = Prefixes(np.array([1, 2, 1, 3]), np.array([0, 2, 4]), 100)
    drawn = Requests(np.array([0.0, 5.0]), np.array([250, 250]), np.array([1, 1]), prefixes)
    demand = Demand.of(drawn)
    assert demand.new == [250, 150]
    assert demand.pairs[1] == 150 * 100 + 150 * 151 // 2


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.floats(0.0, 3.0), st.integers(1, 2000), st.integers(1, 60)), min_size=1, max_size=25
    ).map(sorted)
)
def test_decode_steps_taken_at_once_are_the_steps_taken_one_by_one(rows: list[tuple[float, int, int]]) -> None:
    quick, slow = served(Role.DECODE, rows), _stepwise(rows)
    assert quick.ttft_s == pytest.approx(slow.ttft_s)
    assert quick.tpot_s == pytest.approx(slow.tpot_s)


def test_a_sequence_without_memory_waits_for_another_to_end() -> None:
    rows = [(0.0, 600, 10), (0.0, 600, 10)]
    roomy, tight = (served(Role.DECODE, rows, kv_tokens=tokens).ttft_s[1] for tokens in (2000, 1000))
    assert tight > 10 * LATENCY.fixed_s > roomy


def test_prompts_slow_the_decodes_that_they_share_steps_with() -> None:
    alone = served(Role.COLOCATED, [(0.0, 500, 100)])
    shared = served(Role.COLOCATED, [(0.0, 500, 100), (0.2, 2000, 1)])
    assert shared.tpot_s[0] == pytest.approx(alone.tpot_s[0] + 0.2 / 99)


@pytest.mark.parametrize("role", [Role.COLOCATED, Role.DECODE])
@pytest.mark.parametrize("stages", [1, 2])
def test_one_worker_by_itself_is_what_the_whole_simulation_makes_of_it(role: Role, stages: int) -> None:
    """Light and joint simulation of the same worker under half its load: medians and 90% quantiles within 10%. The
    joint one needs prefill workers before a decode worker: eight that take no time."""
    latency = LinearLatency(0.02, 1e-4, 1e-4, 5e-7, stages=stages)
    drawn = Mixed().draw(600, 4.0, 3)
    option = Option(role, A100, Parallelism(1, stages), 2048, Costs(latency, 160_000))
    light = simulate_phase(option, 1, Demand.of(drawn), 1.0, DecodeTime(latency, 600.0), 256)
    workers = [WorkerSpec(role, latency, 10_000)]
    if role is Role.DECODE:
        workers += [WorkerSpec(Role.PREFILL, LinearLatency(1e-6, 0.0, 0.0), 10_000)] * 8
    whole = simulate(Deployment(tuple(workers), 1.0, 4, Link(1e12), Link(1e12)), drawn).timelines
    for share in (50, 90):
        assert np.percentile(light.tpot_s, share) == pytest.approx(np.percentile(whole.tpot_s, share), rel=0.1)
        assert np.percentile(light.ttft_s, share) == pytest.approx(np.percentile(whole.ttft_s, share), rel=0.1)


def test_attainment_needs_both_objectives() -> None:
    assert Times([0.1, 0.1, 0.9, 0.1], [0.1, 0.9, 0.1, 0.1]).attainment(Slo(0.5, 0.5)) == 0.5


def _stepwise(rows: list[tuple[float, int, int]]) -> Times:
    """Every step by itself, in the plainest way."""
    running: list[int] = []
    now, waiting, made = 0.0, list(range(len(rows))), [0] * len(rows)
    first, last = [0.0] * len(rows), [0.0] * len(rows)
    for _ in count():
        if not waiting and not running:
            break
        if not running:
            now = max(now, rows[waiting[0]][0])
        while waiting and rows[waiting[0]][0] <= now:
            running.append(waiting.pop(0))
        now += LATENCY.step_s(Step(0, 0, 0, len(running), sum(rows[i][1] + made[i] for i in running)))
        for request in list(running):
            made[request] += 1
            first[request] = first[request] or now
            if made[request] == rows[request][2]:
                last[request] = now
                running.remove(request)
    ttft = [at - row[0] for at, row in zip(first, rows, strict=True)]
    gaps = zip(first, last, rows, strict=True)
    return Times(ttft, [(b - a) / (row[2] - 1) if row[2] > 1 else 0.0 for a, b, row in gaps])
