"""Requests that have no route yet. They wait here and not in a worker, so that no decode block is held meanwhile.

In the order of `routing/line`: what can't go now holds up whatever is behind it, so a long prompt never starves. Only a
request that must avoid certain workers is passed by, and one that would be late by those that would not. One object on
the router's event loop; `pump` never awaits. A route is bound late and its promise to the workers is given back on
every ending.
"""

import asyncio
import time
from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from math import inf, isinf
from random import Random

from splitserve.core.errors import Limit, Overloaded, SplitserveError, Unavailable
from splitserve.core.worker import Pool, Ticket, WorkerInfo
from splitserve.routing.fleet import Fleet
from splitserve.routing.line import Place
from splitserve.routing.mix import Mix
from splitserve.routing.policy import choose, choose_target
from splitserve.routing.promise import Promise
from splitserve.routing.route import AS_IT_IS, Need, NoRoute, Route, Wait

_SHORTEST_RETRY_S = 0.5
_LONGEST_RETRY_S = 30.0
_NEW_GAP_WEIGHT = 0.1  # of the moving mean of the time between two bindings


@dataclass(frozen=True, slots=True)
class Ask:
    """One attempt's wish. `job_prefix` is unique among all attempts. `first_token_s` is the request's TTFT objective;
    `refuses_late` names its SLO class, if that says to refuse who would miss it. `failed_with` is how the attempt
    before it failed: such a request is refused neither for want of room nor for being late, and if no worker is left
    that is what it hears."""

    need: Need
    job_prefix: str
    priority: int
    arrived_at: float
    first_token_s: float = inf
    refuses_late: str = ""
    failed_with: SplitserveError | None = None

    @property
    def may_refuse(self) -> bool:
        """It is refused, rather than served late."""
        return bool(self.refuses_late) and self.failed_with is None and not isinf(self.need.due)


@dataclass(frozen=True, slots=True)
class Binding:
    """A bound route. `prefill` is None where the decode worker computes the prompt itself, or takes the KV over from
    another decode worker under `takeover`. If it was chosen by what it takes, `read_s` and `ttft_s` are the seconds
    predicted from then until the prompt is read and the first token out. `behind`: how many still waited then."""

    decode: WorkerInfo
    prefill: WorkerInfo | None
    job_prefix: str
    bound_at: float
    takeover: Ticket | None = None
    read_s: float = 0.0
    ttft_s: float = 0.0
    behind: int = 0

    @property
    def is_predicted(self) -> bool:
        return self.ttft_s > 0.0

    @property
    def computes_prompt(self) -> bool:
        """Whether the decode worker does."""
        return self.prefill is None and self.takeover is None

    @property
    def decode_job_id(self) -> str:
        return f"{self.job_prefix}/decode"

    @property
    def prefill_job_id(self) -> str:
        return f"{self.job_prefix}/prefill"


@dataclass(slots=True, order=True)
class _Waiter:
    place: Place
    ask: Ask = field(compare=False)
    bound: asyncio.Future[Binding] = field(compare=False)


