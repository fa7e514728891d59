"""What vLLM is asked for one job. No state but what the worker has; raises InvalidRequest for what it can't do."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from splitserve.core.errors import InvalidRequest
from splitserve.core.request import SamplingParams
from splitserve.core.sampler_state import SamplerState
from splitserve.core.worker import DecodeJob, Job, KvMode, PrefillJob
from splitserve.engine.protocol import NEEDS_NO_TICKET
from splitserve.engine.vllm.cache_events import REPORT_HITS
from splitserve.engine.vllm.parsing import OutputParser
from splitserve.engine.vllm.sampler_state import refuse_lost_penalties
from splitserve.engine.vllm.translate import structured_params, vllm_params
from splitserve.kv.job_params import (
    DESTINATION,
    SOURCE,
    GrammarStart,
    grammar_params,
    job_params,
    pace_params,
    ticket_params,
)
from splitserve.kv.layout import tokens_to_move

ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class VllmRequest:
    """What vLLM is asked for one job. `lora`: a LoRARequest."""

    job_id: str
    tokens: list[int]
    params: Any
    priority: int = 0
    lora: Any = None
    cache_salt: str = ""
    traceparent: str = ""

    @property
    def prompt(self) -> Any:
        from vllm.inputs.engine import tokens_input

        return tokens_input(self.tokens, cache_salt=self.cache_salt or None)

    @property
    def options(self) -> dict[str, Any]:
        """What LLMEngine and AsyncLLM take under the same names."""
        traced = {"trace_headers": {"traceparent": self.traceparent}} if self.traceparent else {}
        return {"priority": self.priority, "lora_request": self.lora, **traced}


@dataclass(frozen=True, slots=True)
class Requests:
    """`restorable`: the sampling fields whose state the engine can take up; `loras`: LoRARequests by name."""

    max_model_len: int
    mode: KvMode
    restorable: Collection[str]
    loras: Mapping[str, Any]

    def of(self, job: Job, parser: OutputParser | None) -> VllmRequest:
        """Raises InvalidRequest, and what vLLM raises."""
        if job.lora and job.lora not in self.loras:
            known = ", ".join(self.loras) or "it has none"
            raise InvalidRequest("lora", f"{job.lora!r} is none of this worker's adapters: {known}")
        tokens = [*job.prompt, *(job.output if isinstance(job, DecodeJob) else ())]
        room = self.max_model_len - len(tokens)
        if isinstance(job, PrefillJob):
            extra = self._transfer(job) | pace_params(job.objectives, 0)
            params = vllm_params(ONE_TOKEN, SamplerState.of(ONE_TOKEN, ()), room, extra)
            if self.mode is KvMode.PUSH:
                tokens = tokens[: max(1, tokens_to_move(len(tokens)))]
        else:
            params = self._decode_params(job, room, parser)
        lora = self.loras.get(job.lora)
        return VllmRequest(job.job_id, tokens, params, job.priority, lora, job.cache_salt, job.traceparent)

    def _decode_params(self, job: DecodeJob, room: int, parser: OutputParser | None) -> Any:
        sampling, state = job.sampling, SamplerState.of(job.sampling, job.output)
        if sampling.prompt_logprobs is not None and job.ticket is not None:
            raise InvalidRequest("sampling.prompt_logprobs", NEEDS_NO_TICKET)
        refuse_lost_penalties(state, self.restorable)
        if parser is not None:
            structured, start = parser.structured_outputs, parser.grammar_start(job.output)
        else:
            said, start = sampling.structured_output, GrammarStart(True, len(job.output))
            structured = structured_params(said) if said is not None else None
        extra = self._transfer(job) | grammar_params(start if structured is not None else None)
        return vllm_params(sampling, state, room, extra | pace_params(job.objectives, len(job.output)), structured)

    def _transfer(self, job: Job) -> dict[str, Any]:
        params = self._ticket_params(job)
        return REPORT_HITS | ({"kv_transfer_params": params} if params is not None else {})

    def _ticket_params(self, job: Job) -> dict[str, Any] | None:
        """The job's ticket as the connector's request parameters."""
        source = isinstance(job, PrefillJob)
        if self.mode is KvMode.PUSH:
            side = SOURCE if source else DESTINATION
            return ticket_params(job.job_id, job.ticket, side, job.deadline_s) if job.ticket else job_params(job.job_id)
        if job.ticket is None:
            return None
        return {"do_remote_decode": True} if source else dict(json.loads(job.ticket.handover))
