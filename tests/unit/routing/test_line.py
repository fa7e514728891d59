"""Who goes first."""

from math import inf

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
