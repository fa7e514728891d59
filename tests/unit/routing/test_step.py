"""What a worker's steps take of late, as they are heard."""

import pytest

from splitserve.core.worker import Pool
from splitserve.routing.fleet import Fleet
from splitserve.routing.promise import Promise
from tests.unit.router.scripted import worker_info

UUID = "uuid-d0"


@pytest.fixture
def fleet() -> Fleet:
    made = Fleet(silent_after_s=60.0)
    made.join(worker_info("d0", Pool.DECODE), 0.0)
    made.promise(UUID, "job", Promise(Pool.DECODE, 4))
    return made


def step_s(fleet: Fleet) -> float:
    return fleet.status(UUID, 0.0).step_s


def test_before_the_second_token_nothing_is_known(fleet: Fleet) -> None:
    assert step_s(fleet) == -1.0
    fleet.heard(UUID, 1.0, tokens=True, goes_on=True)
    assert step_s(fleet) == -1.0


def test_it_is_a_moving_mean_of_the_gaps(fleet: Fleet) -> None:
    for now in (1.0, 1.02, 1.04):
        fleet.heard(UUID, now, tokens=True, goes_on=True)
    assert step_s(fleet) == pytest.approx(0.02)
    fleet.heard(UUID, 1.14, tokens=True, goes_on=True)
    assert step_s(fleet) == pytest.approx(0.02 + 0.1 * (0.1 - 0.02))


def test_news_without_tokens_are_no_step(fleet: Fleet) -> None:
    fleet.heard(UUID, 1.0, tokens=True, goes_on=True)
    fleet.heard(UUID, 1.01, tokens=False)
    fleet.heard(UUID, 1.02, tokens=True, goes_on=True)
    assert step_s(fleet) == pytest.approx(0.02)


def test_idle_time_after_the_last_token_is_no_step(fleet: Fleet) -> None:
    fleet.heard(UUID, 1.0, tokens=True, goes_on=True)
    fleet.heard(UUID, 1.02, tokens=True, goes_on=False)
    fleet.heard(UUID, 9.0, tokens=True, goes_on=True)
    assert step_s(fleet) == pytest.approx(0.02)


def test_idle_time_after_a_cancelled_decode_is_no_step(fleet: Fleet) -> None:
    fleet.heard(UUID, 1.0, tokens=True, goes_on=True)
    fleet.heard(UUID, 1.02, tokens=True, goes_on=True)
    fleet.ended(UUID, "job")
    fleet.heard(UUID, 9.0, tokens=True, goes_on=True)
    assert step_s(fleet) == pytest.approx(0.02)
