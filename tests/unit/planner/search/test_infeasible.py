from dataclasses import replace

from splitserve.core.slo import Slo
from splitserve.planner.question import Objective
from splitserve.planner.result import Infeasible
from splitserve.planner.search.search import search
from tests.unit.planner.fixtures.questions import Mixed, asked


def _why(**changes: object) -> Infeasible:
    result = search(replace(asked(gpus=2), **changes))  # type: ignore[arg-type]
    assert result.infeasible is not None
    assert result.best is None
    return result.infeasible


def test_a_first_token_that_no_idle_worker_makes_in_time_binds() -> None:
    found = _why(slo=Slo(0.03, 0.05))
    assert found.binding == "ttft"
    assert "800 tokens" in found.sentence
    assert found.nearest_ttft_s is not None
    assert f"{found.nearest_ttft_s:.3g} s" in found.sentence
    assert found.nearest_rate_rps is None
    assert found.nearest_tpot_s is None


def test_the_nearest_objective_is_feasible_and_a_tighter_one_is_not() -> None:
    question = asked(gpus=2)
    nearest = _why(slo=Slo(0.03, 0.05)).nearest_ttft_s
    assert nearest is not None
    assert search(replace(question, slo=Slo(nearest * 1.05, 0.05))).best is not None
    assert search(replace(question, slo=Slo(nearest / 1.2, 0.05))).best is None


def test_tokens_that_no_idle_worker_makes_in_time_bind() -> None:
    found = _why(slo=Slo(0.5, 0.005))
    assert found.binding == "tpot"
    assert found.nearest_tpot_s is not None
    assert 0.005 < found.nearest_tpot_s < 0.03
    assert found.nearest_ttft_s is None


def test_a_rate_beyond_the_machines_names_the_nearest_rate() -> None:
    found = _why(rate_rps=100.0, objective=Objective.FEWEST)
    assert found.binding == "rate"
    assert found.nearest_rate_rps is not None
    assert 5.0 < found.nearest_rate_rps < 30.0
    assert "100 requests/s" in found.sentence
    assert search(replace(asked(gpus=2), rate_rps=found.nearest_rate_rps / 1.1)).best is not None


def test_a_rate_that_looser_objectives_allow_names_them() -> None:
    feasible = search(asked(gpus=2, tpot_s=0.03)).best
    assert feasible is not None
    found = _why(slo=Slo(0.3, 0.03), rate_rps=feasible.goodput_rps.mean * 1.2)
    assert found.binding == "rate"
    assert found.nearest_tpot_s is not None
    assert 0.03 < found.nearest_tpot_s < 0.3


def test_weights_that_fit_nowhere_say_what_would_hold_them() -> None:
    found = _why(costs=lambda gpu, parallelism: "the weights need 4 GPUs")
    assert found.binding == "memory"
    assert "the weights need 4 GPUs" in found.sentence
    assert found.nearest_ttft_s is None


def test_a_cache_too_small_for_the_longest_request_is_memory() -> None:
    found = _why(max_model_len=1_000_000, workload=Mixed())
    assert found.binding == "memory"
    assert "1,000,000" in found.sentence
