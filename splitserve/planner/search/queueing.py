"""Bounds from above on what one worker serves, at the cost of some dozens of step predictions. Pure.

A worker in steady state completes x requests a step on average, so a step holds x times a mean request's tokens, and
the rate is x / step time. Where a step's time is convex in what it holds, no schedule takes less time than equal steps
(Jensen), so the rate at the largest x that memory, chunk and objective allow bounds every schedule's: utilisation at
most one, batching perfect. The share of requests that may miss the objective is taken to be the most expensive one and
to run in steps of any length. By Little's law the sequences in x bound the KV memory held.

It is not an estimate: nobody waits here. `phases` simulates that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from splitserve.core.slo import Slo
from splitserve.latency.model import LatencyModel, Step, pairs
from splitserve.planner.deployment import Role
from splitserve.planner.search.candidates import Option
from splitserve.planner.search.demand import Demand, enough

_GRID = 48  # step sizes tried, a quarter octave apart
_RATIO = 2.0**-0.25


@dataclass(frozen=True, slots=True)
class Bound:
    """No schedule serves more than `rate_rps` on one worker. Where it is 0 `reason` tells why, `binding` which
    objective it is ("ttft" or "tpot"), and `idle_s` what an idle worker makes of it."""

    rate_rps: float
    binding: str = ""
    reason: str = ""
    idle_s: float = inf


@dataclass(frozen=True, slots=True)
class _Mean:
    """What a step holds for each request that it completes, and `least`: the share of this work that lies in requests
    that must meet the objective, at least."""

    tokens: float = 0.0
    pairs: float = 0.0
    prefills: float = 0.0
    decodes: float = 0.0
    context: float = 0.0
    least: float = 1.0

    def seconds(self, of: Callable[[Step], float], x: float) -> float:
        """Of a step that completes so many requests on average: between whole sequences, or tokens of prompts, a
        straight line."""
        unit = self.decodes or self.tokens
        whole = max(1, int(x * unit))
        share = max(0.0, x * unit - whole)
        low = of(self._step(whole / unit))
        return low if not share else low + share * (of(self._step((whole + 1) / unit)) - low)

    def _step(self, x: float) -> Step:
        prefills = max(1, round(self.prefills * x)) if self.tokens else 0
        sums = (self.tokens, self.pairs), (self.decodes, self.context)
        (tokens, visited), (decodes, context) = ([round(amount * x) for amount in row] for row in sums)
        return Step(tokens, visited, prefills, decodes, context)


def bound(option: Option, demand: Demand, slo: Slo, max_sequences: int) -> Bound:
    """Of one worker of the option by itself; the other phase takes no time."""
    unmet = _unloaded(option, demand, slo)
    if unmet is not None:
        return unmet
    mean, longest_s = _mean(option.role, demand, slo), slo.ttft_s if option.role is Role.PREFILL else slo.tpot_s
    most = _most(option, mean, max_sequences)
    any_length = _fastest(option.costs.latency, mean, most, inf)
    in_time = _fastest(option.costs.latency, mean, most, longest_s)
    if not in_time:
        binding = "ttft" if option.role is Role.PREFILL else "tpot"
        return Bound(0.0, binding, f"no step with a mean request's share ends within {longest_s:g} s")
    return Bound(1.0 / (mean.least / in_time + (1.0 - mean.least) / any_length))


def unloaded_ttft_s(option: Option, new: int, visited: int) -> float:
    """Of a prompt that has the worker for itself: its chunks follow each other through the stages."""
    latency, chunk = option.costs.latency, option.chunk_tokens
    context = (visited - new * (new + 1) // 2) // new
    begins = 0.0
    while new > chunk:
        begins += latency.stage_s(Step(chunk, pairs(chunk, context), 1))
        new, context = new - chunk, context + chunk
    return begins + latency.step_s(Step(new, pairs(new, context), 1))


def _unloaded(option: Option, demand: Demand, slo: Slo) -> Bound | None:
    """Whether an idle worker already misses its objective too often."""
    must = enough(slo.attainment, len(demand)) - 1
    if option.role is not Role.DECODE:
        visited, new = sorted(zip(demand.pairs, demand.new, strict=True))[must]
        ttft = unloaded_ttft_s(option, new, visited)
        if ttft > slo.ttft_s:
            rank = f"the one at the {slo.attainment:.0%} quantile"
            reason = f"a prompt of {new:,} tokens, {rank}, takes {ttft:.3g} s with the worker to itself"
            return Bound(0.0, "ttft", reason, ttft)
    if option.role is not Role.PREFILL:
        lengths = zip(demand.prompt, demand.output, strict=True)
        context = sorted(prompt + output // 2 if output > 1 else 0 for prompt, output in lengths)[must]
        tpot = option.costs.latency.step_s(Step(decodes=1, context_tokens=context)) if context else 0.0
        if tpot > slo.tpot_s:
            reason = f"a token after {context:,} others takes {tpot:.3g} s with the worker to itself"
            return Bound(0.0, "tpot", reason, tpot)
    return None


def _mean(role: Role, demand: Demand, slo: Slo) -> _Mean:
    count, must = len(demand), enough(slo.attainment, len(demand))
    prompts, makes = role is not Role.DECODE, role is not Role.PREFILL
    made = [n - int(role is Role.COLOCATED) for n in demand.output]  # prompts' own steps make their first tokens
    visited = [p * n + n * (n + 1) // 2 for p, n in zip(demand.prompt, made, strict=True)]
    work = sorted(made if makes else demand.new)
    return _Mean(
        tokens=sum(demand.new) / count * prompts,
        pairs=sum(demand.pairs) / count * prompts,
        prefills=float(prompts),
        decodes=sum(made) / count * makes,
        context=sum(visited) / count * makes,
        least=sum(work[:must]) / max(sum(work), 1),
    )


def _most(option: Option, mean: _Mean, max_sequences: int) -> float:
    """Requests per step that chunk, sequences and memory allow; each stage has a batch of its own."""
    stages = option.costs.latency.stages
    limits = [
        option.chunk_tokens / (mean.tokens + mean.decodes) if mean.tokens else inf,
        max_sequences / stages / mean.decodes if mean.decodes else inf,
        option.costs.kv_tokens / stages / mean.context if mean.context else inf,
    ]
    return min(limits)


def _fastest(latency: LatencyModel, mean: _Mean, most: float, longest_s: float) -> float:
    """The highest rate of steps that hold at most `most` requests and end within `longest_s`; 0 if none does. A step
    has one sequence, or one token, at least."""
    least = 1.0 / (mean.decodes or mean.tokens)
    sizes = [most * _RATIO**n for n in range(_GRID) if most * _RATIO**n > least] + [least]
    fitting = [size for size in sizes if mean.seconds(latency.step_s, size) <= longest_s]
    if not fitting:
        return 0.0
    fits, beyond = fitting[0], min(fitting[0] / _RATIO, max(most, least))
    for _ in range(8):
        middle = (fits + beyond) / 2
        if mean.seconds(latency.step_s, middle) <= longest_s:
            fits = middle
        else:
            beyond = middle
    rates = [size / mean.seconds(latency.stage_s, size) for size in fitting]
    return max(*rates, beyond / mean.seconds(latency.stage_s, fits))
