"""Every metric of splitserve, each name once; all begin with `splitserve_`.

One class per kind of process, made with the registry that the process serves. prometheus_client's own types are
thread-safe; gauges that mirror state are read when they are scraped.
"""

from collections.abc import Callable, Mapping
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from splitserve.core.fleet import Health
from splitserve.core.request import Timings, Usage
from splitserve.core.worker import Failure, Load, Outcome, Pool

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
_TPOT_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6)
_QUEUE_BUCKETS_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class RouterMetrics:
    """What one router counts. `watch` is called once, with what its gauges read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "splitserve_requests", "Requests ended, by gRPC status code", ["code"], registry=registry
        )
        self._ttft = Histogram(
            "splitserve_ttft_seconds", "Time to first token", buckets=_TTFT_BUCKETS_S, registry=registry
        )
        self._tpot = Histogram(
            "splitserve_tpot_seconds",
            "Mean time per output token after the first",
            buckets=_TPOT_BUCKETS_S,
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
        self._attempts = Counter(
            "splitserve_failed_attempts", "Attempts that did not finish their request", ["reason"], registry=registry
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

    def ended(self, code: str) -> None:
        """Every request ends here once."""
        self._requests.labels(code).inc()

    def finished(self, usage: Usage, timings: Timings) -> None:
        """One that ended well."""
        self._ttft.observe(timings.ttft_s)
        self._queue.observe(timings.queue_s)
        if usage.output_tokens > 1:
            self._tpot.observe(timings.tpot_s)
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._output_tokens.inc(usage.output_tokens)
        self._kv_bytes.inc(timings.kv_bytes)
        self._kv_bytes_early.inc(timings.kv_bytes_before_prefill_ended)

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
        self._sent_bytes = Counter("splitserve_worker_kv_sent_bytes", "KV written to other workers", registry=registry)
        self._failed_transfers = Counter(
            "splitserve_worker_kv_failed_transfers", "Jobs that failed for want of KV", ["kind"], registry=registry
        )
        self._running = Gauge("splitserve_worker_running_jobs", "Jobs that compute", registry=registry)
        self._parked = Gauge("splitserve_worker_parked_jobs", "Decodes that wait for KV", registry=registry)
        self._blocks = Gauge("splitserve_worker_kv_blocks", "KV blocks by state", ["state"], registry=registry)

    def watch(self, shown: Callable[[], tuple[Load, int]]) -> None:
        """`shown`: the latest load and how many jobs are parked. Called from the thread that scrapes; it only reads."""
        self._running.set_function(lambda: shown()[0].running)
        self._parked.set_function(lambda: shown()[1])
        self._blocks.labels("free").set_function(lambda: shown()[0].free_blocks)
        self._blocks.labels("pinned").set_function(lambda: shown()[0].pinned_blocks)
        self._blocks.labels("quarantined").set_function(lambda: shown()[0].quarantined_blocks)

    def stepped(self, jobs: int, tokens: int) -> None:
        """One engine step that gave news."""
        self._batch.observe(jobs)
        self._tokens.inc(tokens)

    def ended(self, kind: str, outcome: Outcome) -> None:
        """`kind` is prefill or decode."""
        self._ended.labels(kind, outcome.failure.value if outcome.failure is not None else "finished").inc()
        if outcome.failure is Failure.TRANSFER:
            self._failed_transfers.labels(kind).inc()
        if kind == "prefill" and outcome.transfer is not None:
            self._sent_bytes.inc(outcome.transfer.bytes)


def _reading(
    workers: Callable[[], Mapping[tuple[Pool, Health], int]], label: tuple[Pool, Health]
) -> Callable[[], float]:
    return lambda: workers().get(label, 0)
