"""SLO classes of a router."""

from math import inf

import pytest

from splitserve.core.config import DEFAULT_CLASS, Late, SloClass
from splitserve.core.worker import Objectives
from splitserve.router.classes import SloClasses
from splitserve.router.window import WINDOW_S
from splitserve.routing.lengths import FIRST


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def classes(clock: Clock) -> SloClasses:
    tight = SloClass(ttft_s=0.5, ttft_per_token_s=0.001, tpot_s=0.05, itl_p99_s=0.2, priority=-5, late=Late.REFUSE)
    return SloClasses({"tight": tight}, clock)


def test_a_class_is_what_its_settings_say(classes: SloClasses) -> None:
    tight = classes.of("tight")
    assert tight.slo.first_token_s(1000) == 1.5
    assert (tight.priority, tight.refuses) == (-5, True)
    assert tight.objectives(0.3) == Objectives(0.3, 0.05, 0.2)


def test_there_is_always_the_class_of_those_that_name_none(classes: SloClasses) -> None:
    assert classes.names == ("tight", DEFAULT_CLASS)
    assert classes.of(DEFAULT_CLASS).objectives(inf) == Objectives()


def test_attainment_and_goodput_are_those_of_the_last_minutes(classes: SloClasses, clock: Clock) -> None:
    for number in range(10):
        classes.ended("tight", met=number < 7)
    clock.now += 20.0
    tight, standard = classes.status()
    assert (tight.ended, tight.met, tight.goodput_rps) == (10, 7, 7 / 20.0)
    assert (standard.ended, standard.met) == (0, 0)
    clock.now += WINDOW_S
    classes.ended("tight", met=True)
    tight, _ = classes.status()
    assert (tight.ended, tight.met, tight.goodput_rps) == (1, 1, 1 / WINDOW_S)


def test_outputs_are_expected_to_be_as_long_as_those_of_late(classes: SloClasses) -> None:
    assert classes.output_tokens("tight", 0, most=50) == 50
    for _ in range(100):
        classes.ended("tight", met=True, output_tokens=300)
    assert classes.output_tokens("tight", 0, most=4096) == 300
    assert classes.output_tokens("tight", 100, most=4096) == 200
    assert classes.output_tokens("tight", 100, most=10) == 10
    assert classes.output_tokens("tight", 300, most=0) == 1


def test_outputs_of_one_class_say_nothing_of_anothers(classes: SloClasses) -> None:
    for _ in range(100):
        classes.ended("tight", met=True, output_tokens=40)
    assert classes.output_tokens(DEFAULT_CLASS, 0, most=4096) == FIRST
