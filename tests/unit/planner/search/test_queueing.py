import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.slo import Slo
from splitserve.latency.linear import LinearLatency
from splitserve.planner.deployment import Parallelism, Role
from splitserve.planner.question import Costs
from splitserve.planner.search.candidates import Option
from splitserve.planner.search.demand import Demand
from splitserve.planner.search.phases import DecodeTime, simulate_phase
from splitserve.planner.search.queueing import bound
from tests.unit.planner.fixtures.questions import A100, Mixed

SLO = Slo(0.5, 0.05)


def option(role: Role, latency: LinearLatency, kv_tokens: int = 100_000, chunk: int = 2048) -> Option:
    return Option(role, A100, Parallelism(1, latency.stages), chunk, Costs(latency, kv_tokens))


def demand(requests: int, workload: Mixed = Mixed((500,), (100,))) -> Demand:  # noqa: B008
    return Demand.of(workload.draw(requests, 1.0, 0))


def test_a_prefill_worker_without_fixed_costs_serves_at_most_the_inverse_of_a_prompt() -> None:
    found = bound(option(Role.PREFILL, LinearLatency(0.0, 1e-4, 0.0)), demand(100), SLO, 256)
    assert found.rate_rps == pytest.approx(20.0, rel=0.01)


def test_pipeline_stages_multiply_what_a_prefill_worker_serves() -> None:
    one, two = (
        bound(option(Role.PREFILL, LinearLatency(0.0, 1e-4, 0.0, stages=s)), demand(100), SLO, 256) for s in (1, 2)
    )
    assert two.rate_rps == pytest.approx(2 * one.rate_rps, rel=0.01)


def test_a_decode_worker_serves_at_most_the_batch_whose_step_meets_the_objective() -> None:
    """Steps of 10 ms and 1 ms a sequence: 40 sequences in 50 ms, each of 100 tokens; all must meet it."""
    found = bound(option(Role.DECODE, LinearLatency(0.01, 0.0, 1e-3)), demand(100), Slo(1.0, 0.05, 1.0), 256)
    assert found.rate_rps == pytest.approx(40 / 0.05 / 100, rel=0.04)


def test_memory_bounds_a_decode_worker_by_littles_law() -> None:
    """5,505 tokens hold ten sequences of 550.5 on average, in steps of 10 ms."""
    found = bound(option(Role.DECODE, LinearLatency(0.01, 0.0, 0.0), kv_tokens=5505), demand(100), SLO, 256)
    assert found.rate_rps == pytest.approx(10 / 0.01 / 100, rel=0.02)


def test_sequences_bound_a_decode_worker() -> None:
    found = bound(option(Role.DECODE, LinearLatency(0.01, 0.0, 0.0)), demand(100), SLO, 20)
    assert found.rate_rps == pytest.approx(20 / 0.01 / 100, rel=0.02)


def test_what_an_idle_prefill_worker_misses_binds_the_time_to_first_token() -> None:
    found = bound(option(Role.PREFILL, LinearLatency(0.0, 2e-3, 0.0)), demand(100), SLO, 256)
    assert (found.rate_rps, found.binding) == (0.0, "ttft")
    assert "500 tokens" in found.reason
    assert "1 s" in found.reason


def test_what_an_idle_decode_worker_misses_binds_the_time_per_token() -> None:
    found = bound(option(Role.DECODE, LinearLatency(0.06, 0.0, 0.0)), demand(100), SLO, 256)
    assert (found.rate_rps, found.binding) == (0.0, "tpot")


def test_the_share_that_may_miss_the_objective_decides_over_the_longest_prompts() -> None:
    """A tenth of the prompts is too long for an idle worker: 89% is feasible, 91% isn't."""
    lengths = Mixed(tuple([100] * 9 + [4000]), (10,))
    prefill = option(Role.PREFILL, LinearLatency(0.0, 2e-4, 0.0))
    rates = [bound(prefill, demand(2000, lengths), Slo(0.5, 0.1, share), 256).rate_rps for share in (0.88, 0.92)]
    assert rates[0] > 0.0
    assert rates[1] == 0.0


@settings(max_examples=40, deadline=None)
@given(
    role=st.sampled_from(list(Role)),
    fixed_s=st.floats(0.001, 0.03),
    prefill_token_s=st.floats(1e-5, 2e-4),
    decode_token_s=st.floats(1e-5, 5e-4),
    context_token_s=st.floats(0.0, 1e-6),
    stages=st.integers(1, 3),
    kv_tokens=st.integers(5_000, 100_000),
)
def test_no_phase_keeps_up_beyond_its_bound(
    role: Role,
    fixed_s: float,
    prefill_token_s: float,
    decode_token_s: float,
    context_token_s: float,
    stages: int,
    kv_tokens: int,
) -> None:
    """Over a run long enough that what exceeds the bound piles up past the objective."""
    latency = LinearLatency(fixed_s, prefill_token_s, decode_token_s, context_token_s, stages=stages)
    worker, slo = option(role, latency, kv_tokens), Slo(0.5, 0.08)
    found = bound(worker, demand(100), slo, 256)
    if found.rate_rps:
        requests = demand(int(min(max(1500, 20 * found.rate_rps * slo.ttft_s), 20_000)))
        times = simulate_phase(worker, 1, requests, found.rate_rps * 1.15, DecodeTime(latency, 550.0), 256)
        assert times.attainment(slo) < slo.attainment
