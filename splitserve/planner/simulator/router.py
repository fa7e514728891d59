"""The simulated router: requests wait here in order of arrival until the router's own `routing/policy` finds a route.

The fleet's state is the workers' own: a simulated worker's word takes no time to arrive. A request longer than every
worker takes is refused on arrival and never ends.
"""

from collections import deque
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from splitserve.core.worker import Pool
from splitserve.planner.simulator.clock import Clock
from splitserve.planner.simulator.journal import Journal
from splitserve.routing.fleet import WHOLE, Candidate, drawn
from splitserve.routing.policy import Need, Route, choose

if TYPE_CHECKING:
    from splitserve.planner.simulator.worker import Worker


class Router:
    """`workers` may be empty until `start`: workers and router know each other."""

    def __init__(self, clock: Clock, journal: Journal, seed: int) -> None:
        self._clock = clock
        self._journal = journal
        self._random = Random(seed)
        self._waiting: deque[int] = deque()
        self._workers: dict[str, Worker] = {}
        self._candidates: list[Candidate] = []
        self._pools: dict[Pool, list[Candidate]] = {}
        self._latest: dict[Pool, Candidate] = {}
        self._longest = 0

    def start(self, workers: Sequence["Worker"]) -> None:
        self._workers = {worker.candidate.info.uuid: worker for worker in workers}
        self._candidates = [worker.candidate for worker in workers]
        self._pools = {pool: [c for c in self._candidates if c.pool is pool] for pool in Pool}
        self._longest = min(worker.longest for worker in workers)

    def arrive(self, request: int) -> None:
        """A request comes in, and schedules the one after it."""
        journal = self._journal
        if request + 1 < len(journal.arrival):
            self._clock.at(journal.arrival[request + 1], self.arrive, request + 1)
        if journal.prompt[request] + journal.output[request] > self._longest:
            return
        self._waiting.append(request)
        if len(self._waiting) == 1:
            self._pump()

    def changed(self, worker: "Worker") -> None:
        """The worker has more room than before."""
        if self._waiting:
            self._latest[worker.candidate.pool] = worker.candidate
            self._pump()

    def _pump(self) -> None:
        """Binds from the front, as the router does: what can't go holds up what is behind it."""
        waiting, prompt = self._waiting, self._journal.prompt
        while waiting:
            route = choose(self._look(), Need(prompt[waiting[0]]))
            if not isinstance(route, Route):
                return
            self._bind(waiting.popleft(), route)

    def _look(self) -> list[Candidate]:
        if len(self._candidates) <= WHOLE:
            return self._candidates
        return drawn(self._pools, self._latest.values(), self._random)

    def _bind(self, request: int, route: Route) -> None:
        journal, decode = self._journal, self._workers[route.decode]
        journal.bound[request] = self._clock.now
        journal.decode_worker[request] = decode.number
        if route.prefill is None:
            decode.compute(request)
            return
        prefill = self._workers[route.prefill]
        journal.prefill_worker[request] = prefill.number
        decode.park(request)
        prefill.compute(request, decode)
