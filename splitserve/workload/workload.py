"""What a workload is to those who serve, simulate or send it, and what is said of one."""

from dataclasses import dataclass
from typing import Protocol

from splitserve.workload.requests import Requests


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of prompt or output lengths, in tokens."""

    mean: float
    p10: float
    p25: float
    p50: float
    p75: float
    p90: float
    p99: float
    longest: float


@dataclass(frozen=True, slots=True)
class Summary:
    """`rate_rps` and `interarrival_cv` (deviation of the gaps between arrivals over their mean; 1 for Poisson) are None
    where the workload has none of its own. `prefix_hit`: the share of prompt tokens that one cache without bound would
    have read or written before, so no fleet can do better. `turns`: in the mean of a session; 1 for single requests."""

    requests: int
    prompt: Quantiles
    output: Quantiles
    rate_rps: float | None = None
    interarrival_cv: float | None = None
    prefix_hit: float = 0.0
    turns: float = 1.0


class Workload(Protocol):
    """Requests of one kind, as many and as fast as wanted."""

    @property
    def name(self) -> str:
        """As on the command line: what makes it again."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of results must know of it, such as that it is synthetic. Sentences."""

    @property
    def mean_prompt_tokens(self) -> float: ...

    @property
    def mean_output_tokens(self) -> float: ...

    def draw(self, requests: int, rate_rps: float, seed: int) -> Requests:
        """Common random numbers: the same seed gives the same lengths and the same arrivals at unit rate, so that two
        rates, or two deployments, are compared on the same requests. Raises ConfigError for a rate that is not
        positive."""

    def describe(self) -> Summary: ...
