"""What the timings of a request mean."""

from splitserve.core.request import FinishReason
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
