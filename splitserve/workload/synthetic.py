"""A workload drawn from distributions."""

from dataclasses import dataclass, replace

import numpy as np

from splitserve.core.errors import ConfigError
from splitserve.workload.arrivals import Arrivals
from splitserve.workload.pairs import Pair
from splitserve.workload.prefixes import Sharing
from splitserve.workload.requests import Requests
from splitserve.workload.statistics import quantiles_of, summary
from splitserve.workload.workload import Summary


@dataclass(frozen=True, slots=True, eq=False)
class Synthetic:
    """A Workload. Lengths, arrivals and sharing have a stream of random numbers each, so that changing one leaves the
    others as they were."""

    name: str
    lengths: Pair
    arrivals: Arrivals
    sharing: Sharing | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean_prompt_tokens(self) -> float:
        return self.lengths.prompts().mean

    @property
    def mean_output_tokens(self) -> float:
        return self.lengths.outputs().mean

    def draw(self, requests: int, rate_rps: float, seed: int) -> Requests:
        check_rate(rate_rps)
        prompts, outputs, times, groups = streams(seed)
        prompt_tokens, output_tokens = self.lengths.draw(requests, prompts, outputs)
        return Requests(
            arrival_s=self.arrivals.times(requests, rate_rps, times),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            prefixes=self.sharing.draw(prompt_tokens, groups) if self.sharing else None,
        )

    def describe(self) -> Summary:
        """Lengths exactly; arrivals and prefixes from a sample, whose size is the number of requests it says."""
        sample = summary(self.draw(_SAMPLE, 1.0, 0))
        prompt, output = quantiles_of(self.lengths.prompts()), quantiles_of(self.lengths.outputs())
        return replace(sample, prompt=prompt, output=output, rate_rps=None)


_SAMPLE = 20_000


def streams(seed: int, count: int = 4) -> tuple[np.random.Generator, ...]:
    """Independent streams of random numbers, of more the first the same. Raises ConfigError for a negative seed."""
    if seed < 0:
        raise ConfigError("seed", f"{seed} is negative: give 0 or more")
    return tuple(np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(count))


def check_rate(rate_rps: float) -> None:
    """Raises ConfigError unless it is a number above 0."""
    if not 0.0 < rate_rps < float("inf"):
        raise ConfigError("rate", f"{rate_rps:g} requests/s: give a number above 0")
