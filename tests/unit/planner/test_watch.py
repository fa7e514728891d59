from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from splitserve.core.errors import ConfigError
from splitserve.core.request import Timings, Usage
from splitserve.planner.deployment import Role
from splitserve.planner.inputs import Inputs
from splitserve.planner.plan import Plan
from splitserve.planner.watch import (
    Reading,
    change,
    judge,
    observed_inputs,
    reading,
    window,
    workload_spec,
)
from splitserve.telemetry.metrics import RouterMetrics
from splitserve.workload.drift import Histogram, Traffic
from splitserve.workload.named import workload
from tests.unit.planner.fixtures.results import INPUTS, judged, plan, pool, with_best

BOUNDS = (128.0, 256.0, 512.0, 1024.0, 2048.0, float("inf"))
TIMINGS = Timings(0.0, 0.1, 0.0, 0.1, 0.02, "prefill-0", "decode-0", 0, 0, 1)
AS_PLANNED = INPUTS.model_copy(update={"workload": "prompt=300,output=100"})


def _metrics(prompts: list[int], output: int = 100) -> str:
    """What a real router would serve after these requests."""
    registry = CollectorRegistry()
    metrics = RouterMetrics(registry)
    for prompt in prompts:
        metrics.ended("OK")
        metrics.finished("standard", Usage(prompt_tokens=prompt, output_tokens=output), TIMINGS)
    return generate_latest(registry).decode()


def _read(prompts: list[int], at_s: float) -> Reading:
    return reading(_metrics(prompts), at_s, "router")


def _seen(prompts: list[int], seconds: float) -> Traffic:
    traffic = window(_read([], 0.0), _read(prompts, seconds))
    assert traffic is not None
    return traffic


def _planned(inputs: Inputs = AS_PLANNED) -> Plan:
    return plan(inputs)


