"""What a worker counts."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from splitserve.core.request import FinishReason
from splitserve.core.worker import Failure, KvCounts, Load, Outcome, Pool, TransferEnd, TransferStats
from splitserve.telemetry.metrics import WorkerMetrics, WorkerState

LOAD = Load(0, 90, 7, 0, 8192, 50, 3, 4, 2, Pool.DECODE, False, 0)
STATS = TransferStats(
    bytes=4_000_000,
    bytes_before_prefill_ended=3_000_000,
    uncovered_s=-0.003,
    writes=16,
    writing_s=0.002,
    queued_s=0.004,
)
SOURCE, DESTINATION = {"side": "source"}, {"side": "destination"}
MEASURES = ("transfer_bytes", "transfer_writes", "overlap_ratio", "uncovered_seconds", "write_queue_seconds")


class Scraped:
    """A worker's metrics, read as Prometheus reads them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(self.registry)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"splitserve_worker_{name}", labels)

    def kinds(self) -> dict[str, str]:
        page = generate_latest(self.registry).decode()
        families = text_string_to_metric_families(page)
        return {family.name: family.type for family in families if not family.name.endswith("_created")}


@pytest.fixture
def scraped() -> Scraped:
    return Scraped()


def test_every_series_is_there_before_anything_has_happened(scraped: Scraped) -> None:
    kinds = scraped.kinds()
    assert all(name.startswith("splitserve_worker_") for name in kinds)
    assert {name.removeprefix("splitserve_worker_kv_") for name in kinds if "_kv_" in name} == {
        *("blocks", "in_flight_bytes", "written_bytes", "writes", "cancels", "leases", "expired_leases"),
        *("total_blocks", "dropped_messages", "failed_transfers", "link_bytes_per_second", *MEASURES),
    }


def test_what_only_grows_is_a_counter(scraped: Scraped) -> None:
    kinds = scraped.kinds()
    for name in ("written_bytes", "writes", "cancels", "leases", "expired_leases", "dropped_messages"):
        assert kinds[f"splitserve_worker_kv_{name}"] == "counter", name


def test_a_transfer_is_measured_on_the_side_that_this_worker_was_on(scraped: Scraped) -> None:
    scraped.metrics.transferred(TransferEnd(source_side=True, stats=STATS))
    for name, value in {
        "kv_transfer_bytes_sum": 4_000_000,
        "kv_transfer_writes_sum": 16,
        "kv_overlap_ratio_sum": 0.75,
        "kv_write_queue_seconds_sum": 0.004,
        "kv_link_bytes_per_second_sum": 2e9,
    }.items():
        assert scraped(name, **SOURCE) == pytest.approx(value), name
        assert scraped(name, **DESTINATION) is None, name
    assert scraped("kv_uncovered_seconds_count", **SOURCE) == 1


@pytest.mark.parametrize(
    ("uncovered_s", "above", "within"), [(-0.003, "-0.005", "-0.002"), (0.0, "-0.001", "0.0"), (0.03, "0.02", "0.05")]
)
def test_uncovered_time_is_told_apart_on_either_side_of_zero(
    scraped: Scraped, uncovered_s: float, above: str, within: str
) -> None:
    stats = TransferStats(1, 1, uncovered_s, 1, 0.001)
    scraped.metrics.transferred(TransferEnd(True, stats))
    assert scraped("kv_uncovered_seconds_bucket", le=above, **SOURCE) == 0
    assert scraped("kv_uncovered_seconds_bucket", le=within, **SOURCE) == 1


def test_only_the_source_knows_how_long_before_the_end_of_its_prefill_it_was_done(scraped: Scraped) -> None:
    scraped.metrics.transferred(TransferEnd(False, STATS))
    assert scraped("kv_overlap_ratio_count", **DESTINATION) == 1
    assert scraped("kv_uncovered_seconds_count", **DESTINATION) is None


def test_a_transfer_with_nothing_to_write_has_no_times(scraped: Scraped) -> None:
    scraped.metrics.transferred(TransferEnd(True, TransferStats()))
    assert scraped("kv_transfer_bytes_count", **SOURCE) == scraped("kv_transfer_writes_count", **SOURCE) == 1
    for name in ("overlap_ratio", "uncovered_seconds", "write_queue_seconds", "link_bytes_per_second"):
        assert scraped(f"kv_{name}_count", **SOURCE) is None, name


def test_a_failed_transfer_is_counted_by_its_reason_and_not_measured(scraped: Scraped) -> None:
    for reason in ("lease", "lease", "peer ended"):
        scraped.metrics.transferred(TransferEnd(True, STATS, reason))
    assert scraped("kv_failed_transfers_total", reason="lease", **SOURCE) == 2
    assert scraped("kv_failed_transfers_total", reason="peer ended", **SOURCE) == 1
    assert all(scraped(f"kv_{name}_count", **SOURCE) is None for name in MEASURES)


def test_gauges_and_counts_read_the_worker_when_they_are_scraped(scraped: Scraped) -> None:
    states = [WorkerState(LOAD)]
    scraped.metrics.watch(lambda: states[-1])
    assert scraped("kv_writes_total") == scraped("kv_in_flight_bytes") == 0
    states.append(WorkerState(LOAD, 1, 5, 512, KvCounts(4096, 16, 2, 3, 1, {"register for no claim": 4}), 6, 99))
    read = {state: scraped("kv_blocks", state=state) for state in ("free", "parked", "pinned", "quarantined")}
    assert read == {"free": 90, "parked": 5, "pinned": 2, "quarantined": 4}
    assert scraped("kv_total_blocks") == 99
    assert (scraped("running_jobs"), scraped("parked_jobs"), scraped("kv_in_flight_bytes")) == (3, 1, 512)
    names = ("written_bytes", "writes", "cancels", "leases", "expired_leases")
    assert [scraped(f"kv_{name}_total") for name in names] == [4096, 16, 2, 3, 1]
    assert scraped("kv_dropped_messages_total", kind="register for no claim") == 4
    assert scraped("preemptions_total") == 6


def test_jobs_are_counted_by_how_they_ended(scraped: Scraped) -> None:
    scraped.metrics.ended("prefill", Outcome(finish_reason=FinishReason.LENGTH, transfer=STATS))
    scraped.metrics.ended("decode", Outcome(failure=Failure.TRANSFER, message="the KV did not arrive"))
    assert scraped("jobs_total", kind="prefill", outcome="finished") == 1
    assert scraped("jobs_total", kind="decode", outcome="transfer") == 1


def test_what_may_end_badly_is_counted_from_zero_on(scraped: Scraped) -> None:
    for outcome in ("finished", *Failure):
        assert scraped("jobs_total", kind="decode", outcome=str(outcome)) == 0
    for side in (SOURCE, DESTINATION):
        assert scraped("kv_failed_transfers_total", reason="peer ended", **side) == 0
