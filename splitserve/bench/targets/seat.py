"""The one worker that is measured, what it grants, and the requests that it runs or that wait for it.

State of one event loop: no method awaits but `ask`, which a request's sender iterates. Requests wait in the order of
their coming; the first one goes as soon as the worker grants it, by the rule of `routing/admission`, and so no sooner
than a router with this worker alone would send it. The gRPC around it is `worker`'s.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import uuid4

from splitserve.bench.open_loop import Answer
from splitserve.bench.targets.opened import Heard, greedy
from splitserve.core.config import RouterConfig
from splitserve.core.deadline import Deadline
from splitserve.core.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    SplitserveError,
    Unavailable,
)
from splitserve.core.worker import DecodeJob, Delta, Failure, Load, Outcome, Pool, WorkerInfo
from splitserve.routing.admission import fits_decode
from splitserve.routing.fleet import Fleet
from splitserve.routing.promise import Promise

DEADLINE_S: float = RouterConfig().deadline_s  # of a request, waiting included, as at a router


@dataclass(frozen=True, slots=True)
class SendJob:
    """`number` counts the jobs of this stream from 1."""

    number: int
    job: DecodeJob


@dataclass(frozen=True, slots=True)
class SendCancel:
    job_id: str


Order = SendJob | SendCancel


@dataclass(slots=True, eq=False)
class _Asked:
    """One request, and what came of it that its sender has not read. It is over when `over` or `error` is set."""

    job_id: str
    prompt: tuple[int, ...]
    output_tokens: int
    heard: Heard | None = None
    deadline: Deadline = field(default_factory=partial(Deadline.after, DEADLINE_S))
    tokens: int = 0
    over: bool = False
    error: SplitserveError | None = None
    reader: asyncio.Future[None] | None = field(default=None, repr=False)

    def wake(self) -> None:
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)

    def fail(self, error: SplitserveError) -> None:
        self.error = self.error or error
        self.wake()

    async def news(self) -> int:
        """How many tokens have come since; 0 once it is over. Raises what went wrong, after the last token."""
        while not self.tokens and not self.over and self.error is None:
            self.reader = asyncio.get_running_loop().create_future()
            await self.reader
        tokens, self.tokens = self.tokens, 0
        if not tokens and self.error is not None:
            raise self.error
        return tokens

    def job(self) -> DecodeJob:
        """Without a ticket: the worker computes the prompt itself."""
        remaining_s = max(0.0, self.deadline.remaining_s)
        return DecodeJob(self.job_id, self.job_id, self.prompt, greedy(self.output_tokens), remaining_s)


class Seat:
    """`ready` is set once the worker has said what it grants; `outbox` is what it is to be told."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.outbox: asyncio.Queue[Order] = asyncio.Queue()
        self.info: WorkerInfo | None = None  # of the worker that has come first; it stays when that leaves
        self.routers = 1  # that the worker is attached to, this one included
        self._fleet = Fleet(silent_after_s=float("inf"))
        self._run, self._jobs = uuid4().hex, 0
        self._waiting: dict[str, _Asked] = {}
        self._running: dict[str, _Asked] = {}

    # The worker ------------------------------------------------------------------------------------------------------
    def sit(self, info: WorkerInfo) -> None:
        """Raises Unavailable for any other worker than the first: one is measured, and the others would not show."""
        if info.uuid in self._fleet:
            raise Unavailable(f"{info.name} is attached already; its former stream is not over yet")
        if self.info is not None and self.info.uuid != info.uuid:
            raise Unavailable(
                f"one worker is measured here, and that is {self.info.name}: {info.name} can't attach; "
                "to measure several, attach them to a router and measure that"
            )
        self.info, self.outbox = info, asyncio.Queue()
        self._fleet.join(info, time.monotonic())

    def leave(self, reason: str) -> None:
        """Whatever it runs, and whatever waits for it, has failed."""
        assert self.info is not None
        self._fleet.leave(self.info.uuid)
        error = self._gone(reason)
        for request in (*self._running.values(), *self._waiting.values()):
            request.fail(error)
        self._running.clear()
        self._waiting.clear()

    def heard(self, load: Load | None, deltas: Sequence[Delta]) -> None:
        """One message of the worker. Its load comes first: a NotNow beside it is newer than what it grants."""
        assert self.info is not None
        if load is not None:
            self._fleet.report(self.info.uuid, load, time.monotonic())
            self.routers = load.routers
            self.ready.set()
        for delta in deltas:
            self._take(delta)
        self._pump()

    # Requests --------------------------------------------------------------------------------------------------------
    async def ask(self, prompt_ids: Sequence[int], output_tokens: int, heard: Heard | None = None) -> Answer:
        """See `opened.Ask`."""
        request = self._enter(_Asked(self._next_id(), tuple(prompt_ids), output_tokens, heard))
        late = DeadlineExceeded(f"it had not ended {DEADLINE_S:g} s after it was sent")
        expiry = asyncio.get_running_loop().call_later(DEADLINE_S, partial(request.fail, late))
        try:
            while tokens := await request.news():
                yield tokens
        finally:
            expiry.cancel()
            self._let_go(request)

    def _next_id(self) -> str:
        """One that the worker does not know from an earlier run either."""
        self._jobs += 1
        return f"{self._run}-{self._jobs}"

    def _enter(self, request: _Asked) -> _Asked:
        if self.info is None or self.info.uuid not in self._fleet:
            raise self._gone("it has left")
        most = min(self.info.max_model_len, self.info.total_blocks * self.info.kv.block_size)
        if len(request.prompt) + request.output_tokens > most:
            reason = f"{len(request.prompt)} and {request.output_tokens} to come; {self.info.name} holds {most} tokens"
            raise InvalidRequest("prompt", reason)
        self._waiting[request.job_id] = request
        self._pump()
        return request

    def _let_go(self, request: _Asked) -> None:
        """What runs and has not ended is cancelled; it counts as running until the worker has said that it ended."""
        if self._waiting.pop(request.job_id, None) is not None:
            self._pump()
        if self._running.pop(request.job_id, None) is not None:
            self.outbox.put_nowait(SendCancel(request.job_id))

    def _pump(self) -> None:
        """Sends what the worker grants now. The first one that does not fit holds up the others, as it would be
        overtaken for ever otherwise."""
        while self._waiting and self._fits(request := next(iter(self._waiting.values()))):
            assert self.info is not None
            del self._waiting[request.job_id]
            self._running[request.job_id] = request
            self._fleet.promise(self.info.uuid, request.job_id, Promise(Pool.DECODE, len(request.prompt)))
            self.outbox.put_nowait(SendJob(self._fleet.sent(self.info.uuid, request.job_id), request.job()))

    def _fits(self, request: _Asked) -> bool:
        (worker,) = self._fleet.candidates(time.monotonic())
        block_size = worker.info.kv.block_size
        return worker.accepting and fits_decode(worker.load, len(request.prompt), block_size, waits_for_kv=False)

    # What comes of them ----------------------------------------------------------------------------------------------
    def _take(self, delta: Delta) -> None:
        assert self.info is not None
        request = self._running.get(delta.job_id)
        if delta.outcome is not None:
            self._fleet.ended(self.info.uuid, delta.job_id)
            self._running.pop(delta.job_id, None)
            if delta.outcome.failure is Failure.NOT_NOW:
                self._fleet.refused(self.info.uuid)
        if request is None:
            return
        if delta.outcome is not None and delta.outcome.failure is Failure.NOT_NOW:
            self._waiting = {request.job_id: request, **self._waiting}
            return
        request.tokens += len(delta.token_ids)
        if request.heard is not None:
            request.heard(delta.token_ids)
        if delta.outcome is not None:
            request.over = True
            request.error = request.error or _error_of(delta.outcome)
        request.wake()

    def _gone(self, reason: str) -> Unavailable:
        name = self.info.name if self.info is not None else "the worker"
        return Unavailable(f"{name} is gone: {reason}")


def _error_of(outcome: Outcome) -> SplitserveError | None:
    if outcome.failure is None:
        return None
    if outcome.failure is Failure.INVALID:
        return InvalidRequest(outcome.field or "request", outcome.message)
    return _FAILURES.get(outcome.failure, EngineError)(outcome.message)


_FAILURES: Mapping[Failure, type[SplitserveError]] = {Failure.CANCELLED: Cancelled}
