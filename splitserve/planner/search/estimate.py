"""What a pool could serve, ever more exactly and ever more dearly, each computed once a search: a worker's queueing
bound, its simulated phase, a pool's simulated phase. `hunt` asks for no more than it needs to rank.

A decode worker makes the first token, so a prefill worker has less than the whole time to first token: `after_s` is
what the decode workers take of it.
"""

from dataclasses import replace

from splitserve.core.slo import Slo
from splitserve.latency.model import Step
from splitserve.planner.search.candidates import Option
from splitserve.planner.search.demand import Demand
from splitserve.planner.search.goodput import highest
from splitserve.planner.search.phases import DecodeTime, simulate_phase
from splitserve.planner.search.queueing import Bound, bound

_PHASE_REQUESTS = 300
_PER_WORKER = 75
_ALIKE_S = 0.005  # first tokens closer than that share an estimate, the smaller one's

_ITERATIONS = 6  # of batch size and step time, each of which makes the other longer


class Estimator:
    """Of one demand and one SLO. Rates in requests per second."""

    def __init__(self, demand: Demand, slo: Slo, max_sequences: int, step: float) -> None:
        self._demand = demand
        self._slo = slo
        self._max_sequences = max_sequences
        self._step = step
        self._bounds: dict[tuple[Option, float], Bound] = {}
        self._phases: dict[tuple[Option, int, float], float] = {}
        self._decode: dict[Option, DecodeTime] = {}
        lengths = zip(demand.prompt, demand.output, strict=True)
        self._mean_context = sum(p * n + n * n / 2 for p, n in lengths) / sum(demand.output)
        self._mean_output = sum(demand.output) / len(demand)
        self.simulated = 0

    def bound(self, option: Option, after_s: float = 0.0) -> Bound:
        """No schedule on one worker serves more."""
        key = (option, after_s)
        if key not in self._bounds:
            self._bounds[key] = bound(option, self._demand, self._left(after_s), self._max_sequences)
        return self._bounds[key]

    def phase(self, option: Option, workers: int = 1, after_s: float = 0.0) -> float:
        """The phase goodput of so many workers, by simulation; 0 for any number where one worker's is. Pools too large
        for the demand to fill are reckoned from one worker."""
        ceiling = workers * self.bound(option, after_s).rate_rps
        if not ceiling or (workers > 1 and not self.phase(option, 1, after_s)):
            return 0.0
        if workers > max(1, len(self._demand) // _PER_WORKER):
            return self.optimistic(option, workers, after_s)
        key = (option, workers, after_s)
        if key not in self._phases:
            guess = 0.7 * ceiling if workers == 1 else self.optimistic(option, workers, after_s)
            self._phases[key] = self._simulated(option, workers, self._left(after_s), guess, ceiling)
        return self._phases[key]

    def optimistic(self, option: Option, workers: int, after_s: float = 0.0) -> float:
        """Of a pool, from one worker's. Waiting in one queue for c workers is about that for one of c times the speed,
        so what one worker must leave idle to keep queues short is what the whole pool must (heavy traffic, M/M/c)."""
        one, most = self.phase(option, 1, after_s), self.bound(option, after_s).rate_rps
        return workers * most - (most - one) if one else 0.0

    def known(self, option: Option) -> float | None:
        """One worker's phase goodput, if anything asked for it."""
        return max((rate for (one, n, _), rate in self._phases.items() if one is option and n == 1), default=None)

    def longer(self, tokens: float) -> float:
        """The share of prompts that are longer than that."""
        return sum(prompt > tokens for prompt in self._demand.prompt) / len(self._demand)

    def least_after_s(self, decode: Option) -> float:
        """What a decode worker takes of the time to first token, at least: a step."""
        return self._rounded(decode.costs.latency.step_s(Step(decodes=1)))

    def likely_after_s(self, decode: Option, rate_rps: float) -> float:
        """What a decode worker takes on average at this rate: the rest of a step, and a step. By Little's law it has as
        many sequences as come while one stays."""
        decoding, sequences, step_s = self._decoding(decode), 1.0, 0.0
        for _ in range(_ITERATIONS):
            base, slope = decoding.line(max(1, int(sequences)))
            step_s = base + slope * sequences * self._mean_context
            sequences = min(rate_rps * self._mean_output * step_s, self._max_sequences)
        return self._rounded(1.5 * step_s)

    def _rounded(self, seconds: float) -> float:
        return min(int(seconds / _ALIKE_S) * _ALIKE_S, self._slo.ttft_s)

    def _decoding(self, option: Option) -> DecodeTime:
        return self._decode.setdefault(option, DecodeTime(option.costs.latency, self._mean_context))

    def _left(self, after_s: float) -> Slo:
        return replace(self._slo, ttft_s=self._slo.ttft_s - after_s)

    def _simulated(self, option: Option, workers: int, slo: Slo, guess: float, ceiling: float) -> float:
        demand = self._demand.first(max(_PHASE_REQUESTS, _PER_WORKER * workers))
        decode = self._decoding(option)

        def meets(rate_rps: float) -> bool:
            self.simulated += len(demand)
            times = simulate_phase(option, workers, demand, rate_rps, decode, self._max_sequences)
            return times.attainment(slo) >= slo.attainment

        return highest(meets, guess, ceiling, self._step).low
