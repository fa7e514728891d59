"""The life of one request, top to bottom: checked, tokenised, waiting, dispatched, streamed, finished.

A `Journey` belongs to the task of its call, and makes one output (`choices` has several). It awaits, and holds nothing
that is not given back by a `with`. It does not choose workers (`routing/policy` does, through `waiting`) and does not
know the wire. Whatever fails on the way is a `Setback`: the next attempt avoids the worker at fault and takes up where
the client's tokens end. What that keeps exact is in `resume`. A client that does not read has its request stopped, by
way of a setback too: it is resumed once the client reads on.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, isinf
from uuid import uuid4

from splitserve.core.config import DEFAULT_CLASS, RouterConfig
from splitserve.core.deadline import Deadline
from splitserve.core.errors import DeadlineExceeded, EngineError, Limit, Overloaded, SplitserveError, Unavailable
from splitserve.core.fleet import Explanation, Phase, RunningRequest
from splitserve.core.model import ModelInfo
from splitserve.core.request import Chat, Chunk, GenerateRequest, Usage
from splitserve.core.sink import Sink
from splitserve.core.worker import Failure, Parse
from splitserve.router.alarm import Alarm
from splitserve.router.attempt import Attempt, MovedOn, Setback, Work
from splitserve.router.classes import SloClasses
from splitserve.router.departure import Departure
from splitserve.router.membership import Membership
from splitserve.router.move import Move
from splitserve.router.outflow import Outflow
from splitserve.router.output import Output
from splitserve.router.resume import finished_already
from splitserve.router.text import Text
from splitserve.router.timing import Stopwatch
from splitserve.router.transfers import Transfers
from splitserve.router.validate import Limits, check_prompt, check_request
from splitserve.router.waiting import Ask, Binding, WaitingRequests
from splitserve.routing.route import Need
from splitserve.telemetry import traces
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import RouterMetrics

_MOST_BROKEN_ENGINES = 2  # a request that breaks engines must not go through the whole fleet
_RETRY_SLOW_CLIENT_S = 1.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every journey of a router shares."""

    config: RouterConfig
    model: ModelInfo
    text: Text
    membership: Membership
    waiting: WaitingRequests
    metrics: RouterMetrics
    classes: SloClasses
    logger: Logger = field(default_factory=lambda: Logger("router"))
    tracer: traces.Tracer = field(default_factory=traces.Tracer)
    transfers: Transfers = field(default_factory=Transfers)

    @property
    def limits(self) -> Limits:
        """Of what the fleet can serve now."""
        model, fleet = self.model, self.membership
        most = fleet.token_limit or model.max_position_embeddings
        return Limits(model.name, model.vocab_size, most, fleet.loras, self.classes.names, self.config.limits)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a call allows all of a request's journeys: until when, and who is told of tokens as they are known; and the
    request's span."""

    deadline: Deadline
    charge: Callable[[int], None] = lambda tokens: None
    span: traces.Span = field(default_factory=traces.Span)


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


@dataclass(frozen=True, slots=True)
class Sibling:
    """What a journey starts with that makes another output for a prompt that has been read: `beside` is the worker that
    has its KV. `request.sampling` is this output's own, `max_tokens` filled in."""

    choice: int
    beside: str
    prompt: tuple[int, ...]
    arrived_at: float


