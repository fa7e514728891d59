"""Best-first search over candidates, cheapest knowledge first.

Whatever could be best is on one heap, ordered by the most it could have. What comes to its top is either known more
exactly and put back, or, once it can't be known better without, simulated as a whole:

    pairing (its options' bounds) -> candidate (numbers that match rates) -> placed (pools simulated) -> judged

So nothing is simulated jointly whose bound is below what was already judged, and phases only where bounds don't decide.
It makes no answer of what it finds: that is `search`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import ceil

from splitserve.planner.deployment import Role
from splitserve.planner.result import Judged, Placement
from splitserve.planner.search.candidates import Aim, Candidate, Option, counts, pairings, room
from splitserve.planner.search.demand import Demand
from splitserve.planner.search.estimate import Estimator
from splitserve.planner.search.judge import judge
from splitserve.planner.search.placement import crossing, link_ceiling_rps, place

Progress = Callable[[str, float], None]

_SLACK = 1.1  # by how much a joint simulation may beat its phases' estimate: other batches, other routes
_TRIES = 3  # times the finalists are judged at most, where they don't reach what must be served
_MOST_LONGER = 30  # times `effort.requests`, for fleets that those would not fill
_RESIDENCES = 8  # a simulation lasts as many times as a request stays at most


@dataclass(frozen=True, slots=True)
class _Entry:
    """`rate_rps` is the most it could serve; `placement` is there once its pools were simulated."""

    pools: tuple[Option, ...]
    rate_rps: float
    candidate: Candidate | None = None
    placement: Placement | None = None


class Hunt:
    """One search. What it knows grows; nothing is forgotten. `requests`: of one joint simulation."""

    def __init__(self, aim: Aim, fit: list[Option], progress: Progress) -> None:
        question = aim.question
        drawn = question.workload.draw(question.effort.requests, 1.0, question.seed)
        self.estimates = Estimator(Demand.of(drawn), question.slo, question.max_sequences, question.effort.rate_step)
        self._aim = aim
        self._question = question
        self._progress = progress
        self._heap: list[tuple[float, float, int, _Entry]] = []
        self._pushed = count()
        self._judged: list[tuple[float, Judged]] = []  # with its value, 0 where it doesn't serve what must be served
        self._jointly = 0
        for pools in sorted(pairings(fit), key=lambda pools: tuple(option.name for option in pools)):
            self._push_pairing(pools)
        self.requests = self._enough_requests()

    @property
    def simulated(self) -> int:
        """Requests, in phases and jointly."""
        return self.estimates.simulated + self._jointly

    def best(self) -> list[Judged]:
        """The finalists, best first; the best colocated and the best disaggregated placement are among them."""
        self.finalists()
        for colocated in (True, False):
            self._finalists_of(colocated)
        return self._sorted()

    def finalists(self) -> list[Judged]:
        """As many as effort allows, or until what is left can't be the best."""
        while self._undecided():
            self._look(heappop(self._heap)[-1])
        return self._sorted()

    def everything(self) -> list[Judged]:
        """Every number of every option that fits, simulated as a whole: what `best` is tested against."""
        for entry in [entry for *_, entry in sorted(self._heap, key=lambda item: item[:3])]:
            for numbers in counts(entry.pools, self._question.machines):
                placed = self._placed(Candidate(tuple(zip(entry.pools, numbers, strict=True))))
                if placed is not None and placed.rate_rps:
                    self._judge(placed)
        return self._sorted()

    def _undecided(self) -> bool:
        return bool(self._heap) and self._worth(-self._heap[0][0], self._judged, self._question.effort.finalists)

    def _finalists_of(self, colocated: bool) -> None:
        """Half as many of one kind, so that the best of each is known; the others stay where they are."""
        kept = [item for item in self._heap if (len(item[-1].pools) == 1) is not colocated]
        self._heap = [item for item in self._heap if (len(item[-1].pools) == 1) is colocated]
        heapify(self._heap)
        wanted = max(1, self._question.effort.finalists // 2)
        while self._heap:
            of_kind = [pair for pair in self._judged if pair[1].placement.colocated is colocated]
            if not self._worth(-self._heap[0][0], of_kind, wanted):
                break
            self._look(heappop(self._heap)[-1])
        self._heap += kept
        heapify(self._heap)

    @staticmethod
    def _worth(most: float, judged: list[tuple[float, Judged]], finalists: int) -> bool:
        """Whether something with at most this value is worth a look. If none of the judged serves what must be served,
        some more are."""
        best = max((value for value, _ in judged), default=0.0)
        return most * _SLACK > best and len(judged) < finalists * (1 if best else _TRIES)

    def _look(self, entry: _Entry) -> None:
        """Learns the next thing about it. Of placements that differ in their chunk alone the first is judged."""
        if entry.placement is not None:
            if not any(str(judged.placement) == str(entry.placement) for _, judged in self._judged):
                self._judge(entry)
        elif entry.candidate is not None:
            placed = self._placed(entry.candidate)
            if placed is not None:
                self._push(placed, self._aim.value(entry.candidate, placed.rate_rps))
        else:
            for candidate in self._matched(entry.pools):
                rate = min(self._optimistic(entry.pools, option, n) for option, n in candidate.pools)
                self._push(_Entry(entry.pools, rate, candidate), self._aim.value(candidate, rate))

    def _push_pairing(self, pools: tuple[Option, ...]) -> None:
        rates = [self._bound(pools, option) for option in pools]
        if all(rates):
            self._push(_Entry(pools, max(rates)), self._aim.most(pools, rates))

    def _push(self, entry: _Entry, value: float) -> None:
        if value:
            heappush(self._heap, (-value, -entry.rate_rps, next(self._pushed), entry))

    def _matched(self, pools: tuple[Option, ...]) -> Iterator[Candidate]:
        """Numbers at which the pools' rates match, and one more or less: others only waste the bigger pool."""
        if len(pools) == 1:
            yield from (Candidate(((pools[0], n),)) for (n,) in counts(pools, self._question.machines))
            return
        first, second = pools
        other, slope = self._optimistic(pools, second, 1), self._bound(pools, second)
        if not (other and self._optimistic(pools, first, 1)):
            return
        for n, most in room(pools, self._question.machines):
            match = 1 + max(0, ceil((self._optimistic(pools, first, n) - other) / slope))
            for m in range(max(1, min(match - 1, most)), min(match + 1, most) + 1):
                yield Candidate(((first, n), (second, m)))

    def _placed(self, candidate: Candidate) -> _Entry | None:
        self._progress("phases", self._share())
        pools = tuple(option for option, _ in candidate.pools)
        rate = self._phases_rps(candidate)
        placement = place(self._question, candidate, rate) if rate else None
        if placement is None:
            return None
        return _Entry(pools, min(rate, self._over_links_rps(placement, pools)), candidate, placement)

    def _phases_rps(self, candidate: Candidate) -> float:
        """The slowest pool's rate; prefill's has what decode leaves it of the time to first token at that rate."""
        *_, (last, workers) = candidate.pools
        rate = self.estimates.phase(last, workers)
        if candidate.colocated:
            return rate
        (first, n), pools = candidate.pools[0], (candidate.pools[0][0], last)
        rate = min(rate, self._optimistic(pools, first, n))
        return min(rate, self.estimates.phase(first, n, self.estimates.likely_after_s(last, rate / workers)))

    def _over_links_rps(self, placement: Placement, pools: tuple[Option, ...]) -> float:
        """0 if too many prompts' KV can't cross between nodes in time even over an idle link."""
        slo, question = self._question.slo, self._question
        left_s = slo.ttft_s - self.estimates.least_after_s(pools[-1])
        longest = question.machines.between.bytes_per_s * left_s / question.model.kv_bytes_per_token
        late = crossing(placement) * self.estimates.longer(longest)
        return 0.0 if late > 1.0 - slo.attainment else link_ceiling_rps(question, placement)

    def _bound(self, pools: tuple[Option, ...], option: Option) -> float:
        return self.estimates.bound(option, self._after_s(pools, option)).rate_rps

    def _optimistic(self, pools: tuple[Option, ...], option: Option, workers: int) -> float:
        return self.estimates.optimistic(option, workers, self._after_s(pools, option))

    def _after_s(self, pools: tuple[Option, ...], option: Option) -> float:
        return self.estimates.least_after_s(pools[-1]) if option.role is Role.PREFILL else 0.0

    def _judge(self, entry: _Entry) -> None:
        self._progress("joint simulation", self._share())
        candidate, placement = entry.candidate, entry.placement
        assert candidate is not None and placement is not None  # noqa: PT018
        ceiling = min(self._bound(entry.pools, option) * n for option, n in candidate.pools)
        judged, simulated = judge(self._aim, candidate, placement, entry.rate_rps, ceiling, self.requests)
        self._jointly += simulated
        self._judged.append((self._aim.value(candidate, judged.goodput_rps.mean), judged))

    def _share(self) -> float:
        return min(1.0, len(self._judged) / (self._question.effort.finalists + 1))

    def _sorted(self) -> list[Judged]:
        order = sorted(self._judged, key=lambda pair: (-pair[0], -pair[1].goodput_rps.mean))
        return [judged for _, judged in order]

    def _enough_requests(self) -> int:
        """Of one joint simulation, so that the largest fleet is filled for most of its time. The same for all, so that
        all serve the same requests."""
        effort, workload = self._question.effort, self._question.workload
        fastest = max((self._most_rps(entry) for *_, entry in self._heap), default=0.0)
        filling = _RESIDENCES * fastest * workload.mean_output_tokens * self._question.slo.tpot_s
        return int(min(max(effort.requests, filling), effort.requests * _MOST_LONGER))

    def _most_rps(self, entry: _Entry) -> float:
        rates = [self._bound(entry.pools, option) for option in entry.pools]
        return Aim(self._question, fastest=True).most(entry.pools, rates)
