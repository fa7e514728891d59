from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.errors import ConfigError
from splitserve.core.slo import Slo, Timelines
from splitserve.planner.deployment import Role
from splitserve.planner.planned import deployment_of, links_of, met, parts_of, plan_of, quantiles, use_of
from splitserve.planner.simulator.outcome import LinkUse, Outcome, WorkerUse
from tests.unit.planner.fixtures.results import INPUTS, nothing, outcome, plan, question, result


def _one(**times: float) -> Outcome:
    """A single request: arrival 0, bound 1, prefill 3 to 6, KV at 7, tokens from 9 to 19."""
    at = {"bound": 1.0, "prefill_start": 3.0, "prefill_end": 6.0, "kv_ready": 7.0, "first": 9.0, "last": 19.0, **times}
    columns = {key: np.array([at[key]]) for key in ("bound", "prefill_start", "prefill_end", "kv_ready")}
    lines = Timelines(np.zeros(1), np.array([at["first"]]), np.array([at["last"]]), np.array([6]))
    return replace(outcome(1), timelines=lines, **columns)  # type: ignore[arg-type]


def test_the_parts_of_a_request_follow_each_other() -> None:
    parts = parts_of(_one())
    assert list(parts.model_dump().values()) == [1.0, 2.0, 3.0, 1.0, 2.0, 10.0]
    assert parts.ttft_s == 9.0


def test_kv_that_came_before_prefill_ended_takes_no_time() -> None:
    parts = parts_of(_one(kv_ready=5.0))
    assert parts.transfer_s == 0.0
    assert parts.first_token_s == 3.0


def test_a_phase_that_was_skipped_takes_no_time() -> None:
    parts = parts_of(_one(kv_ready=np.nan, prefill_start=np.nan))
    assert (parts.prefill_queue_s, parts.prefill_s, parts.transfer_s) == (0.0, 5.0, 0.0)
    assert parts.ttft_s == 9.0


def test_a_request_that_never_ended_is_in_no_mean() -> None:
    assert parts_of(_one(last=np.inf)).ttft_s == 0.0


def test_the_parts_add_up_to_the_mean_request() -> None:
    seen = outcome(500)
    parts = parts_of(seen)
    assert parts.ttft_s == pytest.approx(float(seen.timelines.ttft_s.mean()), rel=1e-3)
    total = float((seen.timelines.last_token - seen.timelines.arrival).mean())
    assert parts.ttft_s + parts.decode_s == pytest.approx(total, rel=1e-3)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.99]))
def test_a_quantile_is_a_value_that_enough_do_not_exceed(values: list[int], share: float) -> None:
    (found,) = quantiles(np.array(values, dtype=np.float64), [share]).values()
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)


def test_quantiles_count_those_that_never_came() -> None:
    found = quantiles(np.array([1.0, np.inf]), [0.5, 0.9])
    assert found == {"p50": 1.0, "p90": np.inf}


def test_each_objective_is_also_told_by_itself() -> None:
    lines = Timelines(
        np.zeros(4), np.array([1.0, 9.0, 1.0, np.inf]), np.array([2.0, 10.0, 101.0, np.inf]), np.array([11, 11, 11, 11])
    )
    assert met(lines, Slo(2.0, 0.5)) == {"ttft_met": 0.5, "tpot_met": 0.5, "both_met": 0.25}


def test_use_is_told_by_role() -> None:
    workers = [WorkerUse("a", "prefill", 1, 0.2, 0.1, 1), WorkerUse("b", "prefill", 1, 0.6, 0.3, 2)]
    (use,) = use_of(workers)
    assert (use.workers, use.busy_mean, use.busy_most, use.kv_peak, use.preemptions) == (2, 0.4, 0.6, 0.3, 3)


def test_of_many_links_the_busiest_are_told() -> None:
    seen = replace(outcome(1), links=tuple(LinkUse(f"link {n}", 1.0, n / 100) for n in range(40)))
    found = links_of(seen)
    assert [link.name for link in found[:2]] == ["link 39", "link 38"]
    assert len(found) == 16


def test_every_candidate_is_in_the_plan_with_why_it_lost() -> None:
    made = plan()
    assert made.chosen.lost == ""
    assert len(made.runners_up) == len(result().judged) - 1
    assert all(other.lost for other in made.runners_up)


def test_latencies_that_reach_beyond_their_source_are_flagged() -> None:
    (flag,) = [note for note in plan().notes if "latencies" in note]
    assert flag.startswith("decode latencies are extrapolated")
    assert "nobody knows their error" in flag


def test_a_search_that_found_nothing_has_no_plan() -> None:
    with pytest.raises(AssertionError):
        plan_of(INPUTS, question(), nothing())


def test_a_plans_deployment_has_its_workers_in_order() -> None:
    deployed = deployment_of(plan(), question())
    assert [spec.role for spec in deployed.workers] == [Role.PREFILL, Role.DECODE]
    assert deployed.layers == 64


def test_a_plan_whose_latencies_are_gone_says_so() -> None:
    lost = replace(question(), costs=lambda kind, parallelism: "no table has it")
    with pytest.raises(ConfigError, match=r"placement: 1 prefill TP4 on a100-80g: no table has it"):
        deployment_of(plan(), lost)
