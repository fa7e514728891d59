"""vLLM's worker as splitserve runs it on a CPU. Imported by vLLM alone, by name, in its workers' processes: what it
stands on changes torch for the whole process."""

from splitserve.engine.vllm.cpu_lora import mend_prompt_logits
from splitserve.engine.vllm.cpu_worker import PipelineCpuWorker
from splitserve.engine.vllm.rank_process import RankProcess
from splitserve.engine.vllm.sampler_state import SamplerStates


class CpuWorker(RankProcess, SamplerStates, PipelineCpuWorker):
    """Takes up samplers; runs pipeline stages; ends with what started it."""

    def init_device(self) -> None:
        super().init_device()
        if self.vllm_config.lora_config is not None:
            mend_prompt_logits()
