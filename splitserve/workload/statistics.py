"""What is said of requests that were drawn, read or sent."""

import numpy as np

from splitserve.workload.lengths import Lengths, Tokens
from splitserve.workload.prefixes import history_blocks, repeated_share
from splitserve.workload.requests import Requests
from splitserve.workload.workload import Quantiles, Summary

LEVELS = (0.10, 0.25, 0.50, 0.75, 0.90, 0.99)


def summary(requests: Requests) -> Summary:
    """Of at least one request."""
    assert len(requests)
    gaps_s = np.diff(requests.arrival_s)
    span_s = float(gaps_s.sum())
    return Summary(
        requests=len(requests),
        prompt=quantiles(requests.prompt_tokens),
        output=quantiles(requests.output_tokens),
        rate_rps=len(gaps_s) / span_s if span_s > 0.0 else None,
        interarrival_cv=float(gaps_s.std() / gaps_s.mean()) if span_s > 0.0 else None,
        prefix_hit=_prefix_hit(requests),
        turns=float(turns_of(requests).mean()),
    )


def _prefix_hit(requests: Requests) -> float:
    if requests.prefixes is None:
        return 0.0
    return repeated_share(requests.prefixes, requests.prompt_tokens, history_blocks(requests))


def turns_of(requests: Requests) -> Tokens:
    """How many turns each session has; a request that is none's is one of its own."""
    if requests.follows is None:
        return np.ones(len(requests), dtype=np.int64)
    session = list(range(len(requests)))
    for row, before in enumerate(requests.follows.tolist()):
        if before >= 0:
            session[row] = session[before]
    counts = np.bincount(session)
    return counts[counts > 0]


def quantiles(tokens: Tokens) -> Quantiles:
    """Of observed lengths; no interpolation."""
    found = np.quantile(tokens, LEVELS, method="inverted_cdf").astype(np.int64)
    return _named(float(tokens.mean()), found, float(tokens.max()))


def quantiles_of(lengths: Lengths) -> Quantiles:
    """Of a distribution, exactly."""
    longest = int(np.flatnonzero(lengths.shares > _NEVER)[-1])
    return _named(lengths.mean, lengths.at(LEVELS), float(longest))


def _named(mean: float, at_levels: Tokens, longest: float) -> Quantiles:
    p10, p25, p50, p75, p90, p99 = (float(value) for value in at_levels)
    return Quantiles(mean, p10, p25, p50, p75, p90, p99, longest)


_NEVER = 1e-9  # a smaller share is not met in a million requests
