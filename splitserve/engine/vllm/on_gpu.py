"""vLLM's worker as splitserve runs it on a GPU. Imported by vLLM alone, by name, in its workers' processes."""

from vllm.v1.worker.gpu_worker import Worker

from splitserve.engine.vllm.rank_process import RankProcess
from splitserve.engine.vllm.sampler_state import SamplerStates


class GpuWorker(RankProcess, SamplerStates, Worker):  # type: ignore[misc]
    """Takes up samplers; ends with what started it."""
