"""Admission by peak and by what is held, where memory is short."""

from dataclasses import replace

from benchmarks.admission import BLOCK_TOKENS, _row
from benchmarks.scheduling import worker_of
from splitserve.latency.linear import LinearLatency
from splitserve.planner.deployment import Role

LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0008)
WORKER = replace(worker_of(Role.COLOCATED, LATENCY, 256), kv_blocks=960, block_tokens=BLOCK_TOKENS, max_sequences=256)


def test_decodes_admitted_by_their_peak_are_hardly_ever_preempted() -> None:
    by_now = _row(replace(WORKER, admits_by_peak=False), 0.4, 10.0, seed=1)
    by_peak = _row(WORKER, 0.4, 10.0, seed=1)
    assert by_now.preemptions > 200
    assert by_peak.preemptions < by_now.preemptions / 20
    assert by_peak.seconds <= by_now.seconds
