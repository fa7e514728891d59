"""One attempt to serve a request on one bound route: its jobs out, their deltas in, both cancelled on every ending.

In push mode the decode job goes first and the prefill job at once after it; in pull mode the decode job follows the
prefill's handover. An attempt decides nothing about the next one: it ends with the output finished, or with a `Setback`
that says whose fault it was. Deltas of other attempts can't come here: each has its own mailbox.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from types import TracebackType
from typing import Self

from splitserve.core.deadline import Deadline
from splitserve.core.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    Limit,
    Overloaded,
    SplitserveError,
    Unavailable,
)
from splitserve.core.fleet import Phase
from splitserve.core.request import SamplingParams
from splitserve.core.worker import (
    DecodeJob,
    Delta,
    Failure,
    KvMode,
    Objectives,
    Outcome,
    Parse,
    PrefillJob,
    Ticket,
    WorkerInfo,
)
from splitserve.router.alarm import Alarm
from splitserve.router.departure import Decoding, Departure
from splitserve.router.mailbox import Event, Lost, Mailbox, Order, Overfull
from splitserve.router.membership import Membership
from splitserve.router.move import Move, Moved
from splitserve.router.outflow import Outflow
from splitserve.router.output import Output
from splitserve.router.timing import Stopwatch
from splitserve.router.transfers import Transfers
from splitserve.router.waiting import Binding, WaitingRequests
from splitserve.telemetry import traces

SLOW_CLIENT = "slow_client"  # a setback that is nobody's fault but the client's
_READ_ON_S = 1.0
_SETTLE_S = 0.5  # The first tokens may be out before the prefill worker has said how much KV it moved.

_ERRORS: Mapping[Failure, type[SplitserveError]] = {
    Failure.NOT_NOW: Unavailable,
    Failure.TRANSFER: Unavailable,
    Failure.CANCELLED: Unavailable,
    Failure.MIGRATED: Unavailable,
    Failure.ENGINE: EngineError,
}


class Setback(Exception):
    """The attempt failed, the request need not. `worker` is the uuid of the one at fault, if any; `silent` says that it
    must not get this request again; a full worker is nobody's fault, a slow client no worker's."""

    def __init__(self, reason: str, error: SplitserveError, worker: str | None, *, silent: bool = False) -> None:
        super().__init__(str(error))
        self.reason = reason
        self.error = error
        self.worker = worker
        self.silent = silent

    @property
    def counts(self) -> bool:
        return self.reason not in (Failure.NOT_NOW.value, SLOW_CLIENT)


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done, the same for every attempt but for `epoch` and `span`. `most_unsent` tokens may wait for a
    client that does not read."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    priority: int
    deadline: Deadline
    inter_token_deadline_s: float
    transfer_id: str
    epoch: int
    output: Output
    stopwatch: Stopwatch
    transfers: Transfers
    outflow: Outflow
    most_unsent: float = inf
    lora: str = ""
    cache_salt: str = ""
    span: traces.Span = field(default_factory=traces.Span)
    objectives: Objectives = field(default_factory=Objectives)  # from the dispatch on
    parse: Parse | None = None


class MovedOn(Exception):
    """The decode has stopped where it was to go on at `departure.binding`, whose promise is still held."""

    def __init__(self, departure: Departure) -> None:
        super().__init__()
        self.departure = departure


class Attempt:
    """`with Attempt(...) as attempt: await attempt.run()`. `arriving`: the order that brought the request here."""

    def __init__(
        self,
        binding: Binding,
        work: Work,
        membership: Membership,
        waiting: WaitingRequests,
        arriving: Departure | None = None,
    ) -> None:
        self._binding = binding
        self._work = work
        self._membership = membership
        self._waiting = waiting
        self._arriving = arriving
        self._departure: Departure | None = None
        self._departures = 0
        self._mailbox = Mailbox(work.most_unsent, self._stop_for_client, self._pass_on)
        self._prefilling = binding.prefill is not None
        self._has_tokens = False
        self._decode_job_id = binding.decode_job_id
        self._sign_at = time.monotonic()

    def __enter__(self) -> Self:
        self._work.outflow.wake = self._mailbox.ring
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancel_jobs()
        self._work.outflow.rest()
        self._mailbox.close()
        reason = f"it is tried elsewhere: {error}" if isinstance(error, Setback) else "it ended before it had moved"
        for event in self._mailbox.left():
            if isinstance(event, Order):
                event.move.refuse("it is on its way to another worker" if isinstance(error, MovedOn) else reason)
        if self._departure is not None and not isinstance(error, MovedOn):
            self._departure.close(reason)
        if self._arriving is not None:
            self._arriving.close("the worker that it moved to failed; the request goes on elsewhere")

    async def run(self) -> None:
        """Returns when the output is finished. Raises Setback, MovedOn, or InvalidRequest if a worker finds fault with
        the request itself."""
        with Alarm(lambda: self._watched()[1], self._mailbox.ring, self._work.inter_token_deadline_s):
            self._dispatch()
            while self._work.output.finish_reason is None:
                events = await self._mailbox.take()
                if events or self._work.output.has_unsent:
                    await self._take(events)
                else:
                    self._check_silence()
        await self._settle()

    def move(self, move: Move) -> None:
        """Takes the request to another worker, in its turn among the events."""
        self._mailbox.put(Order(move))

    @property
    def decode_worker(self) -> str:
        return self._binding.decode.uuid

    @property
    def route(self) -> tuple[str, str]:
        """Who reads the prompt, empty if the other one does or has its KV; and who decodes. Names."""
        return self._binding.prefill.name if self._binding.prefill is not None else "", self._binding.decode.name

    @property
    def phase(self) -> Phase:
        if self._has_tokens:
            return Phase.DECODE
        return Phase.PREFILL if self._prefilling or self._binding.computes_prompt else Phase.TRANSFER

    # Jobs out ----------------------------------------------------------------------------------------------------
    def _dispatch(self) -> None:
        if self._binding.prefill is None or self._binding.decode.kv.mode is KvMode.PUSH:
            self._send_decode(b"")
        if self._binding.prefill is not None:
            self._send_prefill(self._binding.prefill)

    def _send_decode(self, handover: bytes) -> None:
        work = self._work
        job = DecodeJob(
            job_id=self._binding.decode_job_id,
            request_id=work.request_id,
            prompt=work.prompt,
            sampling=work.sampling,
            deadline_s=work.deadline.remaining_s,
            output=tuple(work.output.token_ids),
            ticket=self._ticket(self._binding.prefill, handover)
            if self._binding.prefill is not None
            else self._binding.takeover,
            priority=work.priority,
            lora=work.lora,
            cache_salt=work.cache_salt,
            traceparent=work.span.traceparent,
            objectives=work.objectives,
            parse=work.parse,
        )
        self._membership.send(self._binding.decode.uuid, job, self._mailbox)

    def _send_prefill(self, prefill: WorkerInfo) -> None:
        work = self._work
        job = PrefillJob(
            job_id=self._binding.prefill_job_id,
            request_id=work.request_id,
            prompt=(*work.prompt, *work.output.token_ids),
            ticket=self._ticket(prefill, b""),
            deadline_s=work.deadline.remaining_s,
            priority=work.priority,
            lora=work.lora,
            cache_salt=work.cache_salt,
            traceparent=work.span.traceparent,
            objectives=work.objectives,
        )
        self._membership.send(prefill.uuid, job, self._mailbox)

    def _ticket(self, prefill: WorkerInfo, handover: bytes) -> Ticket:
        return Ticket(
            transfer_id=self._work.transfer_id,
            epoch=self._work.epoch,
            source=prefill.kv_peers,
            destination=self._binding.decode.kv_peers,
            handover=handover,
        )

    # Nearly every token ------------------------------------------------------------------------------------------
    def _pass_on(self, delta: Delta) -> bool:
        """A delta in mid-stream that needs no thought goes to the client at once, and no task is woken for it."""
        work = self._work
        if not self._has_tokens or work.outflow.sending or delta.outcome is not None or not delta.token_ids:
            return False
        if delta.job_id != self._decode_job_id or delta.index != len(work.output.token_ids):
            return False
        self._sign_at = now = time.monotonic()
        work.stopwatch.tokens(now)
        work.outflow.pass_on(delta, now)
        return True

    # Events in ---------------------------------------------------------------------------------------------------
    async def _take(self, events: list[Event]) -> None:
        """What came before a setback is the client's. What came after it is put back: an order must be answered."""
        setback: Exception | None = None
        coming = iter(events)
        try:
            for event in coming:
                self._on(event)
        except (Setback, MovedOn, SplitserveError) as error:
            setback = error
            self._mailbox.put_back(coming)
        work = self._work
        if setback is not None or (work.output.finish_reason is None and work.outflow.is_due(time.monotonic())):
            await work.outflow.flush()
        if setback is not None:
            try:
                raise setback
            finally:
                setback = None  # or it and this frame hold each other, and all of the request, until a rare collection

    def _on(self, event: Event) -> None:
        decodes = event.job_id == self._decode_job_id
        if isinstance(event, Order):
            self._depart(event.move)
        elif isinstance(event, Overfull):
            error = Overloaded("the client reads too slowly", _READ_ON_S, Limit.SLOW_CLIENT)
            raise Setback(SLOW_CLIENT, error, None)
        elif self._departure is not None and event.job_id == self._departure.copy_job_id:
            self._on_copy(event, self._departure)
        elif isinstance(event, Lost):
            self._on_lost(event, decodes)
        elif decodes:
            self._on_decode(event)
        elif event.outcome is not None:
            self._on_prefill(event.outcome)

    def _on_lost(self, lost: Lost, decodes: bool) -> None:
        if not decodes:
            pending, self._prefilling = self._prefilling, False
            if self._has_tokens or (not pending and self._binding.decode.kv.mode is KvMode.PUSH):
                return  # its KV has arrived
        worker = self._binding.decode if decodes or self._binding.prefill is None else self._binding.prefill
        raise Setback("lost", Unavailable(f"worker {worker.name} is gone: {lost.reason}"), worker.uuid)

    def _on_decode(self, delta: Delta) -> None:
        try:
            new_tokens = self._work.output.accept(delta)
        except EngineError as error:
            raise Setback("engine", error, self._binding.decode.uuid) from error
        outcome = delta.outcome
        finished = outcome is not None and outcome.finish_reason is not None
        if new_tokens or (finished and not self._has_tokens):
            now = time.monotonic()
            if not self._has_tokens:
                self._begins(now)
            self._sign_at = now
            self._work.stopwatch.tokens(now)
        if outcome is not None:
            self._work.output.finish_reason = outcome.finish_reason
            if outcome.failure is Failure.MIGRATED and self._departure is not None:
                raise MovedOn(self._departure)
            if not finished:
                raise self._setback(outcome, self._binding.decode)

    def _begins(self, now: float) -> None:
        """The first tokens of this attempt are here."""
        if self._arriving is not None:
            self._arrived(self._arriving, now)
        self._has_tokens = True
        self._work.stopwatch.decisions.begins(now)
        self._work.span.event(traces.FIRST_TOKEN, traces.nothing)

    def _on_prefill(self, outcome: Outcome) -> None:
        self._prefilling = False
        assert self._binding.prefill is not None
        if outcome.failure is None:
            self._sign_at = time.monotonic()
            self._work.stopwatch.prefilled(self._binding, outcome, self._sign_at)
            if outcome.transfer is not None:
                self._work.transfers.arrived(*self.route, outcome.transfer)
            if self._binding.decode.kv.mode is KvMode.PULL:
                self._send_decode(outcome.handover)
        elif not self._has_tokens:
            raise self._setback(outcome, self._binding.prefill)

    def _setback(self, outcome: Outcome, worker: WorkerInfo) -> Exception:
        failure = outcome.failure or Failure.ENGINE
        if failure is Failure.INVALID:
            return InvalidRequest(outcome.field or "request", outcome.message)
        if failure is Failure.TRANSFER:
            worker = self._kv_source or worker  # whoever noticed: without this source the next route may do
            self._work.transfers.failed(worker.name, self._binding.decode.name)
        error = _ERRORS[failure](f"worker {worker.name}: {outcome.message or failure.value}")
        return Setback(failure.value, error, worker.uuid)

    @property
    def _kv_source(self) -> WorkerInfo | None:
        return self._arriving.source if self._arriving is not None else self._binding.prefill

    # Moving ------------------------------------------------------------------------------------------------------
    def _depart(self, move: Move) -> None:
        reason = self._unmovable()
        if reason:
            move.refuse(reason)
            return
        work = self._work
        self._departures += 1
        decoding = Decoding(
            job_id=self._binding.decode_job_id,
            request_id=work.request_id,
            worker=self._binding.decode,
            sampling=work.sampling,
            prompt=work.prompt,
            output=tuple(work.output.token_ids),
            deadline_s=work.deadline.remaining_s,
            priority=work.priority,
            name=f"{work.transfer_id}/{work.epoch}/move-{self._departures}",
            lora=work.lora,
            cache_salt=work.cache_salt,
        )
        self._departure = Departure(move, decoding, self._waiting, self._membership)
        self._stays(self._departure.start(self._mailbox))

    def _unmovable(self) -> str:
        """Why it can't leave now; another time it may."""
        if not self._has_tokens:
            return "it has not begun to decode; ask again when it has"
        if self._work.output.finish_reason is not None:
            return "it has ended"
        if self._departure is not None:
            return "it is on its way to another worker already"
        return ""

    def _on_copy(self, event: Delta | Lost, departure: Departure) -> None:
        """The target has what was copied, or could not have it: then all of it goes at the stop. A target that failed
        otherwise gets no more."""
        if isinstance(event, Lost):
            self._stays(f"worker {departure.target} is gone: {event.reason}")
        elif event.outcome is not None and event.outcome.failure in (None, Failure.TRANSFER):
            self._stays(departure.stop(len(self._work.prompt) + len(self._work.output.token_ids)))
        elif event.outcome is not None:
            self._stays(f"worker {departure.target}: {event.outcome.message}; try again later")

    def _stays(self, reason: str) -> None:
        """If there is a reason, that is the end of the departure."""
        if reason and self._departure is not None:
            departure, self._departure = self._departure, None
            departure.close(reason)

    def _arrived(self, arriving: Departure, now: float) -> None:
        stall_s = now - self._work.stopwatch.last_token_at
        arriving.move.done(Moved(arriving.source.name, self._binding.decode.name, stall_s))

    # A client that does not read ---------------------------------------------------------------------------------
    def _stop_for_client(self) -> None:
        """Whatever the workers have made since the client took something would have to be kept: they are to stop."""
        if self._work.outflow.sending:
            self._cancel_jobs()
            self._mailbox.put(Overfull())

    def _cancel_jobs(self) -> None:
        self._membership.cancel(self._binding.decode_job_id)
        self._membership.cancel(self._binding.prefill_job_id)

    # Time --------------------------------------------------------------------------------------------------------
    def _check_silence(self) -> None:
        worker, silent_at = self._watched()
        if silent_at <= time.monotonic():
            raise self._silence(worker)

    def _watched(self) -> tuple[WorkerInfo, float]:
        """The worker whose turn it is, and when it counts as silent: long prompts may keep one busy, but a busy worker
        does something for someone."""
        decode, prefill = self._binding.decode, self._binding.prefill
        worker = prefill if prefill is not None and self._prefilling and not self._has_tokens else decode
        computes_prompt = not self._has_tokens and (worker is prefill or self._binding.computes_prompt)
        active_at = self._membership.active_at(worker.uuid) if computes_prompt else self._sign_at
        return worker, max(self._sign_at, active_at) + self._work.inter_token_deadline_s

    def _silence(self, worker: WorkerInfo) -> Setback:
        patience_s = self._work.inter_token_deadline_s
        sentence = f"inter_token_deadline_s: nothing came from worker {worker.name} for {patience_s:g} s"
        return Setback("silent", DeadlineExceeded(sentence), worker.uuid, silent=True)

    async def _settle(self) -> None:
        """The tokens go out; the last chunk waits a moment for what the prefill worker has to say."""
        if not self._prefilling:
            return
        await self._work.outflow.flush()
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while self._prefilling:
                    for event in await self._mailbox.take():
                        self._on(event)
