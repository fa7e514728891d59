"""What the KV transfer benchmark makes of its timings."""

import math

import pytest

from benchmarks.kv_transfer.figures import (
    ENOUGH_FOR_P99,
    MIN_ROUNDS,
    Case,
    Record,
    Row,
    Spent,
    Timing,
    beside_a_stream,
    covered_s,
    faster_cases,
    next_case,
    row,
    spread,
)

CASE = Case(1000, 1)


def a_timing(ttft_s: float, prefilled_s: float | None = None, tokens: tuple[int, ...] = (7, 8)) -> Timing:
    """Asked at 10 s; the second token comes 10 ms after the first."""
    prefilled_at = None if prefilled_s is None else 10 + prefilled_s
    return Timing(10.0, prefilled_at, 10 + ttft_s, 10.01 + ttft_s, tokens)


def a_row(system: str, record: Record, case: Case = CASE) -> Row:
    colocated = Record([a_timing(0.1) for _ in record.timings])
    return row(case, system, record, colocated, memcpy_gbps=10.0)


def test_a_99th_percentile_needs_a_hundred_samples() -> None:
    few, enough = spread(range(ENOUGH_FOR_P99 - 1)), spread(range(ENOUGH_FOR_P99))
    assert few is not None
    assert enough is not None
    assert (few.p99, few.largest) == (None, 98_000)
    assert (enough.p99, enough.largest, enough.n) == (98_000, 99_000, 100)


def test_missing_values_are_no_samples() -> None:
    assert spread([None, None]) is None
    found = spread([None, 0.002, 0.004])
    assert found is not None
    assert found.n == 2
    assert found.median == pytest.approx(3.0)


def test_overlapping_transfers_count_once() -> None:
    assert covered_s([]) == 0
    assert covered_s([(5.0, 6.0), (1.0, 3.0), (2.0, 2.5), (2.0, 4.0)]) == pytest.approx(4.0)


def test_a_gap_between_tokens_belongs_to_what_happened_in_it() -> None:
    record = Record()
    record.add_gaps([0.0, 1.0, 2.0, 4.0, 7.0, 8.0], served=(1.5, 6.0), moves=[(2.5, 3.0)])
    assert record.alone_s == [1.0, 1.0]
    assert record.serving_s == [1.0, 2.0, 3.0]
    assert record.receiving_s == [2.0]


def test_a_round_adds_to_what_was_seen_before() -> None:
    seen = Record([a_timing(0.1)], 10, 1.0, [1.0], [2.0], [3.0])
    seen.add(Record([a_timing(0.2)], 20, 2.0, [4.0], [5.0], [6.0]))
    assert seen == Record([a_timing(0.1), a_timing(0.2)], 30, 3.0, [1.0, 4.0], [2.0, 5.0], [3.0, 6.0])


def test_overheads_are_taken_prompt_by_prompt() -> None:
    ours = Record([a_timing(0.2, 0.15), a_timing(0.5, 0.55)])
    zero = Record([a_timing(0.1), a_timing(0.45)])
    made = row(CASE, "push", ours, zero, memcpy_gbps=10.0)
    assert made.ttft_over_colocated_ms is not None
    assert made.second_token_over_colocated_ms is not None
    assert made.handover_ms is not None
    assert made.ttft_over_colocated_ms.median == pytest.approx(75)
    assert made.second_token_over_colocated_ms.median == pytest.approx(75)
    assert made.handover_ms.median == pytest.approx(0)


def test_the_colocated_engine_has_no_hand_over_and_nothing_over_itself() -> None:
    zero = Record([a_timing(0.1)])
    made = row(CASE, "colocated", zero, zero, memcpy_gbps=10.0)
    assert (made.handover_ms, made.ttft_over_colocated_ms, made.gbps) == (None, None, None)


def test_other_tokens_than_the_colocated_engines_are_counted() -> None:
    wrong = Record([a_timing(0.1, 0.1), a_timing(0.1, 0.1, tokens=(7, 9))])
    assert a_row("push", wrong).other_tokens == 1


def test_records_of_different_lengths_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        row(CASE, "push", Record([a_timing(0.1, 0.1)]), Record(), memcpy_gbps=10.0)


def test_throughput_is_bytes_over_the_time_they_were_on_their_way() -> None:
    assert a_row("push", Record(moved_bytes=3_000_000_000, moving_s=1.5)).gbps == pytest.approx(2.0)


def test_a_case_is_won_only_against_every_other_system() -> None:
    def rows(case: Case, **handover_s: float) -> list[Row]:
        return [a_row(name, Record([a_timing(1.0, 1.0 - late)]), case) for name, late in handover_s.items()]

    measured = [
        *rows(Case(250, 1), ours=0.01, pull=0.03, push=0.02),
        *rows(Case(250, 4), ours=0.01, pull=0.03, push=0.005),
        *rows(Case(500, 1), ours=0.01, pull=0.03),
    ]
    assert faster_cases(measured, "ours", ["pull", "push"]) == (1, 2)


def test_every_case_is_begun_before_any_is_repeated_and_then_all_get_the_same_time() -> None:
    cheap, dear = Case(250, 1), Case(8000, 16)
    spent = {cheap: Spent(), dear: Spent()}
    order = []
    for _ in range(12):
        case = next_case(spent)
        assert case is not None
        order.append(case)
        spent[case].rounds += 1
        spent[case].seconds += 1.0 if case is cheap else 4.0
    assert order[: 2 * MIN_ROUNDS] == [cheap, dear] * MIN_ROUNDS
    assert order[2 * MIN_ROUNDS :] == [cheap] * 6 + [cheap, dear]


@pytest.mark.parametrize("concurrent", [1, 4, 16])
def test_a_case_ends_with_enough_samples_for_its_99th_percentile(concurrent: int) -> None:
    case = Case(250, concurrent)
    timed = [number for number in range(case.most_rounds) if not beside_a_stream(number)]
    assert len(timed) >= math.ceil(ENOUGH_FOR_P99 / concurrent)
    assert next_case({case: Spent(case.most_rounds, 1.0)}) is None


def test_the_least_rounds_measure_both_latency_and_a_streams_disturbance() -> None:
    assert {beside_a_stream(number) for number in range(MIN_ROUNDS)} == {False, True}
