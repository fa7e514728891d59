"""What our scheduler knows of vLLM's requests, and how many tokens the next step may have. It does not import vLLM.

Used on vLLM's step thread alone. What a request is to meet comes with it (`kv/job_params`); what follows from that is
`routing/pace`'s.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isinf
from typing import TYPE_CHECKING

from splitserve.core.worker import Pace
from splitserve.kv.job_params import pace_of, waits_for_kv
from splitserve.latency.model import Step, pairs
from splitserve.routing.pace import Batch, PacedJobs

if TYPE_CHECKING:
    from vllm.v1.request import Request

_HAS_ITS_END = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")  # vLLM's names
_NEWS_S = 0.02  # routers hear so often how decodes stand, and at once when the tightest objective changes
_NEWS_SHARE = 0.005  # of the step thread's time: with very many decodes they hear less often


@dataclass(frozen=True, slots=True)
class Bound:
    """Of the next step: how many tokens in all and how many of one prompt. `put_off`: waiting prompts that get none, so
    that they take none from those behind them whose KV comes from elsewhere."""

    tokens: int
    of_one: int
    put_off: tuple["Request", ...] = ()


class Paced:
    """What the scheduler knows of its requests' pace. `decode_tokens`: of one sequence in a step, drafts included."""

    def __init__(self, jobs: PacedJobs, decode_tokens: int, report: Callable[[Pace], None]) -> None:
        self._jobs = jobs
        self._decode_tokens = decode_tokens
        self._report = report
        self._requests: dict[str, Request] = {}
        self._before: dict[str, int] = {}  # output tokens that were made elsewhere
        self._silent: dict[str, bool] = {}  # requests without a token; whether their KV comes from elsewhere
        self._unread: set[str] = set()  # those whose prompt is begun and not read, and perhaps others
        self._steps: deque[_Begun] = deque()
        self._ended_at, self._follows = 0.0, False  # the last step, and the next comes at once
        self._batch = Batch(0, 0)  # what decodes after the last step
        self._told, self._tell_at = Pace(), 0.0

    def add(self, request: "Request") -> None:
        params = request.sampling_params
        objectives, before = pace_of(params.extra_args if params is not None else None)
        job_id, waits = request.request_id, waits_for_kv(request.kv_transfer_params)
        self._requests[job_id], self._before[job_id], self._silent[job_id] = request, before, waits
        self._jobs.add(job_id, objectives, waits, time.monotonic())

    def reads(self, request: "Request") -> bool:
        """Its prompt, or what it lost when it was preempted; else it decodes."""
        return bool(request.num_tokens - request.num_computed_tokens > self._decode_tokens)

    def bound(self, running: "Sequence[Request]", waiting: "Collection[Request]", most: int) -> Bound | None:
        """None: as vLLM likes, since no decode has an objective, or nothing is to be read. `waiting`: in vLLM's order.
        `most`: tokens of a step."""
        if isinf(self._jobs.tpot_s) or not (waiting or self._unread):
            return None
        reading = [request for request in running if self.reads(request)]
        prompts = [request for request in waiting if self.reads(request) and not self._silent.get(request.request_id)]
        self._unread = {request.request_id for request in chain(reading, prompts)}
        for_prompts = most - (len(running) - len(reading)) * self._decode_tokens
        first = next(chain(reading, prompts), None)
        if first is None or for_prompts <= 0:
            return None
        chunk = self._chunk(first, _batch(running, reading), for_prompts)
        if chunk >= for_prompts:
            return Bound(most, max(self._decode_tokens, for_prompts))
        return self._bound(chunk, reading, prompts, most - for_prompts, most)

    def scheduled(self, tokens: Mapping[str, int], requests: "Mapping[str, Request]") -> None:
        """vLLM has decided; the requests' computed tokens are those after the step."""
        prompt_tokens = prompt_pairs = prefills = decodes = context = starts = their_context = 0
        for request_id, count in tokens.items():
            request = requests[request_id]
            computed = request.num_computed_tokens
            if count <= self._decode_tokens and computed > count:
                decodes += 1
                context += computed
                continue
            prefills += 1
            prompt_tokens += count
            prompt_pairs += pairs(count, max(0, computed - count))
            if computed >= request.num_tokens:
                starts += 1
                their_context += computed
            else:
                self._unread.add(request_id)
        self._batch = Batch(decodes + starts, context + their_context)
        step = Step(prompt_tokens, prompt_pairs, prefills, decodes, context)
        self._steps.append(_Begun(step, self._silent.keys() & tokens.keys(), time.monotonic(), self._follows))

    def stepped(self, goes_on: bool) -> None:
        """The oldest step has ended, and its tokens are known. It took what a profile says that it takes: all from the
        last one's end, if the engine had work. `goes_on`: it has now."""
        now = time.monotonic()
        begun = self._steps.popleft()
        since = self._ended_at if begun.follows else max(begun.at, self._ended_at)
        self._jobs.pacer.took(begun.step, now - since)
        self._ended_at, self._follows = now, goes_on
        self._note_first_tokens(begun.silent, now)

    def ended(self, request_ids: Iterable[str]) -> None:
        """What vLLM has finished or aborted; what is known already is passed over."""
        for request_id in request_ids:
            request = self._requests.pop(request_id, None)
            if request is None:
                continue
            before = self._before.pop(request_id)
            self._silent.pop(request_id, None)
            whole = request.status.name in _HAS_ITS_END and request.max_tokens > 1
            self._jobs.end(request_id, before + request.num_output_tokens if whole else 0)

    def tell(self) -> None:
        """Reports how decodes stand, if that is due."""
        now = time.monotonic()
        if now < self._tell_at and self._jobs.tpot_s == self._told.tpot_s:
            return
        self._note_tokens(now)
        pace = self._jobs.pace(self._batch, now)
        self._tell_at = now + max(_NEWS_S, (time.monotonic() - now) / _NEWS_SHARE)
        if pace != self._told:
            self._told = pace
            self._report(pace)

    def _chunk(self, first: "Request", batch: Batch, for_prompts: int) -> int:
        """Prompt tokens of the next step."""
        now, done = time.monotonic(), first.num_computed_tokens
        self._note_tokens(now)
        return self._jobs.chunk(first.request_id, first.num_tokens - done, done, batch, for_prompts, now)

    def _bound(
        self, chunk: int, reading: "Sequence[Request]", prompts: "Sequence[Request]", decode_tokens: int, most: int
    ) -> Bound:
        """vLLM parks a request for KV, and takes up one whose KV is there, only while the step has tokens left when it
        comes to it. So there is one decode's worth for each, and what else is read leaves them alone: running prompts
        by a share each, waiting ones that the chunk does not reach by being put off."""
        for_kv = self._jobs.parked * self._decode_tokens
        readers = len(reading) if for_kv else 0
        of_one = max(self._decode_tokens, chunk // readers if readers > 1 else chunk)
        for_prompts = max(chunk, readers * self._decode_tokens)
        reached = sum(request.num_tokens - request.num_computed_tokens for request in reading)
        put_off = []
        for request in prompts:
            if reached >= chunk:
                put_off.append(request)
            reached += request.num_tokens - request.num_computed_tokens
        return Bound(min(most, decode_tokens + for_prompts + for_kv), of_one, tuple(put_off))

    def _note_first_tokens(self, silent: Iterable[str], now: float) -> None:
        for request_id in silent:
            request = self._requests.get(request_id)
            if request is not None and request.num_output_tokens and self._silent.pop(request_id, None) is not None:
                self._jobs.made(request_id, request.num_output_tokens, now)

    def _note_tokens(self, now: float) -> None:
        """Of all decodes with objectives: only when somebody asks."""
        if isinf(self._jobs.tpot_s):
            return
        for request_id, request in self._requests.items():
            if request_id not in self._silent:
                self._jobs.made(request_id, request.num_output_tokens, now)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A step that has not ended. `silent`: those in it without a token so far; `follows`: right after another."""

    step: Step
    silent: set[str]
    at: float
    follows: bool


def _batch(running: "Sequence[Request]", reading: "Sequence[Request]") -> Batch:
    """Those that decode."""
    context = sum(request.num_tokens for request in running) - sum(request.num_tokens for request in reading)
    return Batch(len(running) - len(reading), context)
