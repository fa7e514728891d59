"""Every metric of splitserve, each name once; all begin with `splitserve_`.

One class per kind of process, made with the registry that the process serves. prometheus_client's own types are
thread-safe; gauges that mirror state are read when they are scraped.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import product
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from splitserve.core.fleet import Health
from splitserve.core.request import Timings, Usage
from splitserve.core.worker import Failure, KvCounts, Load, Outcome, Pool, TransferEnd

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
_TPOT_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6)
_QUEUE_BUCKETS_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
LENGTH_BUCKETS = tuple(base * 2**power for power in range(4, 18) for base in (1, 1.5))  # tokens: 16 to 196,608
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TRANSFER_BUCKETS_BYTES = tuple(4**power for power in range(8, 18))  # 64 KiB to 16 GiB
_WRITES_BUCKETS = tuple(2**power for power in range(13))
_SHARE_BUCKETS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_LATE_BUCKETS_S = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_UNCOVERED_BUCKETS_S = (-1.0, -0.2, -0.05, -0.02, -0.01, -0.005, -0.002, -0.001, *_LATE_BUCKETS_S)
_THROUGHPUT_BUCKETS = tuple(step * 10.0**power for power in range(7, 12) for step in (1, 2, 5))  # 10 MB/s to 500 GB/s

# Reasons that are counted from 0 on. Whoever counts gives them; one that is missing here begins when it comes.
_ATTEMPT_FAILURES = (*Failure, "lost", "silent", "slow_client")
_TRANSFER_FAILURES = ("peer ended", "lease", "deadline", "write", "stuck", "refused", "unconnected", "landing")


class RouterMetrics:
    """What one router counts. `watch` is called once, with what its gauges read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._requests = Counter(
            "splitserve_requests", "Requests ended, by gRPC status code", ["code"], registry=registry
        )
        self._ttft = Histogram(
            "splitserve_ttft_seconds",
            "Time to first token of finished requests, by SLO class",
            ["slo_class"],
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self._tpot = Histogram(
            "splitserve_tpot_seconds",
            "Mean time per output token after the first, by SLO class",
            ["slo_class"],
            buckets=_TPOT_BUCKETS_S,
            registry=registry,
        )
        self._judged = Counter(
            "splitserve_slo_outputs",
            "Outputs ended, by SLO class and whether every objective was met; the rate of met=yes is goodput",
            ["slo_class", "met"],
            registry=registry,
        )
        self._queue = Histogram(
            "splitserve_queue_seconds", "Arrival until a route was bound", buckets=_QUEUE_BUCKETS_S, registry=registry
        )
        self._prompt_tokens = Counter(
            "splitserve_prompt_tokens", "Prompt tokens of finished requests", registry=registry
        )
        self._output_tokens = Counter(
            "splitserve_output_tokens", "Output tokens of finished requests", registry=registry
        )
        self._prompt_lengths = Histogram(
            "splitserve_request_prompt_tokens",
            "Prompt tokens of a finished request",
            buckets=LENGTH_BUCKETS,
            registry=registry,
        )
        self._output_lengths = Histogram(
            "splitserve_request_output_tokens",
            "Output tokens of a finished request",
            buckets=LENGTH_BUCKETS,
            registry=registry,
        )
        self._attempts = Counter(
            "splitserve_failed_attempts", "Attempts that did not finish their request", ["reason"], registry=registry
        )
        self._probes = Counter(
            "splitserve_worker_probes", "Workers asked for a token, by what came", ["answer"], registry=registry
        )
        self._resumes = Counter(
            "splitserve_resumed_requests", "Requests taken up by another worker in mid-stream", registry=registry
        )
        self._moves = Counter(
            "splitserve_migrations", "Running decodes asked to move to another worker", ["outcome"], registry=registry
        )
        self._stall = Histogram(
            "splitserve_migration_stall_seconds",
            "Between the last token of the one worker and the first of the other",
            buckets=_TPOT_BUCKETS_S,
            registry=registry,
        )
        self._kv_bytes = Counter("splitserve_kv_moved_bytes", "KV moved for finished requests", registry=registry)
        self._kv_bytes_early = Counter(
            "splitserve_kv_moved_before_prefill_ended_bytes", "Of these, moved before prefill ended", registry=registry
        )
        self._waiting = Gauge("splitserve_waiting_requests", "Requests without a route", registry=registry)
        self._running = Gauge("splitserve_running_requests", "Requests not ended yet", registry=registry)
        self._workers = Gauge("splitserve_workers", "Live workers", ["pool", "health"], registry=registry)
        for reason in _ATTEMPT_FAILURES:
            self._attempts.labels(reason)
        for answer in ("token", "none"):
            self._probes.labels(answer)
        for outcome in ("moved", "refused"):
            self._moves.labels(outcome)

    def expect(self, slo_classes: Iterable[str], codes: Iterable[str]) -> None:
        """What will be counted by these begins at 0, so that the first of its kind is a rate too."""
        for code in codes:
            self._requests.labels(code)
        for slo_class in slo_classes:
            self._ttft.labels(slo_class)
            self._tpot.labels(slo_class)
            for met in ("yes", "no"):
                self._judged.labels(slo_class, met)

    def watch(
        self,
        waiting: Callable[[], int],
        running: Callable[[], int],
        workers: Callable[[], Mapping[tuple[Pool, Health], int]],
    ) -> None:
        """The functions are called from the thread that scrapes; they only read."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)
        for pool, health in product(Pool, Health):
            gauge = self._workers.labels(pool.value, health.value)
            gauge.set_function(_reading(workers, (pool, health)))

    def watch_drift(self, drift: Callable[[], Mapping[str, float]]) -> None:
        """Of a router that was given a plan. The function is called from the thread that scrapes; it only reads."""
        gauge = Gauge(
            "splitserve_workload_drift",
            "From the plan's workload, over the last five minutes: rate is live over planned, prompt and output the "
            "largest distance between the cumulative shares of lengths",
            ["of"],
            registry=self._registry,
        )
        for name in ("rate", "prompt", "output"):
            gauge.labels(name).set_function(_reading(drift, name))

    def judged(self, slo_class: str, met: bool) -> None:
        """Every output whose client did not give it up ends here once."""
        self._judged.labels(slo_class, "yes" if met else "no").inc()

    def ended(self, code: str) -> None:
        """Every request ends here once."""
        self._requests.labels(code).inc()

    def finished(self, slo_class: str, usage: Usage, timings: Timings) -> None:
        """One that ended well."""
        self._ttft.labels(slo_class).observe(timings.ttft_s)
        self._queue.observe(timings.queue_s)
        if usage.output_tokens > 1:
            self._tpot.labels(slo_class).observe(timings.tpot_s)
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._output_tokens.inc(usage.output_tokens)
        self._prompt_lengths.observe(usage.prompt_tokens)
        self._output_lengths.observe(usage.output_tokens)
        self._kv_bytes.inc(timings.kv_bytes)
        self._kv_bytes_early.inc(timings.kv_bytes_before_prefill_ended)

    def probed(self, answer: str) -> None:
        """`token` or `none`."""
        self._probes.labels(answer).inc()

    def attempt_failed(self, reason: str) -> None:
        """`reason` is one of a few words, such as `not_now`, `transfer` or `lost`."""
        self._attempts.labels(reason).inc()

    def resumed(self) -> None:
        self._resumes.inc()

    def moved(self, stall_s: float) -> None:
        """A running decode goes on at another worker."""
        self._moves.labels("moved").inc()
        self._stall.observe(stall_s)

    def move_refused(self) -> None:
        """It stays where it is, or went on elsewhere as a resumed one."""
        self._moves.labels("refused").inc()


class HttpMetrics:
    """What one HTTP gateway counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "splitserve_http_requests",
            "HTTP requests ended, by status; 499: the client went away; a stream's error counts as its own status",
            ["route", "code"],
            registry=registry,
        )
        self._duration = Histogram(
            "splitserve_http_request_seconds",
            "From the request's head until its answer was written, streams included",
            ["route"],
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self._streams = Gauge("splitserve_http_streams", "Event streams open", registry=registry)

    def ended(self, route: str, code: int, seconds: float) -> None:
        """Every request ends here once. `route` is one of the few that there are."""
        self._requests.labels(route, str(code)).inc()
        self._duration.labels(route).observe(seconds)

    def stream(self) -> AbstractContextManager[object]:
        """Around one event stream."""
        return self._streams.track_inprogress()


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker's gauges and counters of transfers are read from."""

    load: Load
    parked_jobs: int = 0
    parked_blocks: int = 0
    in_flight_bytes: int = 0
    counts: KvCounts = field(default_factory=KvCounts)
    preemptions: int = 0
    total_blocks: int = 0


class WorkerMetrics:
    """What one worker counts. `watch` is called once the engine has started."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter(
            "splitserve_worker_jobs", "Jobs ended, refused ones included", ["kind", "outcome"], registry=registry
        )
        self._tokens = Counter("splitserve_worker_tokens", "Tokens produced", registry=registry)
        self._batch = Histogram(
            "splitserve_worker_step_jobs",
            "Jobs that an engine step gave news of",
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self._running = Gauge("splitserve_worker_running_jobs", "Jobs that compute", registry=registry)
        self._parked = Gauge("splitserve_worker_parked_jobs", "Decodes that wait for KV", registry=registry)
        self._blocks = Gauge("splitserve_worker_kv_blocks", "KV blocks by state", ["state"], registry=registry)
        self._total = Gauge("splitserve_worker_kv_total_blocks", "KV blocks that the worker has", registry=registry)
        self._in_flight = Gauge(
            "splitserve_worker_kv_in_flight_bytes",
            "KV in WRITEs to other workers that have not ended",
            registry=registry,
        )
        self._transfers = _TransferMetrics(registry)
        self._counts = _EngineCounts(registry)
        for kind, outcome in product(("prefill", "decode"), ("finished", *Failure)):
            self._ended.labels(kind, str(outcome))

    def watch(self, state: Callable[[], WorkerState]) -> None:
        """`state` is called from the thread that scrapes; it only reads."""
        self._running.set_function(lambda: state().load.running)
        self._parked.set_function(lambda: state().parked_jobs)
        self._blocks.labels("free").set_function(lambda: state().load.free_blocks)
        self._blocks.labels("parked").set_function(lambda: state().parked_blocks)
        self._blocks.labels("pinned").set_function(lambda: state().load.pinned_blocks)
        self._blocks.labels("quarantined").set_function(lambda: state().load.quarantined_blocks)
        self._total.set_function(lambda: state().total_blocks)
        self._in_flight.set_function(lambda: state().in_flight_bytes)
        self._counts.read = state

    def stepped(self, jobs: int, tokens: int) -> None:
        """One engine step that gave news."""
        self._batch.observe(jobs)
        self._tokens.inc(tokens)

    def ended(self, kind: str, outcome: Outcome) -> None:
        """`kind` is prefill or decode."""
        self._ended.labels(kind, outcome.failure.value if outcome.failure is not None else "finished").inc()

    def transferred(self, end: TransferEnd) -> None:
        """One side of a transfer is over. May be called by any thread."""
        self._transfers.ended(end)


class _TransferMetrics:
    """What single transfers were like, by the side that this worker was on. Only those that succeeded are measured, and
    their times only if there was anything to write. A destination may have all its KV before the prefill has ended, so
    that only the source knows by how much."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"splitserve_worker_kv_{name}", text, ["side"], buckets=buckets, registry=registry)

        self._failed = Counter(
            "splitserve_worker_kv_failed_transfers",
            "Transfers that ended without success",
            ["side", "reason"],
            registry=registry,
        )
        for side, reason in product(("source", "destination"), _TRANSFER_FAILURES):
            self._failed.labels(side, reason)
        self._bytes = histogram("transfer_bytes", "KV of a transfer", _TRANSFER_BUCKETS_BYTES)
        self._writes = histogram("transfer_writes", "WRITEs of a transfer", _WRITES_BUCKETS)
        self._overlap = histogram(
            "overlap_ratio", "Share of a transfer's bytes written before its prefill ended", _SHARE_BUCKETS
        )
        self._uncovered = histogram(
            "uncovered_seconds", "Last WRITE of a transfer done, minus end of its prefill", _UNCOVERED_BUCKETS_S
        )
        self._queue = histogram(
            "write_queue_seconds", "Longest that a WRITE of a transfer waited for room on its link", _LATE_BUCKETS_S
        )
        self._throughput = histogram(
            "link_bytes_per_second", "Bytes of a transfer over the time its WRITEs took", _THROUGHPUT_BUCKETS
        )

    def ended(self, end: TransferEnd) -> None:
        side, stats = "source" if end.source_side else "destination", end.stats
        if end.reason:
            self._failed.labels(side, end.reason).inc()
            return
        self._bytes.labels(side).observe(stats.bytes)
        self._writes.labels(side).observe(stats.writes)
        if stats.bytes:
            self._overlap.labels(side).observe(stats.bytes_before_prefill_ended / stats.bytes)
            if end.source_side:
                self._uncovered.labels(side).observe(stats.uncovered_s)
            self._queue.labels(side).observe(stats.queued_s)
        if stats.writing_s > 0:
            self._throughput.labels(side).observe(stats.bytes / stats.writing_s)


class _EngineCounts(Collector):
    """Counters that the engine and its transfer service keep; read when they are scraped."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.read: Callable[[], WorkerState] | None = None
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        state = self.read() if self.read is not None else None
        counts = state.counts if state is not None else KvCounts()
        yield CounterMetricFamily(
            "splitserve_worker_preemptions",
            "Requests that lost their KV blocks to others and were computed anew",
            value=state.preemptions if state is not None else 0,
        )
        for name, text, value in (
            ("written_bytes", "KV written to other workers", counts.written_bytes),
            ("writes", "WRITEs posted", counts.writes),
            ("cancels", "Cancels of claims, sent and heard", counts.cancels),
            ("leases", "Ended prefills whose KV was kept for a claim to come", counts.leases),
            ("expired_leases", "Of these, those whose KV nobody claimed in time", counts.expired_leases),
        ):
            yield CounterMetricFamily(f"splitserve_worker_kv_{name}", text, value=value)
        dropped = CounterMetricFamily(
            "splitserve_worker_kv_dropped_messages", "Messages and calls that fitted no state", labels=["kind"]
        )
        for kind, value in sorted(counts.dropped.items()):
            dropped.add_metric([kind], value)
        yield dropped


LabelT = TypeVar("LabelT")


def _reading(values: Callable[[], Mapping[LabelT, float]], label: LabelT) -> Callable[[], float]:
    return lambda: values().get(label, 0)
