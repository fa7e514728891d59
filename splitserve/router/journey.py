"""The life of one request, top to bottom: checked, tokenised, waiting, dispatched, streamed, finished.

A `Journey` belongs to the task of its gRPC call; it awaits, and holds nothing that is not given back by a `with`. It
does not choose workers (`routing/policy` does, through `waiting`) and does not know the wire. Whatever fails on the way
is a `Setback`: the next attempt avoids the worker at fault and takes up where the client's tokens end. What that keeps
exact is in `resume`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from uuid import uuid4

from splitserve.core.config import RouterConfig
from splitserve.core.deadline import Deadline
from splitserve.core.errors import DeadlineExceeded, SplitserveError
from splitserve.core.model import ModelInfo
from splitserve.core.request import ChatMessage, Chunk, GenerateRequest, Usage
from splitserve.core.worker import Failure
from splitserve.router.attempt import Attempt, MovedOn, Setback, Work
from splitserve.router.departure import Departure
from splitserve.router.membership import Membership
from splitserve.router.move import Move
from splitserve.router.output import Output
from splitserve.router.resume import finished_already
from splitserve.router.text import Text
from splitserve.router.timing import Stopwatch
from splitserve.router.validate import Limits, check_prompt, check_request
from splitserve.router.waiting import Ask, Binding, WaitingRequests
from splitserve.routing.policy import Need
from splitserve.telemetry.metrics import RouterMetrics

_MOST_BROKEN_ENGINES = 2  # a request that breaks engines must not go through the whole fleet

Send = Callable[[Chunk], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every journey of a router shares."""

    config: RouterConfig
    model: ModelInfo
    text: Text
    membership: Membership
    waiting: WaitingRequests
    metrics: RouterMetrics


@dataclass(slots=True)
class _Blame:
    """What went wrong so far, and which workers the next attempt keeps away from."""

    avoid: frozenset[str] = frozenset()
    exclude: frozenset[str] = frozenset()
    failures: int = 0
    broken_engines: int = 0
    last: SplitserveError | None = None

    def take(self, setback: Setback) -> None:
        self.last = setback.error
        self.failures += setback.counts
        self.broken_engines += setback.reason == Failure.ENGINE.value
        if setback.counts and setback.worker is not None:
            self.avoid |= {setback.worker}
        if setback.silent and setback.worker is not None:
            self.exclude |= {setback.worker}


