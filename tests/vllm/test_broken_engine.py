"""When vLLM itself breaks, its jobs hear of it at once and the worker is told to end."""

from pathlib import Path

import psutil
import pytest

from benchmarks.remote_engine import Collector, RemoteEngine
from splitserve.core.config import KvTransferSettings, VllmSettings
from splitserve.core.errors import EngineError
from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, Failure

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_a_broken_engine_fails_its_jobs_and_says_so_to_its_worker(
    sensitive_model: Path, cores: tuple[int, int]
) -> None:
    settings = VllmSettings(dtype="float32", max_model_len=4096, kv_cache_gib=0.125)
    engine = RemoteEngine(sensitive_model, settings, KvTransferSettings(), "uuid-broken", cores[0])
    engine.spawn()
    deltas = Collector()
    engine.start(deltas)
    try:
        endless = SamplingParams(max_tokens=4000, temperature=0.0, ignore_eos=True)
        engine.submit(DecodeJob("job", "request", (5, 6, 7), endless, 60.0))
        deltas.wait_for_tokens("job", 3)
        engine.sabotage()
        outcome = deltas.outcome("job")
        assert outcome.failure is Failure.ENGINE
        assert "sabotaged" in outcome.message
        with pytest.raises(EngineError, match="sabotaged"):
            engine.load()
    finally:
        engine.kill()


def test_vllms_own_processes_end_with_a_worker_that_is_killed(sensitive_model: Path, cores: tuple[int, int]) -> None:
    """Else they would keep its devices."""
    settings = VllmSettings(dtype="float32", max_model_len=512, kv_cache_gib=0.125, tensor_parallel_size=2)
    engine = RemoteEngine(sensitive_model, settings, KvTransferSettings(), "uuid-killed", cores[0])
    engine.spawn()
    try:
        engine.start(Collector())
        started = psutil.Process(engine.process.pid).children(recursive=True)
        ours = [each for each in started if "resource_tracker" not in " ".join(each.cmdline())]
        assert len(ours) == 3  # the scheduler's process, and a rank's each
    finally:
        engine.kill()
    assert psutil.wait_procs(ours, timeout=60.0)[1] == []
