"""Admission by peak and by what is held, where memory is short."""

from dataclasses import replace

import numpy as np

from benchmarks.admission import BLOCK_TOKENS, _row
from benchmarks.engine_queue import ByWhatIsHeld, EngineQueue
from benchmarks.scheduling import worker_of
from splitserve.cli.build import read_model
from splitserve.core.config import KvTransferSettings, SimSettings
from splitserve.engine.sim import SimEngine
from splitserve.latency.linear import LinearLatency
from splitserve.planner.deployment import Role
from splitserve.routing.admission import Capacity
from splitserve.workload.named import workload

LATENCY = LinearLatency(fixed_s=0.006, prefill_token_s=0.00025, decode_token_s=0.0008)
WORKER = replace(worker_of(Role.COLOCATED, LATENCY, 256), kv_blocks=960, block_tokens=BLOCK_TOKENS, max_sequences=256)


def test_decodes_admitted_by_their_peak_are_hardly_ever_preempted() -> None:
    by_now = _row(replace(WORKER, admits_by_peak=False), 0.4, 10.0, seed=1)
    by_peak = _row(WORKER, 0.4, 10.0, seed=1)
    assert by_now.preemptions > 200
    assert by_peak.preemptions < by_now.preemptions / 20
    assert by_peak.seconds <= by_now.seconds


def test_an_engine_behind_a_workers_account_serves_everything_and_says_what_it_preempted() -> None:
    """By what is held some are preempted; by their peak, once outputs are known, fewer."""
    model = read_model("demo", "")
    settings = SimSettings(step_s=0.0005, total_blocks=60, max_model_len=512, max_num_seqs=64)
    requests = workload("lognormal:prompt=60,output=60,sigma=0.4,limit=512").draw(150, 400.0, seed=1)
    with EngineQueue(SimEngine(model, settings, KvTransferSettings(), "w"), model.vocab_size) as queue:
        lines, by_now = queue.serve(requests, 1, ByWhatIsHeld, lambda _: None)
        assert np.isfinite(lines.last_token).all()
        assert (lines.first_token <= lines.last_token).all()
        _, by_peak = queue.serve(requests, 1, Capacity, lambda _: None)
    assert by_now > 2 * by_peak
