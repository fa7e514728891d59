"""Which links moved KV of late."""

import pytest

from splitserve.core.fleet import LinkStatus
from splitserve.core.worker import TransferStats
from splitserve.router.transfers import MOST_LINKS, Transfers
from splitserve.router.window import WINDOW_S


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def transfers(clock: Clock) -> Transfers:
    return Transfers(clock)


def test_each_link_is_summed_and_the_busiest_comes_first(transfers: Transfers, clock: Clock) -> None:
    transfers.arrived("p0", "d0", TransferStats(bytes=100, bytes_before_prefill_ended=75))
    clock.now += 60
    transfers.arrived("p0", "d0", TransferStats(bytes=300, bytes_before_prefill_ended=200))
    transfers.arrived("p1", "d0", TransferStats(bytes=1000))
    transfers.failed("p0", "d0")
    assert transfers.status() == (LinkStatus("p1", "d0", 1, 0, 1000, 0), LinkStatus("p0", "d0", 2, 1, 400, 275))


def test_a_link_that_only_fails_is_told_of(transfers: Transfers) -> None:
    transfers.failed("p0", "d0")
    assert transfers.status() == (LinkStatus("p0", "d0", 0, 1, 0, 0),)


def test_after_five_minutes_it_is_forgotten(transfers: Transfers, clock: Clock) -> None:
    transfers.arrived("p0", "d0", TransferStats(bytes=100))
    clock.now += WINDOW_S + 1
    assert transfers.status() == ()


def test_beyond_the_most_all_others_are_one(transfers: Transfers) -> None:
    for number in range(MOST_LINKS + 3):
        transfers.arrived(f"p{number}", "d0", TransferStats(bytes=1000 - number, bytes_before_prefill_ended=1))
    transfers.failed(f"p{MOST_LINKS + 2}", "d0")
    told = transfers.status()
    assert len(told) == MOST_LINKS + 1
    assert told[-1] == LinkStatus("", "", 3, 1, sum(1000 - MOST_LINKS - each for each in range(3)), 3)
    assert sum(link.bytes for link in told) == sum(1000 - number for number in range(MOST_LINKS + 3))
