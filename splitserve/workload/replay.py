"""A workload that is a trace, again."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from splitserve.workload.arrivals import Arrivals, Seconds, rescaled
from splitserve.workload.prefixes import Sharing, chosen
from splitserve.workload.requests import Prefixes, Requests
from splitserve.workload.statistics import summary
from splitserve.workload.synthetic import check_rate, streams
from splitserve.workload.workload import Summary


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """A Workload: a trace's requests in their order, prompts, outputs and shared prefixes together.

    Seed 0 starts at the trace's first request, another anywhere; past the end it starts over, with prefixes that no
    earlier pass had. Without `arrivals` the gaps are the trace's, the whole trace's mean rate scaled to the rate asked
    for; a busy stretch of it stays busy. `sharing` replaces the trace's prefixes."""

    name: str
    trace: Requests
    arrivals: Arrivals | None = None
    sharing: Sharing | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean_prompt_tokens(self) -> float:
        return float(self.trace.prompt_tokens.mean())

    @property
    def mean_output_tokens(self) -> float:
        return float(self.trace.output_tokens.mean())

    def draw(self, requests: int, rate_rps: float, seed: int) -> Requests:
        check_rate(rate_rps)
        starts, _, times, groups = streams(seed)
        first = int(starts.integers(len(self.trace))) if seed else 0
        position = first + np.arange(requests)
        row = position % len(self.trace)
        prompts = self.trace.prompt_tokens[row]
        return Requests(
            arrival_s=self._times(position, rate_rps, times),
            prompt_tokens=prompts,
            output_tokens=self.trace.output_tokens[row],
            prefixes=self.sharing.draw(prompts, groups) if self.sharing else self._prefixes(position),
        )

    def describe(self) -> Summary:
        """Of the whole trace; its arrivals as recorded, unless others replace them."""
        if self.arrivals is None and self.sharing is None:
            return summary(self.trace)
        drawn = summary(self.draw(len(self.trace), 1.0, 0))
        return drawn if self.arrivals is None else replace(drawn, rate_rps=None)

    def _times(self, position: npt.NDArray[np.int64], rate_rps: float, rng: np.random.Generator) -> Seconds:
        if self.arrivals is not None:
            return self.arrivals.times(len(position), rate_rps, rng)
        unit_s = rescaled(self.trace.arrival_s, 1.0)
        passes_s = (position // len(self.trace)) * (unit_s[-1] + 1.0)  # the gap between two passes is a mean one
        times = unit_s[position % len(self.trace)] + passes_s
        return np.asarray((times - times[:1]) / rate_rps)

    def _prefixes(self, position: npt.NDArray[np.int64]) -> Prefixes | None:
        if self.trace.prefixes is None:
            return None
        held = chosen(self.trace.prefixes, position % len(self.trace))
        passes = np.repeat(position // len(self.trace), np.diff(held.offsets))
        return replace(held, ids=held.ids + passes * (int(held.ids.max(initial=0)) + 1))
