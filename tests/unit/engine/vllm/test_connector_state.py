"""What the adapter knows of its connector, over all ranks."""

import pytest

from splitserve.core.worker import KvCounts, Pace, TransferEnd, TransferStats
from splitserve.engine.protocol import EngineLoad
from splitserve.engine.vllm.connector_state import ConnectorState
from splitserve.kv.bridge import Ended, Free, Held, Paced, Preempted
from splitserve.kv.ticket import TransferKey

KEY = TransferKey("t", 1)
RANKS = 2


class State:
    def __init__(self) -> None:
        self.ended: list[tuple[TransferKey, TransferEnd, str]] = []
        self.connector = ConnectorState(RANKS, lambda *end: self.ended.append(end), lambda job_id: None)

    def ends(self, rank: int, stats: TransferStats, reason: str = "", error: str = "") -> None:
        self.connector.hear(Ended(rank, KEY.transfer_id, KEY.epoch, True, stats, reason, error))


@pytest.fixture
def state() -> State:
    return State()


def test_a_transfer_has_ended_when_every_rank_has_said_so(state: State) -> None:
    state.ends(0, TransferStats(100, 60, -0.5, 4, 0.25, 0.1))
    assert state.ended == []
    state.ends(1, TransferStats(50, 50, -0.75, 2, 0.5, 0.3))
    assert state.ended == [(KEY, TransferEnd(True, TransferStats(150, 110, -0.5, 6, 0.75, 0.3)), "")]


def test_the_first_ranks_failure_is_told_once_with_its_reason(state: State) -> None:
    state.ends(0, TransferStats(), "lease", "nobody claimed it")
    state.ends(1, TransferStats(), "peer ended", "it has ended")
    assert state.ended == [(KEY, TransferEnd(True, TransferStats(), "lease"), "nobody claimed it")]


def test_a_failure_after_another_ranks_success_is_a_failure(state: State) -> None:
    state.ends(0, TransferStats(100, writes=1))
    state.ends(1, TransferStats(), "write", "a WRITE failed")
    assert [(end.reason, error) for _, end, error in state.ended] == [("write", "a WRITE failed")]


def test_blocks_are_those_of_the_fullest_rank_and_all_else_is_summed(state: State) -> None:
    """Ranks share one block table."""
    state.connector.hear(Free(90))
    state.connector.hear(Held(0, 3, 0, 100, KvCounts(1000, 10, 1, 2, 0, {"late": 1})))
    state.connector.hear(Held(1, 2, 1, 50, KvCounts(500, 5, 0, 1, 1, {"late": 2, "odd": 1})))
    state.connector.hear(Preempted(7))
    load = state.connector.load
    assert load == EngineLoad(90, 3, 1, 150)
    assert load.preemptions == 7
    assert load.counts == KvCounts(1500, 15, 1, 3, 1, {"late": 3, "odd": 1})


def test_a_rank_that_reports_again_is_not_counted_twice(state: State) -> None:
    for writes in (5, 8):
        state.connector.hear(Held(0, 0, 0, 0, KvCounts(writes=writes)))
    assert state.connector.load.counts.writes == 8


def test_how_decodes_stand_is_what_was_said_last(state: State) -> None:
    assert state.connector.load.pace == Pace()
    for pace in (Pace(0.02, -0.1, 1.5), Pace(slowdown=1.25)):
        state.connector.hear(Paced(pace))
        assert state.connector.load.pace == pace
