"""The faults of tests/unit/kv/test_faults.py, thousands of runs: every kind of fault at every transition of both
tables, and as many runs again in which faults come as they please.
"""

import pytest

from tests.unit.kv.campaign import DISHONEST, KINDS, ROWS, Campaign, moot
from tests.unit.kv.faults import Fault
from tests.unit.kv.rank import Row

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SURVEYED = 4000


@pytest.fixture(scope="module")
def campaign() -> Campaign:
    """Raises where a run breaks a rule."""
    made = Campaign()
    made.survey(SURVEYED)
    made.strike(len(KINDS))
    made.seek(ROWS - DISHONEST, most=1000)
    return made


def test_no_run_breaks_a_safety_rule_and_every_run_comes_to_rest(
    campaign: Campaign, capsys: pytest.CaptureFixture[str]
) -> None:
    met, struck = campaign.rows, campaign.struck & strikable()
    with capsys.disabled():
        print(f"\n{campaign.runs} runs; transitions met: {len(met)} of {len(ROWS)}, {met.total()} times")
        print(f"faults struck at transitions: {len(struck)} of {len(strikable())}")
        print(f"all faults: {dict(campaign.faults)}\nkeys told as: {dict(campaign.told)}")
    assert campaign.runs > SURVEYED
    assert ROWS - set(campaign.rows) == DISHONEST


def test_every_kind_of_fault_strikes_at_every_transition(campaign: Campaign) -> None:
    assert not strikable() - campaign.struck


def strikable() -> set[tuple[Row, Fault, bool]]:
    """Every transition with every fault that can befall a rank which makes it."""
    return {(row, fault, peer) for row in ROWS - DISHONEST for fault, peer in KINDS if not moot(row, fault, peer)}
