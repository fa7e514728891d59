import json
from typing import Any

from splitserve.bench.as_json import as_json
from splitserve.bench.findings import judged
from splitserve.core.slo import Slo
from tests.unit.bench.saved_runs import SLO, saved, swept


def told(*args: Any) -> dict[str, Any]:
    """As another program reads it: no NaN, no Infinity."""
    said: dict[str, Any] = json.loads(json.dumps(as_json(judged(*args)), allow_nan=False))
    return said


def test_a_run_is_told_with_its_facts_and_errors() -> None:
    said = told([saved(6.0, patience_s=1.0)], Slo(0.4, 0.05, itl_p99_s=0.1))
    (run,) = said["systems"][0]["runs"]
    assert (said["kind"], said["slo"]["itl_p99_s"]) == ("run", 0.1)
    assert run["errors"] == [{"error": "Overloaded: the queue is full", "requests": run["failed"]}]
    assert run["facts"]["workload"].startswith("lognormal")
    assert run["ttft_s"]["p99"] is None  # too many failed


def test_a_sweep_has_its_goodput_and_a_comparison_its_ratio() -> None:
    assert told(swept(), SLO)["systems"][0]["goodput"]["rps"] > 1.0
    said = told([*swept("fast", slots=6), *swept("slow", slots=3)], SLO)
    assert said["pairs"][0]["goodput_ratio"]["value"] > 1.0
    assert len(said["pairs"][0]["rates"]) == 4
