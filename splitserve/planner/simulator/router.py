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
from splitserve.core.worker import Pool
from splitserve.planner.simulator.clock import Clock
from splitserve.planner.simulator.journal import NEVER, Journal
from splitserve.routing.fleet import WHOLE, Candidate, drawn
from splitserve.routing.line import Place
from splitserve.routing.policy import choose
from splitserve.routing.route import Need, Route

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
        self._pools: dict[Pool, list[Candidate]] = {}
        self._latest: dict[Pool, Candidate] = {}
        self._longest = 0
        self._firsts: Iterator[int] = iter(())

    def start(self, workers: Sequence["Worker"], firsts: Iterable[int]) -> None:
        """`firsts`: the requests that follow no other, in order of arrival."""
        self._workers = {worker.candidate.info.uuid: worker for worker in workers}
        self._candidates = [worker.candidate for worker in workers]
        self._pools = {pool: [c for c in self._candidates if c.pool is pool] for pool in Pool}
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
        heappush(self._waiting, (place, request))
        if self._slo is not None or len(self._waiting) == 1:
            self._pump()

    def changed(self, worker: "Worker") -> None:
        """The worker has more room than before."""
        if self._waiting:
            self._latest[worker.candidate.pool] = worker.candidate
            self._pump()

    def _first_token_s(self, request: int) -> float:
        """Its objective."""
        slo = self._slo
        return NEVER if slo is None else slo.ttft_s + slo.ttft_per_token_s * self._journal.prompt[request]

    def _pump(self) -> None:
        """Binds from the front, as the router does: what can't go holds up what is behind it."""
        waiting = self._waiting
        while waiting:
            place, request = waiting[0]
            route = choose(self._look(), self._need(request), self._clock.now)
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
        if slo is None:
            return Need(journal.prompt[request])
        return Need(
            journal.prompt[request], due=journal.due[request], tpot_s=slo.tpot_s, output_tokens=self._output_tokens
        )

    def _look(self) -> list[Candidate]:
        if len(self._candidates) <= WHOLE:
            return self._candidates
        return drawn(self._pools, self._latest.values(), self._random)

    def _bind(self, request: int, route: Route) -> None:
        journal, decode = self._journal, self._workers[route.decode]
        journal.bound[request] = self._clock.now
        journal.decode_worker[request] = decode.number
        self._workers[route.reader].candidate.read_until = self._clock.now + route.read_s
        if route.prefill is None:
            decode.compute(request)
            return
        prefill = self._workers[route.prefill]
        journal.prefill_worker[request] = prefill.number
        decode.park(request)
        prefill.compute(request, decode)
