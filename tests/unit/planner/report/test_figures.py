import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from splitserve.planner.deployment import Role
from splitserve.planner.plan import Plan
from splitserve.planner.report.figures import (
    attainment_chart,
    candidates_chart,
    cost_is_worth_a_chart,
    distribution_chart,
    pareto_chart,
    pareto_front,
    shown,
    time_chart,
)
from splitserve.planner.result import SearchResult
from tests.unit.planner.fixtures.results import INPUTS, judged, plan, pool, result


def _widths(svg: str, style: str) -> list[float]:
    return [float(found) for found in re.findall(rf'<rect class="{style}"[^>]* width="([0-9.]+)"', svg)]


def _alone() -> Plan:
    return plan(found=SearchResult(result().judged[:1], (), None, 0, 0.0))


def test_every_chart_is_well_formed() -> None:
    made = plan()
    charts = [
        attainment_chart(made),
        distribution_chart(made, "TTFT", 0.4, lambda one: one.ttft_s),
        candidates_chart(made),
        pareto_chart(made, by_cost=True),
        time_chart(made, whole=True),
    ]
    for chart in charts:
        assert ET.fromstring(chart).tag == "svg"


def test_the_chosen_one_is_drawn_beside_the_best_of_the_other_kind() -> None:
    assert [(style, one.placement.colocated) for style, one in shown(plan())] == [
        ("separated", False),
        ("colocated", True),
    ]


def test_a_placement_without_rivals_is_drawn_alone() -> None:
    made = _alone()
    assert len(shown(made)) == 1
    assert "rival" not in time_chart(made, whole=False)


def test_a_rival_of_the_same_kind_has_a_colour_of_its_own() -> None:
    same = plan(found=SearchResult(result().judged[:2], (), None, 0, 0.0))
    assert [style for style, _ in shown(same)] == ["separated", "second"]


def test_attainment_has_its_band_the_target_and_the_goodputs_interval() -> None:
    chart = attainment_chart(plan())
    assert 'class="band separated"' in chart
    assert "target 90%" in chart
    assert 'class="interval"' in chart


def test_every_candidate_has_a_bar_as_long_as_its_goodput_per_gpu() -> None:
    bars = _widths(candidates_chart(plan()), "(?:separated|colocated)")
    figures = [one.goodput_per_gpu for one in plan().candidates]
    assert len(bars) == len(figures)
    assert [bar / bars[0] for bar in bars] == pytest.approx([each / figures[0] for each in figures], rel=0.01)


def test_the_front_holds_what_nothing_beats() -> None:
    assert pareto_front([(8, 3.0), (4, 1.0), (8, 2.0), (12, 2.5), (16, 5.0)]) == [(4, 1.0), (8, 3.0), (16, 5.0)]


def test_beaten_candidates_are_faded() -> None:
    assert pareto_chart(plan(), by_cost=False).count("beaten") == 3


def test_cost_has_a_chart_only_where_gpus_differ_in_price() -> None:
    assert not cost_is_worth_a_chart(plan())
    one = judged(pool(Role.COLOCATED, 4), goodput=1.0)
    cheaper = replace(one, placement=replace(one.placement, cost_per_hour=1.0))
    assert cost_is_worth_a_chart(plan(found=SearchResult((*result().judged, cheaper), (), None, 0, 0.0)))


def test_decode_is_only_in_the_whole() -> None:
    assert "decode:" in time_chart(plan(), whole=True)
    assert "decode:" not in time_chart(plan(), whole=False)


def test_requests_that_never_came_are_left_out_of_a_distribution() -> None:
    made = plan()
    broken = made.model_copy(
        update={"chosen": made.chosen.model_copy(update={"ttft_s": {"p50": 0.2, "p99": float("inf")}})}
    )
    chart = distribution_chart(broken, "TTFT", INPUTS.ttft, lambda one: one.ttft_s)
    assert "inf" not in chart
    assert "nan" not in chart


def test_a_candidate_that_serves_nothing_does_not_break_the_charts() -> None:
    hopeless = judged(pool(Role.COLOCATED, 8), goodput=0.0)
    made = plan(found=SearchResult((*result().judged[:1], hopeless), (), None, 0, 0.0))
    for chart in (attainment_chart(made), candidates_chart(made), pareto_chart(made, by_cost=False)):
        ET.fromstring(chart)
