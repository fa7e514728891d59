"""One draw of a workload as the phase estimates need it: per request what is to be computed, at unit arrival rate.

Prefix reuse is counted as if one cache without bound had read every prompt before, which no fleet beats.
"""

from dataclasses import dataclass
from math import ceil

from splitserve.latency.model import pairs
from splitserve.workload.prefixes import history_blocks
from splitserve.workload.requests import Requests


@dataclass(frozen=True, slots=True)
class Demand:
    """Rows are requests in order of arrival. `arrival` is at one request per second; `new` are the prompt tokens that
    must be computed, `pairs` what their attention visits."""

    arrival: list[float]
    prompt: list[int]
    new: list[int]
    pairs: list[int]
    output: list[int]

    def __len__(self) -> int:
        return len(self.arrival)

    @classmethod
    def of(cls, requests: Requests, rate_rps: float = 1.0) -> "Demand":
        """From requests that were drawn at this rate."""
        prompt = requests.prompt_tokens.tolist()
        cached = _cached(requests)
        new = [tokens - hit for tokens, hit in zip(prompt, cached, strict=True)]
        return cls(
            arrival=(requests.arrival_s * rate_rps).tolist(),
            prompt=prompt,
            new=new,
            pairs=[pairs(tokens, hit) for tokens, hit in zip(new, cached, strict=True)],
            output=requests.output_tokens.tolist(),
        )

    def first(self, requests: int) -> "Demand":
        """The first so many."""
        return self._slice(slice(requests))

    def dealt(self, hands: int) -> "list[Demand]":
        """Each request in turn to another hand, as a router that balances load would nearly do."""
        return [self._slice(slice(hand, None, hands)) for hand in range(hands)]

    def _slice(self, rows: slice) -> "Demand":
        return Demand(self.arrival[rows], self.prompt[rows], self.new[rows], self.pairs[rows], self.output[rows])


def enough(attainment: float, requests: int) -> int:
    """How many of so many requests must meet the objectives."""
    return ceil(attainment * requests - 1e-9)


def _cached(requests: Requests) -> list[int]:
    """Leading prompt tokens that an earlier request, or the turn before it, had; the last is always computed."""
    prefixes = requests.prefixes
    if prefixes is None:
        return [0] * len(requests)
    seen: set[int] = set()
    cached = []
    history = history_blocks(requests).tolist()
    for request, tokens in enumerate(requests.prompt_tokens.tolist()):
        ids = prefixes.of(request).tolist()
        hit = max(history[request], next((n for n, block in enumerate(ids) if block not in seen), len(ids)))
        cached.append(max(0, min(hit * prefixes.block_tokens, tokens - 1)))
        seen.update(ids)
    return cached
