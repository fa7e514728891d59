"""Late binding beside early."""

import pytest

from benchmarks.late_binding import rows
from splitserve.latency.linear import LinearLatency

LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0008)


def test_what_waits_in_the_router_holds_no_decode_memory() -> None:
    found = {(row.arrivals, row.load, row.binding): row for row in rows(LATENCY, seed=0, requests=600)}
    for (arrivals, load, _), row in found.items():
        assert row.waiting_share <= found[arrivals, load, "early"].waiting_share
    early, late = found["gamma:cv=3", 0.9, "early"], found["gamma:cv=3", 0.9, "late"]
    assert late.waiting_share < 0.9 * early.waiting_share
    assert late.ttft_mean_s == pytest.approx(early.ttft_mean_s, rel=0.05)
