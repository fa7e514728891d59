from dataclasses import replace

from splitserve.planner.curve import SHARES, with_curves
from splitserve.planner.deployment import Role
from splitserve.planner.question import Effort
from splitserve.planner.result import SearchResult
from tests.unit.planner.fixtures.results import judged, pool, question

QUICK = replace(question(), effort=Effort(requests=50, seeds=2))


def _few(goodput: float = 3.2) -> SearchResult:
    separated = judged(pool(Role.PREFILL, 4), pool(Role.DECODE, 4), goodput=goodput)
    colocated = judged(pool(Role.COLOCATED, 4), goodput=1.0)
    return SearchResult((separated, separated, colocated), (), None, 0, 0.0)


def test_the_best_of_each_kind_has_points_all_along_with_intervals() -> None:
    before, drawn = _few(), with_curves(QUICK, _few())
    for index, goodput in ((0, 3.2), (2, 1.0)):
        assert [point.rate_rps for point in drawn.judged[index].points] == [share * goodput for share in SHARES]
    assert drawn.judged[1].points == before.judged[1].points


def test_the_rest_of_the_result_stays() -> None:
    before, drawn = _few(), with_curves(QUICK, _few())
    assert [one.goodput_rps for one in drawn.judged] == [one.goodput_rps for one in before.judged]


def test_a_placement_that_serves_nothing_has_no_curve() -> None:
    drawn = with_curves(QUICK, _few(goodput=0.0))
    assert drawn.judged[0].points == ()


def test_nothing_found_is_nothing_drawn() -> None:
    nothing = SearchResult((), (), None, 0, 0.0)
    assert with_curves(QUICK, nothing) == nothing


def test_progress_ends_below_all_of_it() -> None:
    told: list[float] = []
    with_curves(QUICK, _few(), lambda doing, share: told.append(share))
    assert told == [0.0, 0.5]
