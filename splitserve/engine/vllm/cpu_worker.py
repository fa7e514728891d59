"""vLLM's CPU worker for pipeline parallelism: a later stage has the buffers that the stage before it fills.

vLLM allocates them in its warm-up forward, which the CPU worker skips when it compiles nothing and is told the cache's
size, as ours is; the first request then fails on `assert self.intermediate_tensors is not None`. Built and called by
vLLM in each rank's process, on its one thread. Computing, sampling and sending between stages are vLLM's.
"""

from typing import Any

from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker


class PipelineCpuWorker(CPUWorker):  # type: ignore[misc]
    """One rank of a model whose layers are split over stages."""

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return times