def test_a_routers_own_metrics_are_read() -> None:
    seen = _read([100, 300, 3000], 5.0)
    assert (seen.requests, seen.prompt.total, seen.output.total) == (3, 3, 3)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# TYPE up gauge\nup 1\n", r"router: has no splitserve_request_prompt_tokens; .*--metrics"),
        ("<html>", r"router: (not Prometheus text|has no splitserve)"),
        ("metric{broken 1", r"router: (not Prometheus text|has no splitserve)"),
    ],
)
def test_text_that_is_not_a_routers_is_refused_with_its_address(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        reading(text, 0.0, "router")


def test_a_window_counts_what_came_between_two_readings() -> None:
    seen = window(_read([100] * 50, 10.0), _read([100] * 50 + [3000] * 100, 30.0))
    assert seen is not None
    assert seen.rate_rps == 5.0
    assert seen.prompt.total == 100


def test_a_router_that_was_started_anew_ends_the_window() -> None:
    assert window(_read([100] * 50, 10.0), _read([100] * 3, 20.0)) is None


def test_no_time_is_no_window() -> None:
    assert window(_read([], 10.0), _read([100], 10.0)) is None


def test_traffic_as_planned_has_not_drifted() -> None:
    verdict = judge(_planned(), _seen([300] * 400, 200.0))
    assert verdict.reasons == ()
    assert verdict.sentence == "as planned: 2 requests/s, lengths as planned"


def test_longer_prompts_are_a_drift() -> None:
    verdict = judge(_planned(), _seen([3000] * 400, 200.0))
    assert verdict.drifted
    assert "of prompts have at most" in verdict.reasons[0]


def test_a_few_requests_say_nothing_of_lengths() -> None:
    verdict = judge(_planned(), _seen([3000] * 20, 10.0))
    assert not verdict.drifted
    assert not verdict.enough
    assert "too few requests" in verdict.sentence


def test_more_requests_than_the_goodput_are_a_drift_even_where_no_rate_was_asked() -> None:
    verdict = judge(_planned(), _seen([300] * 400, 40.0))
    assert verdict.reasons == ("10 requests/s are more than the plan's goodput, 3.2",)


def test_fewer_requests_are_a_drift_only_where_a_rate_was_asked() -> None:
    quiet = _seen([300] * 400, 4000.0)
    assert not judge(_planned(), quiet).drifted
    asked = AS_PLANNED.model_copy(update={"rate": 3.0})
    assert "0.03 times the planned 3" in judge(_planned(asked), quiet).reasons[0]


def test_the_new_question_has_the_lengths_that_were_seen() -> None:
    asked = observed_inputs(_planned(), _seen([3000] * 400, 200.0))
    again = workload(asked.workload)
    assert 2048 <= again.mean_prompt_tokens <= 4096
    assert asked.rate is None
    assert asked.model == "opt-66b"


def test_the_new_question_keeps_the_lengths_of_which_too_few_were_seen() -> None:
    asked = observed_inputs(_planned(), _seen([3000] * 100, 1.0))
    assert asked.workload == AS_PLANNED.workload
    assert asked.rate == 100.0


def test_a_rate_that_was_asked_for_becomes_the_one_that_was_seen() -> None:
    asked = AS_PLANNED.model_copy(update={"rate": 3.0})
    assert observed_inputs(_planned(asked), _seen([300] * 400, 200.0)).rate == 2.0


def test_seen_lengths_are_written_as_a_workload_that_can_be_read() -> None:
    counts = (10.0, 20.0, 40.0, 20.0, 10.0, 0.0)
    spec = workload_spec(Traffic(1.0, Histogram(BOUNDS, counts), Histogram(BOUNDS, (50.0, 50.0, 0.0, 0.0, 0.0, 0.0))))
    assert spec.startswith("prompt:p10=128,p25=224,p50=384,")
    summary = workload(spec).describe()
    assert summary.prompt.p50 == pytest.approx(384, rel=0.01)
    assert summary.output.p90 == pytest.approx(230, rel=0.02)


def test_lengths_beyond_the_last_bound_are_taken_to_be_at_it() -> None:
    seen = Histogram(BOUNDS, (0.0, 0.0, 0.0, 0.0, 0.0, 100.0))
    assert "prompt:p10=2048" in workload_spec(Traffic(1.0, seen, seen))


def _with(prefill: int, decode: int, tp: int = 2) -> Plan:
    pools = (pool(Role.PREFILL, 2, workers=prefill), pool(Role.DECODE, tp, workers=decode))
    return plan(found=with_best(judged(*pools, goodput=3.0)))


def test_the_same_placement_is_no_change() -> None:
    same = change(_with(2, 2), _with(2, 2))
    assert same.empty
    assert same.role_flips == 0


def test_a_change_is_a_diff_of_workers_by_role() -> None:
    changed = change(_with(1, 2), _with(3, 2))
    assert changed.lines == ("- 1 prefill TP2 on a100-80g", "+ 3 prefill TP2 on a100-80g", "  2 decode TP2 on a100-80g")
    assert not changed.empty


def test_workers_of_one_shape_only_change_their_role() -> None:
    changed = change(_with(1, 3), _with(3, 1))
    assert changed.role_flips == 2
    assert changed.lines[-1] == "  2 of these workers only change their role: no restart"


def test_another_parallelism_is_no_role_flip() -> None:
    assert change(_with(1, 3, tp=4), _with(3, 1, tp=4)).role_flips == 0


def test_another_chunk_is_no_role_flip() -> None:
    colocated = plan(found=with_best(judged(pool(Role.COLOCATED, 2, workers=2, chunk=512), goodput=3.0)))
    assert change(_with(1, 1), colocated).role_flips == 0


def test_a_role_that_is_given_up_is_taken_away() -> None:
    colocated = plan(found=with_best(judged(pool(Role.COLOCATED, 2, workers=3), goodput=3.0)))
    lines = change(_with(1, 2), colocated).lines
    assert lines[:2] == ("- 1 prefill TP2 on a100-80g", "- 2 decode TP2 on a100-80g")
    assert lines[2] == "+ 3 colocated TP2 chunk 8192 on a100-80g"


def test_buckets_that_changed_end_the_window() -> None:
    older = _read([100], 0.0)
    assert window(replace(older, prompt=Histogram(BOUNDS, (0.0,) * 6)), _read([100], 1.0)) is None
