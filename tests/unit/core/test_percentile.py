"""Percentiles: nearest rank, one definition for gaps and for requests."""

import pytest

from splitserve.core.slo import percentile, rank_of, rank_of_p99


@pytest.mark.parametrize(
    ("percent", "count", "rank"), [(50, 1, 1), (50, 2, 1), (50, 3, 2), (90, 10, 9), (90, 11, 10), (99, 99, 99)]
)
def test_it_is_the_smallest_value_that_so_many_per_cent_are_no_larger_than(percent: int, count: int, rank: int) -> None:
    assert rank_of(percent, count) == rank
    values = [float(value) for value in range(1, count + 1)]
    assert percentile(values, percent) == rank
    assert sum(value <= rank for value in values) * 100 >= percent * count
    assert sum(value <= rank - 1 for value in values) * 100 < percent * count


def test_the_99th_of_gaps_is_the_same() -> None:
    assert [rank_of_p99(count) for count in (1, 99, 100, 101, 200)] == [1, 99, 99, 100, 198]
