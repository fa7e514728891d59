"""A queue whose answers are known: one server, each request takes as long, first come first served."""

import numpy as np
import numpy.typing as npt

from splitserve.bench.goodput import Judged
from splitserve.core.slo import Timelines

Floats = npt.NDArray[np.float64]


def waits_s(gaps_s: Floats, service_s: float = 1.0) -> Floats:
    """How long each request waits (Lindley), along the last axis; the gap before the first doesn't matter."""
    waits = np.zeros(gaps_s.shape)
    for index in range(1, gaps_s.shape[-1]):
        waits[..., index] = np.maximum(0.0, waits[..., index - 1] + service_s - gaps_s[..., index])
    return waits


def gaps(seed: int, requests: int) -> Floats:
    """At one request per second, and not only on average: arrivals are rescaled to their rate."""
    return rescaled(np.random.default_rng((seed, 7)).standard_exponential(requests))


def rescaled(gaps_s: Floats) -> Floats:
    return np.asarray(gaps_s / gaps_s.mean(axis=-1, keepdims=True))


def judged(rate_rps: float, seed: int, most_s: float, service_s: float = 1.0, requests: int = 200) -> Judged:
    """A run of the queue, of whose requests those meet the objective that wait no longer than that."""
    return Judged(rate_rps, seed, waits_s(gaps(seed, requests) / rate_rps, service_s) <= most_s)


def true_goodput(most_s: float, service_s: float = 1.0, requests: int = 200, target: float = 0.9) -> float:
    """Of runs of so many requests from an empty queue, by many of them."""
    many = rescaled(np.random.default_rng(0).standard_exponential((2000, requests)))
    rates = np.geomspace(0.2, 1.8, 60) / service_s
    shares = np.array([(waits_s(many / rate, service_s) <= most_s).mean() for rate in rates])
    return float(np.exp(np.interp(-target, -shares, np.log(rates))))


def timelines(ttft_s: Floats) -> Timelines:
    """Requests of ten tokens at 0.1 s each, that differ in TTFT alone."""
    due = np.arange(len(ttft_s), dtype=np.float64)
    first = due + ttft_s
    tokens = np.full(len(ttft_s), 10)
    return Timelines(due, first, first + 0.9, tokens, prompt_tokens=tokens * 10)
