"""What a router tells of the last minute's outputs."""

import pytest

from splitserve.core.config import SloClass
from splitserve.core.fleet import Percentiles, RecentOutputs
from splitserve.router import classes as module
from splitserve.router.classes import RECENT_S, SloClasses


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def classes(clock: Clock) -> SloClasses:
    return SloClasses({"tight": SloClass(ttft_s=0.5, tpot_s=0.05)}, clock)


def recent(classes: SloClasses, name: str = "tight") -> RecentOutputs:
    return next(each for each in classes.status() if each.name == name).last_minute


def test_percentiles_are_of_the_outputs_that_finished(classes: SloClasses) -> None:
    for at in range(1, 11):  # TTFT 0.1 to 1.0, TPOT 10 to 100 ms
        classes.ended("tight", at <= 5, 20, at / 10, at / 100)
    classes.ended("tight", met=False)  # it failed: judged, and not measured
    assert recent(classes) == RecentOutputs(11, 5, Percentiles(0.5, 0.9, 1.0), Percentiles(0.05, 0.09, 0.1))


def test_a_single_token_has_no_tpot(classes: SloClasses) -> None:
    classes.ended("tight", True, 1, 0.2, None)
    assert recent(classes) == RecentOutputs(1, 1, Percentiles(0.2, 0.2, 0.2), Percentiles())


def test_each_class_has_its_own(classes: SloClasses) -> None:
    classes.ended("tight", True, 5, 0.2, 0.01)
    assert recent(classes, "standard") == RecentOutputs()


def test_after_a_minute_an_output_is_forgotten_and_the_five_minutes_still_have_it(
    classes: SloClasses, clock: Clock
) -> None:
    classes.ended("tight", True, 5, 0.2, 0.01)
    clock.now += RECENT_S / 2
    classes.ended("tight", False, 5, 0.8, 0.02)
    clock.now += RECENT_S / 2
    assert recent(classes).ended == 2, "just a minute old"
    clock.now += 0.001
    assert recent(classes) == RecentOutputs(1, 0, Percentiles(0.8, 0.8, 0.8), Percentiles(0.02, 0.02, 0.02))
    (status,) = [each for each in classes.status() if each.name == "tight"]
    assert (status.ended, status.met) == (2, 1)
    clock.now += RECENT_S
    assert recent(classes) == RecentOutputs()


def test_of_very_many_the_newest_count(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(module, "MOST_RECENT", 3)
    classes = SloClasses({"tight": SloClass(ttft_s=0.5)}, clock)
    for ttft_s in (9.0, 1.0, 2.0, 3.0):
        classes.ended("tight", True, 5, ttft_s, 0.01)
    assert recent(classes).ttft == Percentiles(2.0, 3.0, 3.0)
