"""Every metric of splitserve, each name once; all begin with `splitserve_`.

One class per kind of process, made with the registry that the process serves. prometheus_client's own types are
thread-safe; gauges that mirror state are read when they are scraped.
"""

from collections.abc import Callable, Mapping
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from splitserve.core.fleet import Health
from splitserve.core.request import Timings, Usage
from splitserve.core.worker import Pool

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
_TPOT_BUCKETS_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.2, 0.4, 0.8, 1.6)
_QUEUE_BUCKETS_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


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


def _reading(
    workers: Callable[[], Mapping[tuple[Pool, Health], int]], label: tuple[Pool, Health]
) -> Callable[[], float]:
    return lambda: workers().get(label, 0)
