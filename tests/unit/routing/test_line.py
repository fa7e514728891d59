"""Who goes first."""

from collections import deque
from heapq import heappop, heappush
from math import inf, isinf

from hypothesis import given
from hypothesis import strategies as st

from splitserve.routing.line import NO_OBJECTIVE_S, PUT_OFF, Place


def test_priority_comes_first_then_the_earliest_due_then_arrival() -> None:
    urgent = Place.of(-1, 5.0, 9.0, 4)
    soon, later = Place.of(0, 1.0, 0.5, 3), Place.of(0, 0.0, 2.0, 2)
    same = Place.of(0, 1.5, 0.5, 5)
    assert sorted([later, same, soon, urgent]) == [urgent, soon, later, same]


def test_without_objectives_it_is_first_come_first_served() -> None:
    places = [Place.of(0, float(number), inf, number) for number in range(5)]
    assert sorted([*places[3:], *places[:3]]) == places
    assert places[0].due == NO_OBJECTIVE_S


def test_who_would_be_late_is_put_off_once() -> None:
    place = Place.of(0, 10.0, 2.0, 1)
    assert place.after(12.0) is place
    behind = place.after(12.1)
    assert behind.put_off
    assert behind.due == 10.0 + PUT_OFF * 2.0
    assert behind.after(1000.0) is behind


def test_one_without_an_objective_is_never_put_off() -> None:
    place = Place.of(0, 0.0, inf, 1)
    assert place.after(1e9) is place


arrivals = st.lists(
    st.tuples(st.floats(0.0, 2.0), st.sampled_from([0.01, 0.3, 1.0, 5.0, inf])), min_size=1, max_size=40
)


@given(arrivals, st.floats(0.01, 3.0))
def test_nobody_waits_behind_who_is_due_after_his_own_put_off_time(
    asked: list[tuple[float, float]], service_s: float
) -> None:
    """One server, however slow, that takes the first of the line, or puts it off if it would be late."""
    places, at = [], 0.0
    for number, (gap_s, objective_s) in enumerate(asked):
        at += gap_s
        places.append(Place.of(0, at, objective_s, number))
    served = serve(places, service_s)
    assert sorted(served) == [place.number for place in places], "everybody is served"
    for number, began in served.items():
        mine = places[number]
        patience_s = NO_OBJECTIVE_S if isinf(mine.first_token_s) else PUT_OFF * mine.first_token_s
        for other in places:
            if served[other.number] > mine.arrived_at and other.due > mine.arrived_at + patience_s:
                assert served[other.number] > began


def serve(places: list[Place], service_s: float) -> dict[int, float]:
    """When each was begun."""
    line: list[Place] = []
    served: dict[int, float] = {}
    coming, now = deque(places), 0.0
    while coming or line:
        if not line:
            now = max(now, coming[0].arrived_at)
        while coming and coming[0].arrived_at <= now:
            heappush(line, coming.popleft())
        first = heappop(line)
        behind = first.after(now + service_s)
        if line and behind is not first:
            heappush(line, behind)
            continue
        served[first.number] = now
        now += service_s
    return served
