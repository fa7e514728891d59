"""Mends vLLM's LoRA on a CPU for log-probabilities of prompts: without it a request for them that meets another one in
a batch ends the engine, if the worker has adapters.

vLLM gives the output layer one adapter index per request that samples, and then also passes all of a prompt's rows
through it, which do not broadcast. Adapters seldom change the output layer, and then it adds nothing to any row: it is
left out for a prompt's. With one that does, vLLM's code runs as it is. Seen in 0.32; on GPUs the kernel has a row per
token. Called in vLLM's worker processes, on their step thread.
"""

from typing import Any


def mend_prompt_logits() -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    adds = PunicaWrapperCPU.add_lora_logits

    def add_lora_logits(punica: Any, y: Any, x: Any, a_stacked: Any, b_stacked: Any, *others: Any, **named: Any) -> Any:
        rows = x.numel() // x.shape[-1]
        if rows != punica.sampler_indices.shape[0] and not b_stacked.any():
            return None
        return adds(punica, y, x, a_stacked, b_stacked, *others, **named)

    PunicaWrapperCPU.add_lora_logits = add_lora_logits
