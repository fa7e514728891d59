import pytest

from splitserve.planner.compare import compare, significant
from splitserve.planner.deployment import Role
from tests.unit.planner.fixtures.results import INPUTS, judged, plan, pool, with_best

BETTER = with_best(judged(pool(Role.PREFILL, 2, workers=2), pool(Role.DECODE, 2, 2), goodput=4.0, affinity="low"))


def test_a_plan_does_not_differ_from_itself() -> None:
    same = compare(plan(), plan())
    assert (same.inputs, same.placement, same.notes) == ((), (), ())
    assert {difference.change for difference in same.figures} == {0.0}
    assert not significant(plan(), plan())


def test_inputs_that_differ_are_listed_and_no_others() -> None:
    (difference,) = compare(plan(), plan(INPUTS.model_copy(update={"ttft": 0.2}))).inputs
    assert (difference.what, difference.a, difference.b) == ("ttft", "0.4", "0.2")


def test_pools_that_differ_are_listed() -> None:
    differences = {each.what: (each.a, each.b) for each in compare(plan(), plan(found=BETTER)).placement}
    assert differences == {
        "affinity": ("high", "low"),
        "prefill": ("1 prefill TP4 on a100-80g", "2 prefill TP2 on a100-80g"),
    }


def test_a_pool_that_only_one_has_is_a_difference() -> None:
    colocated = plan(found=with_best(judged(pool(Role.COLOCATED, 4), goodput=3.0, affinity="none")))
    differences = {each.what: (each.a, each.b) for each in compare(plan(), colocated).placement}
    assert differences["colocated"] == ("-", "1 colocated TP4 chunk 8192 on a100-80g")
    assert differences["decode"][1] == "-"


def test_figures_tell_their_relative_change() -> None:
    goodput = compare(plan(), plan(found=BETTER)).figures[0]
    assert (goodput.what, goodput.a, goodput.b) == ("goodput", "3.2/s", "4/s")
    assert goodput.change == pytest.approx(0.25)


def test_goodputs_differ_only_beyond_their_intervals() -> None:
    assert significant(plan(), plan(found=BETTER))
    assert not significant(plan(), plan(found=with_best(judged(pool(Role.PREFILL, 4), goodput=3.3))))