class Journey:
    """`request.request_id` is set, `request.sampling.n` does not count."""

    def __init__(
        self, request: GenerateRequest, sink: Sink, around: Surroundings, terms: Terms, sibling: Sibling | None = None
    ) -> None:
        self._request = request
        self._terms = terms
        self._around = around
        self._sibling = sibling
        self._transfer_id = uuid4().hex
        self._output = Output(request.output, self._choice)
        self._outflow = Outflow(self._output, sink, request.request_id, around.config.chunk_gap_s)
        self._stopwatch = Stopwatch(arrived_at=sibling.arrived_at if sibling is not None else time.monotonic())
        self._blame = _Blame()
        self._attempt: Attempt | None = None
        self._decode_worker = ""
        self._stalled = False
        self.prompt: tuple[int, ...] = sibling.prompt if sibling is not None else ()
        self._sampling = request.sampling
        self._class = around.classes.of(DEFAULT_CLASS)
        self._first_token_due = inf
        self._asked: Ask | None = None  # for a route, the last time
        self._asked_at = 0.0

    async def travel(self) -> Chunk:
        """Returns the last chunk, sent like the others. Raises a SplitserveError in every other ending."""
        limits = self._around.limits
        if self._sibling is None:
            self._request = check_request(self._request, limits)
        stall_s = self._around.config.limits.client_stall_s
        self._class = self._around.classes.of(self._request.slo_class)
        self._stopwatch.watch_gaps = not isinf(self._class.slo.itl_p99_s)
        try:
            async with asyncio.timeout(self._terms.deadline.remaining_s) as time_left:
                with Alarm(lambda: self._outflow.sending_since + stall_s, partial(self._stall, time_left), stall_s):
                    if self._sibling is None:
                        await self._read(limits)
                    while self._output.finish_reason is None:
                        await self._go()
                    return await self._finish()
        except TimeoutError as error:
            if not self._stalled:
                self._judge(met=False)
            raise (self._too_slow() if self._stalled else self._too_late()) from error
        except (DeadlineExceeded, EngineError, Overloaded, Unavailable):
            self._judge(met=False)
            raise
        finally:
            del time_left  # has the task, whose error has this frame: all of the request, until a rare collection
            self._terms.charge(len(self._output.token_ids) - len(self._request.output))

    def sibling(self, choice: int, sink: Sink) -> "Journey":
        """Another output of this one's prompt, whose KV is at this one's decode worker now. Its seed is its own, as in
        vLLM: the request's plus `choice`."""
        sampling = replace(self._sampling, prompt_logprobs=None)
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + choice)
        known = Sibling(choice, self._decode_worker, self.prompt, self._stopwatch.arrived_at)
        return Journey(replace(self._request, sampling=sampling), sink, self._around, self._terms, known)

    def move(self, move: Move) -> None:
        """Takes the request to another decode worker; `move` hears what became of it."""
        if self._attempt is None:
            move.refuse("it waits for a route; ask again when it decodes")
        else:
            self._attempt.move(move)

    def explain(self) -> Explanation:
        """Why it has the workers that it has, or waits."""
        now, slo = time.monotonic(), self._class.slo
        place, waits_for = self._around.waiting.standing(self._asked) if self._asked is not None else (0, "")
        return Explanation(
            request_id=self._request.request_id,
            slo_class=self._class.name,
            priority=self._class.priority + self._request.priority,
            prompt_tokens=len(self.prompt),
            output_tokens=len(self._output.token_ids),
            since_s=now - self._stopwatch.arrived_at,
            ttft_s=slo.first_token_s(len(self.prompt)),
            tpot_s=slo.tpot_s,
            itl_p99_s=slo.itl_p99_s,
            place=place,
            waits_for=waits_for,
            decisions=self._stopwatch.decisions.told(now),
        )

    def status(self) -> RunningRequest:
        """Where it is."""
        attempt = self._attempt
        return RunningRequest(
            request_id=f"{self._request.request_id}#{self._choice}" if self._choice else self._request.request_id,
            slo_class=self._class.name,
            phase=attempt.phase if attempt is not None else Phase.WAITING,
            prompt_tokens=len(self.prompt),
            output_tokens=len(self._output.token_ids),
            since_s=time.monotonic() - self._stopwatch.arrived_at,
            prefill_worker=attempt.route[0] if attempt is not None else "",
            decode_worker=attempt.route[1] if attempt is not None else "",
        )

    @property
    def decode_worker(self) -> str:
        """The uuid of the worker that decodes it, or will; empty while it waits for one."""
        return self._attempt.decode_worker if self._attempt is not None else ""

    async def _go(self) -> None:
        """Waits for a route, and takes it, also to where it leads on."""
        ask, choice, number = self._ask(), self._choice, self._stopwatch.routes + 1
        self._asked, self._asked_at = ask, time.monotonic()
        with self._terms.span.child(traces.QUEUE_SPAN, traces.waits, number, choice, ask.need.tokens) as queue:
            async with self._around.waiting.bound(ask) as binding:
                queue.end()
                departure = await self._try(binding, None)
            while departure is not None and departure.binding is not None:
                departure = await self._try(departure.binding, departure)

    async def _try(self, binding: Binding, arriving: Departure | None) -> Departure | None:
        """One attempt. Returns the departure if the request is to go on at another worker."""
        if arriving is not None:
            self._asked_at = binding.bound_at
            self._first_token_due = self._since + self._class.slo.first_token_s(len(self.prompt))
        self._decode_worker = binding.decode.uuid
        self._stopwatch.bound(binding, moved=arriving is not None)
        decisions = self._stopwatch.decisions
        logger = self._around.logger
        decisions.bound(binding, self._asked_at, self._first_token_due, arriving is not None, logger)
        around, known = self._around, len(self._output.token_ids)
        with self._span_of(binding, moved=arriving is not None) as span:
            try:
                work = self._work(span)
                with Attempt(binding, work, around.membership, around.waiting, arriving) as self._attempt:
                    await self._attempt.run()
                span.note(traces.ending, str(self._output.finish_reason), len(self._output.token_ids) - known)
            except Setback as setback:
                decisions.ended(str(setback))
                span.note(traces.ending, setback.reason, len(self._output.token_ids) - known)
                self._learn(setback, span)
            except MovedOn as moved:
                decisions.ended("it was moved")
                span.note(traces.ending, Failure.MIGRATED.value, len(self._output.token_ids) - known)
                return moved.departure
            finally:
                self._attempt = None
        return None

    def _span_of(self, binding: Binding, moved: bool) -> traces.Span:
        """An attempt's."""
        number, decode, prefill = self._stopwatch.routes, binding.decode, binding.prefill
        return self._terms.span.call(traces.ATTEMPT_SPAN, traces.route, number, self._choice, decode, prefill, moved)

    def _learn(self, setback: Setback, span: traces.Span) -> None:
        """Finishes, goes on to the next attempt, or raises what the client is told."""
        self._around.metrics.attempt_failed(setback.reason)
        self._blame.take(setback)
        if setback.worker is not None and (setback.silent or setback.reason == Failure.ENGINE.value):
            self._around.membership.suspect(setback.worker)
        log = self._around.logger.info if setback.counts else self._around.logger.debug
        log("attempt failed", reason=setback.reason, sentence=str(setback), tokens=len(self._output.token_ids))
        if setback.counts:
            span.fail(setback.reason, str(setback))
        span.end()
        self._note_end()
        if self._output.finish_reason is not None:
            return
        most = self._around.config.max_attempts
        if self._blame.failures >= most or self._blame.broken_engines >= min(most, _MOST_BROKEN_ENGINES):
            raise setback.error
        if self._output.token_ids and setback.counts:
            self._around.metrics.resumed()

    def _note_end(self) -> None:
        """The output may have its end though no worker is there to say so."""
        eos = self._around.model.eos_token_ids
        self._output.finish_reason = finished_already(
            self._sampling, self._output.token_ids, eos, self._output.has_tool_calls and not self._forced_tool
        )

    @property
    def _forced_tool(self) -> str:
        """The function that must be called, if one was named: such an output ends like any other."""
        prompt = self._request.prompt
        return prompt.tool_choice.function if isinstance(prompt, Chat) else ""

    async def _finish(self) -> Chunk:
        usage = Usage(len(self.prompt), len(self._output.token_ids))
        made = usage.output_tokens - len(self._request.output)
        chunk = replace(
            self._output.take_chunk(self._request.request_id),
            finish_reason=self._output.finish_reason,
            usage=usage,
            timings=self._stopwatch.timings(made) if self._stopwatch.routes else None,
        )
        await self._outflow.send(chunk)
        if chunk.timings is not None:
            timings, gaps_p99_s = chunk.timings, self._stopwatch.gaps_p99_s(made)
            met = self._class.slo.allows(len(self.prompt), timings.ttft_s, timings.tpot_s, gaps_p99_s)
            self._judge(met, usage.output_tokens, timings.ttft_s, timings.tpot_s if made > 1 else None)
        return chunk

    def _judge(
        self, met: bool, output_tokens: int = 0, ttft_s: float | None = None, tpot_s: float | None = None
    ) -> None:
        """Once for every output that its client did not give up itself."""
        self._around.metrics.judged(self._class.name, met)
        self._around.classes.ended(self._class.name, met, output_tokens, ttft_s, tpot_s)

    # -------------------------------------------------------------------------------------------------------------
    async def _read(self, limits: Limits) -> None:
        """What the prompt is to the model, and what is left to generate: nothing, for an output that has its end."""
        prompt = self._request.prompt
        if isinstance(prompt, str | Chat):
            prompt = await self._around.text.token_ids(prompt, limits.prompt_tokens)
        self.prompt = prompt
        self._terms.charge(len(prompt))
        self._sampling = replace(check_prompt(self._request, prompt, limits), n=1)
        self._note_end()

    @property
    def _since(self) -> float:
        """From when its TTFT objective counts. One that goes on elsewhere has its first token already: the next is due
        as soon as a first one would be. Without an objective it keeps the place in the line that it arrived at."""
        goes_on = self._stopwatch.first_token_at is not None and not isinf(self._class.slo.ttft_s)
        return time.monotonic() if goes_on else self._stopwatch.arrived_at

    def _ask(self) -> Ask:
        """Jobs are not named by the request id: a client may use it again, here or at another router."""
        slo, known = self._class.slo, len(self._output.token_ids)
        since, first_token_s = self._since, slo.first_token_s(len(self.prompt))
        self._first_token_due = since + first_token_s
        assert self._sampling.max_tokens is not None
        return Ask(
            need=Need(
                tokens=len(self.prompt) + known,
                due=self._first_token_due,
                tpot_s=min(slo.tpot_s, slo.itl_p99_s),
                output_tokens=self._around.classes.output_tokens(
                    self._class.name, known, self._sampling.max_tokens - known
                ),
                avoid=self._blame.avoid,
                exclude=self._blame.exclude,
                alone=self._wants_prompt_logprobs,
                beside=self._sibling.beside if self._sibling is not None and not self._blame.failures else "",
                lora=self._request.lora,
                cached=self._cached,
            ),
            job_prefix=f"{self._transfer_id}/{self._stopwatch.routes + 1}",
            priority=self._class.priority + self._request.priority,
            arrived_at=since,
            first_token_s=first_token_s,
            refuses_late=self._class.name if self._class.refuses and self._sibling is None else "",
            failed_with=self._blame.last,
        )

    @property
    def _cached(self) -> dict[str, int]:
        """By worker, how much of what is to be read it has cached. With logprobs of the prompt all is computed."""
        if self._wants_prompt_logprobs:
            return {}
        tokens = (*self.prompt, *self._output.token_ids)
        return self._around.membership.cached_tokens(tokens, self._request.lora, self._request.cache_salt)

    def _work(self, span: traces.Span) -> Work:
        patience_s, prompt = self._request.inter_token_deadline_s, self._request.prompt
        return Work(
            request_id=self._request.request_id,
            prompt=self.prompt,
            sampling=self._sampling if self._wants_prompt_logprobs else replace(self._sampling, prompt_logprobs=None),
            priority=self._class.priority + self._request.priority,
            deadline=self._terms.deadline,
            inter_token_deadline_s=patience_s or self._around.config.inter_token_deadline_s,
            transfer_id=self._transfer_id,
            epoch=self._stopwatch.routes,
            output=self._output,
            stopwatch=self._stopwatch,
            transfers=self._around.transfers,
            outflow=self._outflow,
            most_unsent=self._around.config.limits.client_buffer_tokens,
            lora=self._request.lora,
            cache_salt=self._request.cache_salt,
            span=span,
            objectives=self._class.objectives(self._first_token_due - time.monotonic()),
            parse=Parse(prompt.tools, prompt.tool_choice) if isinstance(prompt, Chat) else None,
        )

    @property
    def _wants_prompt_logprobs(self) -> bool:
        """vLLM skips KV from elsewhere for them. Once they are out the request may go on like any other."""
        return self._sampling.prompt_logprobs is not None and len(self._output.token_ids) == len(self._request.output)

    @property
    def _choice(self) -> int:
        return self._sibling.choice if self._sibling is not None else 0

    # The client --------------------------------------------------------------------------------------------------
    def _stall(self, time_left: asyncio.Timeout) -> None:
        """The client takes nothing: the request's time is over."""
        self._stalled = True
        time_left.reschedule(asyncio.get_running_loop().time())

    def _too_slow(self) -> Overloaded:
        sentence = (
            f"the client took nothing for {self._around.config.limits.client_stall_s:g} s; read the stream faster"
        )
        return Overloaded(sentence, _RETRY_SLOW_CLIENT_S, Limit.SLOW_CLIENT)

    def _too_late(self) -> DeadlineExceeded:
        count, last = len(self._output.token_ids), self._blame.last
        stage = "while it waited for a worker" if self._stopwatch.routes == 0 else f"after {count} tokens"
        cause = f"; before that: {last}" if last is not None else ""
        return DeadlineExceeded(f"deadline_s: the request's time ran out {stage}; allow more{cause}")
