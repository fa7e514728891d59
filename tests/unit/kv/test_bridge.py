"""What passes between an engine adapter and its connector's halves."""

import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from splitserve.core.worker import KvCounts, Pace, TransferStats
from splitserve.kv.bridge import AdapterEnd, ConnectorEnd, Ended, FromConnector, Held, Paced
from splitserve.kv.ticket import Counters

TIMEOUT_S = 20.0
STATS = TransferStats(4096, 2048, -0.5, 4, 0.25, 0.125)


class Adapter:
    def __init__(self) -> None:
        self.heard: SimpleQueue[FromConnector] = SimpleQueue()
        self.end = AdapterEnd(self.heard.put)

    def next(self) -> FromConnector:
        return self.heard.get(timeout=TIMEOUT_S)


@pytest.fixture
def adapter() -> Iterator[Adapter]:
    adapter = Adapter()
    yield adapter
    adapter.end.close()


def test_what_a_rank_has_counted_arrives_as_it_was(adapter: Adapter) -> None:
    counters = Counters(bytes_written=4096, writes=4, cancels=3, leases=2, expired_leases=1)
    counters.dropped["progress for no claim"] += 5
    half = ConnectorEnd(adapter.end.address, lambda message: None)
    half.tell(Held(1, 7, 8, 512, counters.counts()))
    half.tell(Ended(1, "t", 2, True, STATS, "lease", "nobody claimed it"))
    assert adapter.next() == Held(1, 7, 8, 512, KvCounts(4096, 4, 3, 2, 1, {"progress for no claim": 5}))
    assert adapter.next() == Ended(1, "t", 2, True, STATS, "lease", "nobody claimed it")
    half.close()


@pytest.mark.parametrize("pace", [Pace(), Pace(0.02, -0.125, 1.5)])
def test_how_decodes_stand_arrives_as_it_was_also_where_there_is_no_objective(adapter: Adapter, pace: Pace) -> None:
    half = ConnectorEnd(adapter.end.address, lambda message: None)
    half.tell(Paced(pace))
    assert adapter.next() == Paced(pace)
    half.close()


def test_counts_that_were_told_do_not_change_afterwards() -> None:
    counters = Counters()
    told = counters.counts()
    counters.dropped["late"] += 1
    assert told == KvCounts()


def test_a_half_reports_again_and_again_though_nobody_speaks(adapter: Adapter) -> None:
    reports: list[int] = []
    third = threading.Event()

    def report() -> None:
        reports.append(len(reports))
        half.tell(Held(0, len(reports), 0, 0, KvCounts()))
        if len(reports) == 3:
            third.set()

    half = ConnectorEnd(adapter.end.address, lambda message: None, report)
    assert third.wait(TIMEOUT_S)
    assert [adapter.next() for _ in range(3)] == [Held(0, blocks, 0, 0, KvCounts()) for blocks in (1, 2, 3)]
    half.close()


def test_a_half_that_talks_much_reports_no_more_often(adapter: Adapter) -> None:
    """Every message wakes the thread that reports."""
    reported = threading.Event()
    reports: list[None] = []

    def report() -> None:
        reports.append(None)
        reported.set()

    half = ConnectorEnd(adapter.end.address, lambda message: None, report)
    assert reported.wait(TIMEOUT_S)
    for number in range(200):
        half.tell(Held(0, number, 0, 0, KvCounts()))
        adapter.next()
    assert len(reports) < 100
    half.close()
