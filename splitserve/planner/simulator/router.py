"""The simulated router: requests wait here in order of arrival until the router's own `routing/policy` finds a route.

The fleet's state is the workers' own: a simulated worker's word takes no time to arrive. A request longer than every
worker takes is refused on arrival and never ends; nor does the rest of its session. A session's next turn comes when
the one before it has ended, and its pause.
"""

from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from random import Random
from typing import TYPE_CHECKING

from splitserve.core.slo import Slo
from splitserve.planner.simulator.clock import Clock
from splitserve.planner.simulator.journal import NEVER, Journal
from splitserve.planner.simulator.prefix_cache import Change, KnownPrefixes
from splitserve.routing.candidate import Candidate
from splitserve.routing.line import Place
from splitserve.routing.mix import Mix
from splitserve.routing.policy import choose
from splitserve.routing.route import AS_IT_IS, Need, Route, Split
from splitserve.routing.sample import WHOLE, Sample
from splitserve.workload.requests import Prefixes

if TYPE_CHECKING:
    from splitserve.planner.simulator.worker import Worker


class Router:
    """`workers` may be empty until `start`: workers and router know each other."""

    def __init__(self, clock: Clock, journal: Journal, seed: int, slo: Slo | None) -> None:
        self._clock = clock
        self._journal = journal
        self._random = Random(seed)
        self._slo = slo
        self._waiting: list[tuple[Place, int]] = []  # a heap; with each request
        self._arrived = 0
        self._output_tokens = round(sum(journal.output) / max(1, len(journal.output)))
        self._workers: dict[str, Worker] = {}
        self._candidates: list[Candidate] = []
        self._sample: Sample | None = None  # of a large fleet
        self._mix = Mix()
        self._longest = 0
        self._firsts: Iterator[int] = iter(())
        self._prefixes: KnownPrefixes | None = None

    def start(self, workers: Sequence["Worker"], firsts: Iterable[int], prefixes: Prefixes | None) -> None:
        """`firsts`: the requests that follow no other, in order of arrival. `prefixes`: what the router knows them by;
        None: it does not heed them."""
        self._workers = {worker.candidate.info.uuid: worker for worker in workers}
        self._candidates = [worker.candidate for worker in workers]
        if len(workers) > WHOLE:
            self._sample = Sample()
            for candidate in self._candidates:
                self._sample.put(candidate)
        if prefixes is not None:
            self._prefixes = KnownPrefixes(prefixes, self._workers)
        self._longest = min(worker.longest for worker in workers)
        self._firsts = iter(firsts)
        self._expect()

    def ended(self, request: int) -> None:
        """Its last token is out. The next turn of its session, if there is one, comes after the pause."""
        journal = self._journal
        following = journal.next_turn[request]
        if following >= 0:
            journal.arrival[following] = self._clock.now + journal.pause[following]
            self._clock.at(journal.arrival[following], self._arrive, following)

    def _expect(self) -> None:
        """One at a time: the clock's heap stays small."""
        request = next(self._firsts, None)
        if request is not None:
            self._clock.at(self._journal.arrival[request], self._first, request)

    def _first(self, request: int) -> None:
        self._expect()
        self._arrive(request)

    def _arrive(self, request: int) -> None:
        journal = self._journal
        if journal.prompt[request] + journal.output[request] > self._longest:
            return
        self._arrived += 1
        place = Place.of(0, journal.arrival[request], self._first_token_s(request), self._arrived)
        journal.due[request] = place.due
        if self._slo is not None:
            self._mix.add(self._need(request), self._first_token_s(request))
        heappush(self._waiting, (place, request))
        if self._slo is not None or len(self._waiting) == 1:
            self._pump()

    def changed(self, worker: "Worker") -> None:
        """The worker has more room than before."""
        self._changed(worker)
        if self._waiting:
            self._pump()

    def cached(self, worker: "Worker", change: Change) -> None:
        """What the worker has in its prefix cache has changed."""
        if self._prefixes is not None:
            self._prefixes.told(worker.candidate.info.uuid, change)

    def _changed(self, worker: "Worker") -> None:
        worker.candidate.changed()
        if self._sample is not None:
            self._sample.put(worker.candidate)

    def _first_token_s(self, request: int) -> float:
        """Its objective."""
        slo = self._slo
        return NEVER if slo is None else slo.first_token_s(self._journal.prompt[request])

    def _pump(self) -> None:
        """Binds from the front, as the router does: what can't go holds up what is behind it."""
        waiting = self._waiting
        while waiting:
            place, request = waiting[0]
            need = self._need(request)
            seen = self._look(need)
            route = choose(seen, need, self._clock.now, self._split(seen, need))
            if not isinstance(route, Route):
                return
            heappop(waiting)
            behind = place.after(self._clock.now + route.ttft_s)
            if waiting and behind is not place:
                heappush(waiting, (behind, request))
            else:
                self._bind(request, route)

    def _need(self, request: int) -> Need:
        journal, slo = self._journal, self._slo
        cached = self._prefixes.cached(request) if self._prefixes is not None else {}
        if slo is None:
            return Need(journal.prompt[request], cached=cached)
        due, tpot_s = journal.due[request], slo.tpot_s
        return Need(journal.prompt[request], due=due, tpot_s=tpot_s, output_tokens=self._output_tokens, cached=cached)

    def _split(self, seen: Sequence[Candidate], need: Need) -> Split:
        if self._slo is None:
            return AS_IT_IS
        if self._sample is not None:
            return self._mix.split(seen, self._sample.workers, self._sample.decoding, need.tpot_s)
        return self._mix.split(seen, len(seen), sum(each.decodes > 0 for each in seen), need.tpot_s)

    def _look(self, need: Need) -> list[Candidate]:
        if self._sample is None:
            return self._candidates
        return self._sample.draw(self._random) + [self._workers[uuid].candidate for uuid in need.wanted]

    def _bind(self, request: int, route: Route) -> None:
        journal, decode = self._journal, self._workers[route.decode]
        journal.bound[request] = self._clock.now
        if self._prefixes is not None:
            self._prefixes.forget(request)
        journal.decode_worker[request] = decode.number
        self._workers[route.reader].candidate.read_until = self._clock.now + route.read_s
        if route.prefill is None:
            decode.compute(request)
        else:
            prefill = self._workers[route.prefill]
            journal.prefill_worker[request] = prefill.number
            decode.park(request)
            prefill.compute(request, decode)
            self._changed(prefill)
        self._changed(decode)
