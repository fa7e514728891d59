"""Hundreds of faulty worlds: whatever happens, no block is read or written that is somebody else's, none is lost, no
wrong byte is taken for a right one, and everything comes to rest. `tests/slow/test_kv_faults.py` has thousands.
"""

from collections.abc import Callable

import pytest

from splitserve.kv import source
from splitserve.kv.ledger import (
    DESTINATION,
    SOURCE,
    DestinationAction,
    DestinationEvent,
    DestinationState,
    SourceAction,
    SourceEvent,
    SourceState,
)
from splitserve.kv.source import SourceSide
from splitserve.kv.transport import WriteState
from tests.unit.kv.campaign import DISHONEST, KINDS, ROWS, Campaign, Recipe
from tests.unit.kv.world import ModelWrite

CAUGHT_WITHIN = 1000  # runs


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    """Raises where a run breaks a rule."""
    made = Campaign()
    made.survey(100)
    made.strike(2)
    made.seek(ROWS - DISHONEST, most=500)
    return made


def test_no_run_breaks_a_safety_rule_and_every_run_comes_to_rest(campaign: Campaign) -> None:
    assert campaign.runs > 400
    assert set(campaign.faults) == {"lose", "truncate", "duplicate", "reorder", "delay", "stop", "kill"}
    assert min(campaign.faults.values()) > 20


def test_every_transition_of_both_tables_is_met(campaign: Campaign) -> None:
    assert ROWS - set(campaign.rows) == DISHONEST


def test_faults_of_every_kind_strike_at_transitions(campaign: Campaign) -> None:
    assert {(fault, peer) for _, fault, peer in campaign.struck} == set(KINDS)
    assert len({row for row, _, _ in campaign.struck}) > 0.8 * len(ROWS)


def test_transfers_end_in_every_way(campaign: Campaign) -> None:
    """A suite in which nothing arrived would see no wrong byte either."""
    assert min(campaign.told[name] for name in ("received", "failed", "released", "sent")) > 200


def test_a_run_is_the_same_every_time() -> None:
    first, second = (Campaign().run(Recipe(7)) for _ in range(2))
    assert (first.now, first.rows, first.faults) == (second.now, second.rows, second.faults)
    for uuid, rank in first.ranks.items():
        assert rank.told == second.ranks[uuid].told


# The negative twins: each rule broken on purpose is noticed ----------------------------------------------------------
def assert_caught() -> None:
    with pytest.raises(AssertionError, match=r"\S"):
        Campaign().survey(CAUGHT_WITHIN)


_S, _E, _A = SourceState, SourceEvent, SourceAction
_D, _F, _B = DestinationState, DestinationEvent, DestinationAction


@pytest.mark.parametrize(
    ("table", "pair", "wrong"),
    [
        (SOURCE, (_S.PUSHING, _E.CANCEL), (_S.STOPPED, (_A.STOP, _A.CONFIRM_CANCEL))),
        (SOURCE, (_S.FINISHING, _E.CANCEL), (_S.ENDED, (_A.CONFIRM_CANCEL, _A.SENT))),
        (SOURCE, (_S.FINISHING, _E.PREFILL_ABORTED), (_S.ENDED, (_A.STOP, _A.SENT))),
        (SOURCE, (_S.STOPPING, _E.PREFILL_ENDED), (_S.ENDED, (_A.SENT,))),
        (SOURCE, (_S.DELIVERED, _E.PREFILL_ENDED), (_S.ENDED, ())),
        (SOURCE, (_S.HELD, _E.LEASE_EXPIRED), (_S.HELD, ())),
        (SOURCE, (_S.PUSHING, _E.DEADLINE), (_S.STOPPED, (_A.ANSWER,))),
        (DESTINATION, (_D.REGISTERED, _F.ABANDON), (_D.ENDED, (_B.CANCEL, _B.RELEASED))),
        (DESTINATION, (_D.REGISTERED, _F.DEADLINE), (_D.ENDED, (_B.CANCEL, _B.FAILED))),
        (DESTINATION, (_D.REGISTERED, _F.PEER_SILENT), (_D.ENDED, (_B.FAILED,))),
        (DESTINATION, (_D.REGISTERED, _F.PROGRESS), (_D.ENDED, (_B.RECEIVED,))),
        (DESTINATION, (_D.REGISTERED, _F.PEER_ENDED), (_D.REGISTERED, ())),
        (DESTINATION, (_D.ABANDONED, _F.RETRY), (_D.ABANDONED, ())),
        (DESTINATION, (_D.ABANDONED, _F.CANCELLED), (_D.ENDED, ())),
    ],
)
def test_a_table_that_breaks_a_rule_is_caught(
    monkeypatch: pytest.MonkeyPatch, table: dict[object, object], pair: object, wrong: object
) -> None:
    assert pair in table
    monkeypatch.setitem(table, pair, wrong)
    assert_caught()


def _pass_without_asking(side: SourceSide, now: float) -> None:
    for waiting in side._fenced:
        object.__setattr__(waiting, "fence", None)
    _PASS(side, now)


def _drain_at_once(side: SourceSide) -> None:
    for drain in side._drains:
        drain.over.set()
    side._drains = []


def _lose_the_tail(write: ModelWrite, state: WriteState) -> None:
    if state is WriteState.DONE:
        write.move(write.bytes - 1)
    write.state = state


def _fits_always(*_: object) -> None: ...


_PASS = SourceSide._pass_fences


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (SourceSide, "_pass_fences", _pass_without_asking),
        (SourceSide, "_end_drains", _drain_at_once),
        (ModelWrite, "end", _lose_the_tail),
        (source, "mismatch", _fits_always),
    ],
)
def test_a_step_left_out_is_caught(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, wrong: Callable[..., None]
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    assert_caught()
