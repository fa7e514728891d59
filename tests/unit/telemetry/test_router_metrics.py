"""What a router counts."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from splitserve.core.fleet import Health
from splitserve.core.request import Timings, Usage
from splitserve.core.worker import Pool
from splitserve.telemetry.metrics import RouterMetrics

TIMINGS = Timings(0.5, 1.0, 0.0, 2.0, 0.25, "p0", "d0", 1000, 600, 1)


def test_every_name_begins_with_splitserve() -> None:
    registry = CollectorRegistry()
    RouterMetrics(registry)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert families
    assert all(family.name.startswith("splitserve_") for family in families)


def test_a_finished_request_is_counted_in_every_phase() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    metrics.finished("batch", Usage(10, 5), TIMINGS)
    for name, value in {
        "splitserve_queue_seconds_sum": 0.5,
        "splitserve_prompt_tokens_total": 10,
        "splitserve_output_tokens_total": 5,
        "splitserve_request_prompt_tokens_sum": 10,
        "splitserve_request_output_tokens_count": 1,
        "splitserve_kv_moved_bytes_total": 1000,
        "splitserve_kv_moved_before_prefill_ended_bytes_total": 600,
    }.items():
        assert registry.get_sample_value(name) == value, name
    for name, value in {"splitserve_ttft_seconds_sum": 2.0, "splitserve_tpot_seconds_sum": 0.25}.items():
        assert registry.get_sample_value(name, {"slo_class": "batch"}) == value, name
        assert registry.get_sample_value(name, {"slo_class": "standard"}) is None, name


def test_what_is_expected_is_counted_from_zero_on() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    metrics.expect(["interactive", "mine"], ["OK", "UNAVAILABLE"])
    for slo_class in ("interactive", "mine"):
        assert registry.get_sample_value("splitserve_ttft_seconds_count", {"slo_class": slo_class}) == 0
        assert registry.get_sample_value("splitserve_tpot_seconds_count", {"slo_class": slo_class}) == 0
        for met in ("yes", "no"):
            labels = {"slo_class": slo_class, "met": met}
            assert registry.get_sample_value("splitserve_slo_outputs_total", labels) == 0
    for code in ("OK", "UNAVAILABLE"):
        assert registry.get_sample_value("splitserve_requests_total", {"code": code}) == 0
    for reason in ("not_now", "lost", "silent", "transfer"):
        assert registry.get_sample_value("splitserve_failed_attempts_total", {"reason": reason}) == 0
    assert registry.get_sample_value("splitserve_migrations_total", {"outcome": "refused"}) == 0


def test_outputs_are_judged_by_class() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    for met in (True, True, False):
        metrics.judged("interactive", met)
    metrics.judged("batch", met=True)
    for slo_class, said, count in (("interactive", "yes", 2), ("interactive", "no", 1), ("batch", "yes", 1)):
        labels = {"slo_class": slo_class, "met": said}
        assert registry.get_sample_value("splitserve_slo_outputs_total", labels) == count


def test_a_single_token_has_no_time_per_output_token() -> None:
    registry = CollectorRegistry()
    RouterMetrics(registry).finished("batch", Usage(10, 1), TIMINGS)
    assert registry.get_sample_value("splitserve_tpot_seconds_count", {"slo_class": "batch"}) is None
    assert registry.get_sample_value("splitserve_ttft_seconds_count", {"slo_class": "batch"}) == 1


def test_gauges_read_the_router_when_they_are_scraped() -> None:
    registry = CollectorRegistry()
    waiting, workers = [1], {(Pool.PREFILL, Health.READY): 2}
    RouterMetrics(registry).watch(lambda: waiting[0], lambda: 7, lambda: workers)
    waiting[0] = 3
    assert registry.get_sample_value("splitserve_waiting_requests") == 3
    assert registry.get_sample_value("splitserve_running_requests") == 7
    ready = {"pool": "prefill", "health": "ready"}
    assert registry.get_sample_value("splitserve_workers", ready) == 2
    assert registry.get_sample_value("splitserve_workers", ready | {"health": "silent"}) == 0


def test_drift_from_a_plan_is_a_gauge_of_routers_that_have_one() -> None:
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    assert registry.get_sample_value("splitserve_workload_drift", {"of": "rate"}) is None
    metrics.watch_drift(lambda: {"rate": 1.5, "prompt": 0.2, "output": 0.1})
    assert registry.get_sample_value("splitserve_workload_drift", {"of": "rate"}) == 1.5
    assert registry.get_sample_value("splitserve_workload_drift", {"of": "output"}) == 0.1
