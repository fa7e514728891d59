"""What one measured rate says of itself."""

import pytest

from benchmarks.planner_accuracy import Report, Row, _table
from splitserve.core.slo import Slo


def _row(slower: float, slower_after: float) -> Row:
    return Row(2.0, 0.9, 0.8, 0.1, 0.1, 0.2, 0.2, 0.01, 0.01, 0.0, slower, slower_after)


@pytest.mark.parametrize(
    ("slower", "slower_after", "steady"),
    [(1.0, 1.0, True), (1.0, 1.09, True), (1.0, 1.12, False), (1.0, 0.88, False), (1.5, 1.6, True), (1.5, 1.7, False)],
)
def test_a_rate_during_which_the_machine_changed_by_more_than_a_tenth_is_not_steady(
    slower: float, slower_after: float, steady: bool
) -> None:
    assert _row(slower, slower_after).steady is steady


def test_the_table_says_how_slow_the_machine_was_and_which_rate_is_invalid() -> None:
    rows = [_row(1.0, 1.0), _row(1.2, 1.2), _row(1.0, 1.3)]
    lines = _table(Report("tiny", "prefill 1%", 0.01, Slo(0.5, 0.05), 2.0, rows)).splitlines()
    kept, slow, changed = lines[-4:-1]
    assert "machine" not in kept
    assert "INVALID" not in kept
    assert "machine 1.20 times as slow" in slow
    assert "INVALID" not in slow
    assert "INVALID: 1.30 times as slow after it" in changed
    assert lines[-1] == "mean difference 10.0 points"
