from dataclasses import replace

import pytest

from splitserve.planner.deployment import Role
from splitserve.planner.explain import Section, answer, explain, why_lost
from splitserve.planner.inputs import Inputs
from splitserve.planner.plan import Candidate
from splitserve.planner.question import Objective
from splitserve.planner.result import Interval
from tests.unit.planner.fixtures.results import INPUTS, judged, plan, pool, result, with_best


def _sections() -> dict[str, Section]:
    return {section.title: section for section in explain(plan())}


def _other(which: int) -> tuple[Candidate, Candidate]:
    made = plan()
    return made.chosen, made.runners_up[which]


def _asking(objective: Objective, rate: float | None = None) -> Inputs:
    return INPUTS.model_copy(update={"objective": objective, "rate": rate})


def test_the_answer_names_placement_goodput_interval_and_gpus() -> None:
    said = answer(plan())
    assert said.startswith(
        "1 prefill TP4 + 1 decode TP2 PP2 on a100-80g (8 GPUs) serve 3.2 requests/s (95% interval 3.07"
    )
    assert "90% of requests within TTFT 0.4 s and TPOT 0.1 s: 0.4 requests/s per GPU" in said


def test_a_rate_that_was_asked_for_is_in_the_answer() -> None:
    assert "3.33), 2.5 being asked for, with 90% of requests" in answer(plan(_asking(Objective.PER_GPU, 2.5)))


def test_the_answer_compares_with_colocated_serving() -> None:
    assert "2.13 times the best of colocated serving (2 colocated TP4 chunk 512 on a100-80g" in answer(plan())


def test_colocated_serving_that_wins_is_said_to() -> None:
    colocated = judged(pool(Role.COLOCATED, 4, chunk=512), goodput=2.0, affinity="none")
    said = answer(plan(found=with_best(colocated)))
    assert said.startswith("1 colocated TP4 chunk 512 on a100-80g (4 GPUs) serves 2 requests/s")
    assert "times the best of separating prefill and decode" in said


def test_a_loser_beyond_the_interval_is_told_by_how_much() -> None:
    assert why_lost(*_other(1), INPUTS).startswith("0.275 requests/s per GPU are 31% less than 0.4. Above 2.2")


def test_a_rival_within_the_interval_is_too_close_to_call() -> None:
    assert why_lost(*_other(0), INPUTS).startswith("too close to call at this effort")


def test_what_breaks_first_is_told_with_its_reason() -> None:
    ttft, tpot = why_lost(*_other(1), INPUTS), why_lost(*_other(2), INPUTS)
    assert "TTFT breaks first (p90 0.563 of 0.4 s): the slowest tenth of requests spend" in ttft
    assert "TPOT breaks first" in tpot
    assert tpot.endswith("prefill chunks share steps with decodes")


def test_a_placement_that_no_rate_suits_says_which_objective_it_misses() -> None:
    hopeless = judged(pool(Role.COLOCATED, 8), goodput=0.0, queue_s=5.0)
    made = plan(found=with_best(result().judged[0]).__class__((*result().judged, hopeless), (), None, 0, 0.0))
    assert made.runners_up[-1].lost.startswith("no rate meets both objectives: at the lowest one tried")


@pytest.mark.parametrize(
    ("objective", "rate", "which", "says"),
    [
        (Objective.FEWEST, 3.0, 1, "2.2 requests/s are below the 3 asked for"),
        (Objective.FEWEST, 0.5, 3, "it takes 4 GPUs where 8 do"),
        (Objective.FEWEST, 1.0, 2, "it takes as many GPUs and serves 1.5 requests/s, not 3.2"),
        (Objective.PER_COST, None, 1, "requests/s for one currency unit per hour are 31% less"),
        (Objective.PER_WATT, None, 1, "requests/s per kW are 31% less"),
    ],
)
def test_losing_is_told_in_the_objectives_own_terms(
    objective: Objective, rate: float | None, which: int, says: str
) -> None:
    assert says in why_lost(*_other(which), _asking(objective, rate))


def test_each_phase_is_explained_with_what_was_not_possible() -> None:
    prefill, decode = _sections()["Each phase by itself"].sentences
    assert (
        prefill
        == "Prefill, requests/s per GPU: TP4 on a100-80g 0.875 (worker: 3.5), TP2 on a100-80g 0.55 (worker: 1.1)."
    )
    assert decode.endswith("Ruled out: TP1 on a100-80g (the weights need 2 GPUs).")


def test_the_explanation_says_what_latencies_rest_on() -> None:
    rests = _sections()["What the latencies rest on"].sentences
    assert rests[0] == "prefill: interpolated, published coefficients (held-out error 3.0%)."
    assert rests[1].endswith("(held-out error unknown).")


def test_every_runner_up_is_explained() -> None:
    assert len(_sections()["Why the others lost"].sentences) == 4


def test_what_binds_is_told_with_use() -> None:
    said = " ".join(_sections()["What binds"].sentences)
    assert "Above 3.2 requests/s TTFT breaks first" in said
    assert "Prefill: 1 worker, 70% busy" in said
    assert "The busiest link, worker 0, NVLink" in said


def test_the_answer_says_what_a_router_that_heeds_objectives_gains() -> None:
    """3.2 requests/s by pools."""
    assert "slo_classes" not in answer(plan())
    found = replace(result(), adaptive_rps=Interval(4.0, 3.9, 4.1))
    assert "4 requests/s (3.9 to 4.1), 1.25 times as much" in answer(plan(found=found))
    assert "Leave" not in answer(plan(found=found))


@pytest.mark.parametrize(("high", "better_by_pools"), [(3.1, True), (3.3, False)])
def test_where_pools_do_better_beyond_the_interval_it_says_so(high: float, better_by_pools: bool) -> None:
    found = plan(found=replace(result(), adaptive_rps=Interval(3.0, 2.9, high)))
    assert found.better_by_pools is better_by_pools
    assert ("Leave engine.profile out" in answer(found)) is better_by_pools
