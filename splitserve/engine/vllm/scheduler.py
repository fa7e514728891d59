"""vLLM's scheduler, which here reads prompts only as fast as its decodes' objectives allow (`routing/pace`).

vLLM builds it by its name, wherever its engine core runs. Every decision remains vLLM's own: before each, this bounds
the step's prompt tokens, puts decodes first and hides the waiting prompts that are to get nothing, and after it takes
that back. Where no decode has an objective it does nothing. All of it is called on vLLM's step thread.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from splitserve.core.worker import StepCost
from splitserve.engine.vllm.arguments import STEP_COST
from splitserve.engine.vllm.paced import Bound, Paced
from splitserve.latency.cost import latency_of
from splitserve.routing.pace import PacedJobs

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


def scheduler(vllm_config: "VllmConfig", *arguments: Any, **named: Any) -> Scheduler:
    """What vLLM calls for a scheduler."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (PacedAsyncScheduler if is_async else PacedScheduler)(vllm_config, *arguments, **named)


class PacedScheduler(Scheduler):  # type: ignore[misc]
    """One step after the other."""

    max_num_scheduled_tokens: int

    def __init__(self, vllm_config: "VllmConfig", *arguments: Any, **named: Any) -> None:
        super().__init__(vllm_config, *arguments, **named)
        cost = StepCost(**vllm_config.kv_transfer_config.get_from_extra_config(STEP_COST, {}))
        self._paced = Paced(PacedJobs(latency_of(cost)), 1 + self.num_spec_tokens, self.connector.report_pace)

    def add_request(self, request: "Request") -> None:
        self._paced.add(request)
        super().add_request(request)

    def schedule(self, *arguments: Any, **named: Any) -> "SchedulerOutput":
        self._paced.ended(self.finished_req_ids)
        bound = self._paced.bound(self.running, self.waiting, self.max_num_scheduled_tokens)
        if bound is None:
            output = super().schedule(*arguments, **named)
        else:
            with self._bounded(bound), self._without(bound.put_off):
                output = super().schedule(*arguments, **named)
        self._paced.scheduled(output.num_scheduled_tokens, self.requests)
        return output

    def update_from_output(self, *arguments: Any, **named: Any) -> Any:
        outputs = super().update_from_output(*arguments, **named)
        self._paced.stepped(bool(self.running))
        self._paced.ended(self.finished_req_ids)
        self._paced.tell()
        return outputs

    @contextmanager
    def _bounded(self, bound: Bound) -> Iterator[None]:
        config, whole = self.scheduler_config, self.max_num_scheduled_tokens
        chunk_limit = config.long_prefill_token_threshold  # 0: none
        self.running.sort(key=self._paced.reads)  # a sort that keeps the order of equals: decodes get theirs first
        self.max_num_scheduled_tokens = bound.tokens
        config.long_prefill_token_threshold = min(chunk_limit or bound.of_one, bound.of_one)
        try:
            yield
        finally:
            self.max_num_scheduled_tokens, config.long_prefill_token_threshold = whole, chunk_limit

    @contextmanager
    def _without(self, put_off: "Sequence[Request]") -> Iterator[None]:
        """While it lasts, vLLM does not see that these wait. They come back in the order in which they stood."""
        if not put_off:
            yield
            return
        stood = list(self.waiting)
        self.waiting.remove_requests(put_off)
        try:
            yield
        finally:
            left = list(self.waiting)
            self.waiting.remove_requests(left)
            for request in _in_order(left, stood, put_off):
                self.waiting.add_request(request)


class PacedAsyncScheduler(PacedScheduler, AsyncScheduler):  # type: ignore[misc]
    """The next step is decided while one computes."""


def _in_order(left: "Sequence[Request]", stood: "Sequence[Request]", put_off: "Sequence[Request]") -> "list[Request]":
    """What has come in the meantime, then what stood there and still waits."""
    before, still = set(stood), {*left, *put_off}
    return [
        *(request for request in left if request not in before),
        *(request for request in stood if request in still),
    ]