class Journey:
    """`request.request_id` is set. `send` is awaited for every chunk, one at a time. `time_left_s` is what the caller
    allows, if that is less than the request's deadline."""

    def __init__(
        self, request: GenerateRequest, send: Send, around: Surroundings, time_left_s: float | None = None
    ) -> None:
        allowed_s = (request.deadline_s or around.config.deadline_s, time_left_s)
        self._request = request
        self._deadline = Deadline.after(min(s for s in allowed_s if s is not None))
        self._send = send
        self._around = around
        self._transfer_id = uuid4().hex
        self._output = Output()
        self._stopwatch = Stopwatch(arrived_at=time.monotonic())
        self._blame = _Blame()
        self._attempt: Attempt | None = None
        self._prompt: tuple[int, ...] = ()
        self._sampling = request.sampling

    async def travel(self) -> Chunk:
        """Returns the last chunk, sent like the others. Raises a SplitserveError in every other ending."""
        limits = self._limits()
        check_request(self._request, limits)
        try:
            async with asyncio.timeout(self._deadline.remaining_s):
                self._prompt = await self._token_ids()
                self._sampling = check_prompt(self._request, self._prompt, limits)
                while self._output.finish_reason is None:
                    async with self._around.waiting.bound(self._ask()) as binding:
                        departure = await self._try(binding, None)
                    while departure is not None and departure.binding is not None:
                        departure = await self._try(departure.binding, departure)
                return await self._finish()
        except TimeoutError as error:
            raise self._too_late() from error

    def move(self, move: Move) -> None:
        """Takes the request to another decode worker; `move` hears what became of it."""
        if self._attempt is None:
            move.refuse("it waits for a route; ask again when it decodes")
        else:
            self._attempt.move(move)

    @property
    def decode_worker(self) -> str:
        """The uuid of the worker that decodes it, or will; empty while it waits for one."""
        return self._attempt.decode_worker if self._attempt is not None else ""

    async def _try(self, binding: Binding, arriving: Departure | None) -> Departure | None:
        """One attempt. Returns the departure if the request is to go on at another worker."""
        self._stopwatch.bound(binding, moved=arriving is not None)
        around = self._around
        try:
            with Attempt(binding, self._work(), around.membership, around.waiting, arriving) as self._attempt:
                await self._attempt.run()
        except Setback as setback:
            self._learn(setback)
        except MovedOn as moved:
            return moved.departure
        finally:
            self._attempt = None
        return None

    def _learn(self, setback: Setback) -> None:
        """Finishes, goes on to the next attempt, or raises what the client is told."""
        self._around.metrics.attempt_failed(setback.reason)
        self._blame.take(setback)
        output = self._output.token_ids
        self._output.finish_reason = finished_already(self._sampling, output, self._around.model.eos_token_ids)
        if self._output.finish_reason is not None:
            return
        most = self._around.config.max_attempts
        if self._blame.failures >= most or self._blame.broken_engines >= min(most, _MOST_BROKEN_ENGINES):
            raise setback.error
        if output and setback.counts:
            self._around.metrics.resumed()

    async def _finish(self) -> Chunk:
        usage = Usage(len(self._prompt), len(self._output.token_ids))
        chunk = replace(
            self._output.take_chunk(self._request.request_id),
            finish_reason=self._output.finish_reason,
            usage=usage,
            timings=self._stopwatch.timings(usage.output_tokens),
        )
        await self._send(chunk)
        return chunk

    # -------------------------------------------------------------------------------------------------------------
    def _limits(self) -> Limits:
        model = self._around.model
        fleet_limit = self._around.membership.token_limit
        return Limits(model.name, model.vocab_size, fleet_limit or model.max_position_embeddings)

    async def _token_ids(self) -> tuple[int, ...]:
        prompt = self._request.prompt
        if isinstance(prompt, str):
            return await self._around.text.token_ids(prompt)
        said = tuple(part for part in prompt if isinstance(part, ChatMessage))
        return await self._around.text.token_ids(said) if said else tuple(t for t in prompt if isinstance(t, int))

    def _ask(self) -> Ask:
        """Jobs are not named by the request id: a client may use it again, here or at another router."""
        return Ask(
            need=Need(len(self._prompt) + len(self._output.token_ids), self._blame.avoid, self._blame.exclude),
            job_prefix=f"{self._transfer_id}/{self._stopwatch.routes + 1}",
            priority=self._request.priority,
            arrived_at=self._stopwatch.arrived_at,
            failed_with=self._blame.last,
        )

    def _work(self) -> Work:
        patience_s = self._request.inter_token_deadline_s
        return Work(
            request_id=self._request.request_id,
            prompt=self._prompt,
            sampling=self._sampling,
            priority=self._request.priority,
            deadline=self._deadline,
            inter_token_deadline_s=patience_s or self._around.config.inter_token_deadline_s,
            transfer_id=self._transfer_id,
            epoch=self._stopwatch.routes,
            output=self._output,
            stopwatch=self._stopwatch,
            flush=self._flush,
        )

    async def _flush(self) -> None:
        if self._output.has_unsent:
            await self._send(self._output.take_chunk(self._request.request_id))

    def _too_late(self) -> DeadlineExceeded:
        count, last = len(self._output.token_ids), self._blame.last
        stage = "while it waited for a worker" if self._stopwatch.routes == 0 else f"after {count} tokens"
        cause = f"; before that: {last}" if last is not None else ""
        return DeadlineExceeded(f"deadline_s: the request's time ran out {stage}; allow more{cause}")
