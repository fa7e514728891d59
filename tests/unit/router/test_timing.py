"""What the timings of a request mean."""

import pytest

from splitserve.core.request import FinishReason
from splitserve.core.slo import Timeline
from splitserve.core.worker import KvMode, Outcome, Pool, TransferStats
from splitserve.router.timing import Stopwatch
from splitserve.router.waiting import Binding
from tests.unit.router.scripted import worker_info


def route(bound_at: float, decode: str = "d0", mode: KvMode = KvMode.PUSH, alone: bool = False) -> Binding:
    prefill = None if alone else worker_info("p0", Pool.PREFILL, mode)
    return Binding(worker_info(decode, Pool.DECODE, mode), prefill, "r/1", bound_at)


def sent(uncovered_s: float) -> Outcome:
    return Outcome(FinishReason.LENGTH, transfer=TransferStats(1000, 600, uncovered_s))


def test_a_covered_transfer_costs_nothing() -> None:
    watch, binding = Stopwatch(arrived_at=10.0), route(bound_at=11.0)
    watch.bound(binding)
    watch.tokens(13.5)
    watch.prefilled(binding, sent(uncovered_s=-0.25), now=14.0)
    watch.tokens(15.5)
    timings = watch.timings(output_tokens=3)
    assert (timings.queue_s, timings.prefill_s, timings.transfer_s) == (1.0, 3.0, 0.0)
    assert (timings.ttft_s, timings.tpot_s) == (3.5, 1.0)
    assert (timings.kv_bytes, timings.kv_bytes_before_prefill_ended) == (1000, 600)


def test_an_uncovered_transfer_is_not_counted_as_prefill() -> None:
    watch, binding = Stopwatch(arrived_at=0.0), route(bound_at=1.0)
    watch.bound(binding)
    watch.prefilled(binding, sent(uncovered_s=0.5), now=3.0)
    watch.tokens(3.25)
    timings = watch.timings(output_tokens=1)
    assert (timings.prefill_s, timings.transfer_s, timings.tpot_s) == (1.5, 0.5, 0.0)


def test_a_pulled_transfer_lasts_until_the_first_token() -> None:
    watch, binding = Stopwatch(arrived_at=0.0), route(bound_at=1.0, mode=KvMode.PULL)
    watch.bound(binding)
    watch.prefilled(binding, Outcome(FinishReason.LENGTH), now=3.0)
    watch.tokens(3.75)
    timings = watch.timings(output_tokens=1)
    assert (timings.prefill_s, timings.transfer_s) == (2.0, 0.75)


def test_without_a_prefill_worker_prefill_lasts_until_the_first_token() -> None:
    watch = Stopwatch(arrived_at=0.0)
    watch.bound(route(bound_at=1.0, alone=True))
    watch.tokens(3.0)
    timings = watch.timings(output_tokens=1)
    assert (timings.prefill_s, timings.transfer_s, timings.prefill_worker) == (2.0, 0.0, "")


def test_a_failed_route_counts_as_an_attempt_and_its_time_as_queueing() -> None:
    watch = Stopwatch(arrived_at=0.0)
    watch.bound(route(bound_at=1.0))
    watch.bound(route(bound_at=5.0, decode="d1"))
    watch.tokens(6.0)
    timings = watch.timings(output_tokens=1)
    assert (timings.queue_s, timings.attempts, timings.decode_worker) == (5.0, 2, "d1")


def test_a_move_is_no_attempt_and_no_queueing() -> None:
    watch = Stopwatch(arrived_at=0.0)
    watch.bound(route(bound_at=1.0))
    watch.tokens(2.0)
    watch.bound(route(bound_at=3.0, decode="d1", alone=True), moved=True)
    watch.tokens(4.0)
    timings = watch.timings(output_tokens=2)
    assert (timings.queue_s, timings.ttft_s, timings.tpot_s) == (1.0, 2.0, 2.0)
    assert (timings.attempts, timings.prefill_worker, timings.decode_worker) == (1, "p0", "d1")


def test_a_resumed_request_keeps_the_phases_of_its_first_token() -> None:
    watch, first, second = Stopwatch(arrived_at=0.0), route(bound_at=1.0), route(bound_at=9.0, decode="d1")
    watch.bound(first)
    watch.prefilled(first, sent(-0.5), now=2.0)
    watch.tokens(3.0)
    watch.bound(second)
    watch.prefilled(second, sent(-0.5), now=10.0)
    watch.tokens(11.0)
    timings = watch.timings(output_tokens=2)
    assert (timings.queue_s, timings.prefill_s, timings.ttft_s, timings.tpot_s) == (1.0, 1.0, 3.0, 8.0)
    assert (timings.decode_worker, timings.kv_bytes) == ("d1", 2000)


def watched(*times: float) -> Stopwatch:
    watch = Stopwatch(arrived_at=0.0, watch_gaps=True)
    for time in times:
        watch.tokens(time)
    return watch


@pytest.mark.parametrize(
    ("times", "output_tokens", "gap_s"),
    [
        ((), 0, 0.0),
        ((1.0,), 1, 0.0),
        ((1.0,), 5, 0.0),  # all of them at once
        ((1.0, 1.5), 2, 0.5),
        ((1.0, 1.5, 4.0), 3, 2.5),
        ((1.0, 4.0, 4.5), 40, 3.0),  # of 39 gaps, 37 of them 0, the longest
        ((1.0, 4.0, 4.5), 101, 0.5),  # of 100 gaps the 99th
        ((1.0, 4.0, 4.5), 201, 0.0),  # of 200 the 198th
    ],
)
def test_the_99th_percentile_of_gaps_counts_those_between_tokens_that_came_together(
    times: tuple[float, ...], output_tokens: int, gap_s: float
) -> None:
    assert watched(*times).gaps_p99_s(output_tokens) == gap_s


def test_it_is_what_the_slo_module_says_of_the_same_tokens() -> None:
    came = [(1.0, 3), (1.25, 1), (1.5, 2), (4.0, 1), (4.5, 4)]  # when, and how many
    tokens = [time for time, count in came for _ in range(count)]
    assert watched(*[time for time, _ in came]).gaps_p99_s(len(tokens)) == Timeline(0.0, tuple(tokens)).itl_p99_s


def test_gaps_are_kept_only_where_someone_asks_for_them() -> None:
    watch = Stopwatch(arrived_at=0.0)
    for time in range(100):
        watch.tokens(float(time))
    assert watch.gaps_p99_s(100) == 0.0