class WaitingRequests:
    def __init__(self, fleet: Fleet, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._limit = limit
        self._clock = clock
        self._random = Random()
        self._mix = Mix()
        self._waiters: list[_Waiter] = []
        self._picky: dict[Need, list[_Waiter]] = {}  # by what they want, their tokens apart
        self._number = 0
        self._last_bound_at: float | None = None
        self._bind_gaps, self._bind_gap_s = 0, 0.0

    def __len__(self) -> int:
        return len(self._waiters) + sum(map(len, self._picky.values()))

    @property
    def pace_s(self) -> float:
        """Seconds between two that were bound of late while others waited; 0 before."""
        return self._bind_gap_s

    @asynccontextmanager
    async def bound(self, ask: Ask) -> AsyncIterator[Binding]:
        """Waits for a route and holds its promise until the jobs are sent or the block is left. Raises Overloaded if
        too many wait and where who would be late is refused, Unavailable if no live worker can ever serve it."""
        waiter = self._enter(ask)
        try:
            self.pump()
            yield await self._bound(waiter)
        finally:
            self._leave(waiter)

    async def _bound(self, waiter: _Waiter) -> Binding:
        ask = waiter.ask
        if not ask.may_refuse:
            return await waiter.bound
        try:
            async with asyncio.timeout(max(0.0, ask.need.due - self._clock())):
                return await waiter.bound
        except TimeoutError as error:
            raise self._too_late(ask) from error

    def standing(self, ask: Ask) -> tuple[int, str]:
        """Its place in the line, from 1, and what it waits for; 0 if it does not wait."""
        lines = (self._waiters, *self._picky.values())
        waiter = next((each for line in lines for each in line if each.ask is ask), None)
        if waiter is None or waiter.bound.done():
            return 0, ""
        ahead = sum(bisect_left(line, waiter.place, key=_place) for line in lines)
        if self._queue_of(ask.need)[0] is not waiter:
            return ahead + 1, "for those ahead of it to go"
        wanted = "a worker that it may have" if ask.need.picky else "a worker"
        if ask.need.has_objectives:
            return ahead + 1, f"for {wanted} that takes it now and serves it and everyone there well enough"
        return ahead + 1, f"for {wanted} that takes it now"

    @contextmanager
    def target(self, source: WorkerInfo, tokens: int, job_prefix: str, wanted: str | None) -> Iterator[Binding | None]:
        """A worker that takes over a decode of so many tokens from `source` now, promised until the block is left or
        its job is sent; None if there is none."""
        uuid = choose_target(self._fleet.candidates(self._clock()), tokens, source.uuid, wanted)
        if uuid is None:
            yield None
            return
        binding = Binding(self._fleet.worker(uuid), None, job_prefix, self._clock())
        self._fleet.promise(uuid, binding.decode_job_id, Promise(Pool.DECODE, tokens, waits_for_kv=True))
        try:
            yield binding
        finally:
            self._withdraw(binding)

    def pump(self) -> None:
        """Binds whatever can go now. To be called whenever a worker's grant or the fleet has changed."""
        lines = [line for line in self._picky.values() if line]
        while lines:
            line = min(lines, key=lambda each: each[0])
            if goes := self._settle(line[0], self._choose(line[0].ask.need)):
                del line[0]
            lines = [each for each in lines if each and (goes or each is not line)]
        while self._waiters and self._go_first():
            pass

    def _go_first(self) -> bool:
        """Whether the first in the line needs not wait any more, or lets others pass."""
        waiter = self._waiters[0]
        choice = self._choose(waiter.ask.need) if not waiter.bound.done() else None
        if isinstance(choice, Route) and len(self._waiters) > 1 and not waiter.ask.may_refuse:
            behind = waiter.place.after(self._clock() + choice.ttft_s)
            if behind is not waiter.place:
                del self._waiters[0]
                waiter.place = behind
                insort(self._waiters, waiter)
                return True
        goes = self._settle(waiter, choice)
        if goes:
            del self._waiters[0]
        return goes

    def _enter(self, ask: Ask) -> _Waiter:
        if len(self) >= self._limit and ask.failed_with is None:
            sentence = f"{len(self)} requests are waiting, the most this router keeps"
            raise Overloaded(sentence, self._retry_after_s(), Limit.QUEUE)
        self._number += 1
        if ask.need.has_objectives:
            self._mix.add(ask.need, ask.first_token_s)
        place = Place.of(ask.priority, ask.arrived_at, ask.first_token_s, self._number)
        if self._is_late(ask, self._turn_in_s(place)):
            raise self._too_late(ask)
        waiter = _Waiter(place, ask, asyncio.get_running_loop().create_future())
        insort(self._queue_of(ask.need), waiter)
        return waiter

    def _leave(self, waiter: _Waiter) -> None:
        queue = self._queue_of(waiter.ask.need)
        at = bisect_left(queue, waiter)
        if at < len(queue) and queue[at] is waiter:
            del queue[at]
        if not queue and waiter.ask.need.picky:
            self._picky.pop(_kind(waiter.ask.need), None)
        if waiter.bound.done() and not waiter.bound.cancelled() and waiter.bound.exception() is None:
            self._withdraw(waiter.bound.result())
        if not len(self):
            self._last_bound_at = None
        self.pump()

    def _queue_of(self, need: Need) -> list[_Waiter]:
        """A worker that is lost leaves hundreds of requests that avoid it: they wait in one line, for each look at a
        fleet costs as much as the next."""
        return self._picky.setdefault(_kind(need), []) if need.picky else self._waiters

    def _settle(self, waiter: _Waiter, choice: Route | Wait | NoRoute | None) -> bool:
        """Whether the waiter need not wait any more."""
        if not waiter.bound.done():
            if isinstance(choice, Route) and self._is_late(waiter.ask, choice.ttft_s):
                waiter.bound.set_exception(self._too_late(waiter.ask))
            elif isinstance(choice, Route):
                waiter.bound.set_result(self._bind(choice, waiter.ask))
            elif isinstance(choice, NoRoute):
                waiter.bound.set_exception(waiter.ask.failed_with or Unavailable(choice.reason))
            else:
                return False
        return True

    def _choose(self, need: Need) -> Route | Wait | NoRoute:
        now = self._clock()
        seen = self._fleet.sample(now, self._random, need.wanted)
        split = self._fleet.split(self._mix, seen, need.tpot_s) if need.has_objectives else AS_IT_IS
        choice = choose(seen, need, now, split)
        if isinstance(choice, NoRoute):  # a sample can't say that nobody is left
            return choose(self._fleet.candidates(now), need, now)
        return choice

    def _bind(self, route: Route, ask: Ask) -> Binding:
        binding = Binding(
            decode=self._fleet.worker(route.decode),
            prefill=self._fleet.worker(route.prefill) if route.prefill is not None else None,
            job_prefix=ask.job_prefix,
            bound_at=self._clock(),
            read_s=route.read_s,
            ttft_s=route.ttft_s,
            behind=len(self) - 1,
        )
        tokens, cached = ask.need.tokens, ask.need.cached.get(route.reader, 0)
        read_s = route.read_s or self._fleet.read_s(route.reader, tokens, cached, binding.bound_at)
        self._fleet.reads_until(route.reader, binding.bound_at + read_s)
        decode = Promise(Pool.DECODE, tokens, waits_for_kv=route.prefill is not None)
        self._fleet.promise(route.decode, binding.decode_job_id, decode)
        if route.prefill is not None:
            self._fleet.promise(route.prefill, binding.prefill_job_id, Promise(Pool.PREFILL, tokens))
        self._note_bound(binding.bound_at)
        return binding

    def _withdraw(self, binding: Binding) -> None:
        self._fleet.withdraw(binding.decode.uuid, binding.decode_job_id)
        if binding.prefill is not None:
            self._fleet.withdraw(binding.prefill.uuid, binding.prefill_job_id)

    def _note_bound(self, now: float) -> None:
        """The gap to the next counts if there is somebody to bind all the while."""
        if self._last_bound_at is not None:
            self._bind_gaps += 1
            weight = max(_NEW_GAP_WEIGHT, 1.0 / self._bind_gaps)  # the plain mean until enough are known
            self._bind_gap_s += weight * (now - self._last_bound_at - self._bind_gap_s)
        self._last_bound_at = now if len(self) > 1 else None

    def _turn_in_s(self, place: Place) -> float:
        """When those before this place will have gone, at the pace of late."""
        lines = (self._waiters, *self._picky.values())
        return self._bind_gap_s * sum(bisect_left(line, place, key=_place) for line in lines)

    def _is_late(self, ask: Ask, after_s: float) -> bool:
        """Whether it is to be refused, if its first token takes so long from now."""
        return ask.may_refuse and self._clock() + after_s > ask.need.due

    def _too_late(self, ask: Ask) -> Overloaded:
        sentence = (
            f"slo_class {ask.refuses_late}: the first token would come later than the {ask.first_token_s:.2f} s it "
            f"allows; {len(self)} requests are waiting"
        )
        return Overloaded(sentence, self._retry_after_s(), Limit.SLO_CLASS)

    def _retry_after_s(self) -> float:
        """When the queue will have moved by half, at the pace of late."""
        return min(_LONGEST_RETRY_S, max(_SHORTEST_RETRY_S, self._bind_gap_s * len(self) / 2))


def _place(waiter: _Waiter) -> Place:
    return waiter.place


def _kind(need: Need) -> Need:
    """What makes two requests wait in the same line."""
    return replace(need, tokens=0, due=inf, tpot_s=inf, output_tokens=1, cached={})
