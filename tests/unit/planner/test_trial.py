import pytest

from splitserve.core.slo import Slo
from splitserve.planner.planned import deployment_of
from splitserve.planner.trial import trial_of, tried
from tests.unit.planner.fixtures.results import outcome, plan, question

SLO = Slo(0.4, 0.1)


def test_a_trial_joins_the_requests_of_all_seeds() -> None:
    trial = trial_of([outcome(100, seed=0), outcome(100, seed=1)], SLO, "sharegpt", 3.0)
    assert (trial.requests, trial.seeds) == (200, 2)


def test_attainment_has_an_interval_over_seeds() -> None:
    both = trial_of([outcome(300, queue_s=0.2, seed=seed) for seed in range(5)], SLO, "sharegpt", 3.0).both_met
    assert both.low < both.mean < both.high


def test_one_seed_has_no_interval() -> None:
    both = trial_of([outcome(300)], SLO, "sharegpt", 3.0).both_met
    assert both.low == both.mean == both.high


def test_a_plan_is_simulated_as_it_was_placed() -> None:
    told: list[float] = []
    trial = tried(deployment_of(plan(), question()), question(), 1.0, 50, 2, lambda doing, share: told.append(share))
    assert {use.role for use in trial.use} == {"prefill", "decode"}
    assert trial.requests == 100
    assert told == [0.0, 0.5]


def test_more_requests_per_second_never_meet_the_objectives_more_often() -> None:
    deployed = deployment_of(plan(), question())
    slow, fast = (tried(deployed, question(), rate, 200, 2).both_met.mean for rate in (0.5, 200.0))
    assert fast < slow
    assert slow == pytest.approx(1.0, abs=0.05)
