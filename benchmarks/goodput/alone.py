"""What a request gets that meets an idle cluster: the unit of every objective, and how fast the machine is now."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.goodput.served import Served
from splitserve.bench import open_loop
from splitserve.core.slo import Timelines
from splitserve.workload.requests import Requests

TIMES = 5  # of each length; their medians count
OUTPUT_TOKENS = 40
APART = "batch"  # the class, without objectives: what the router expects of outputs stays as the load made it
NORMAL = 0.1  # a run during which the machine's speed changes by more says nothing
SPEED_STEP = 1.05  # machine speeds that runs are sent and judged at are powers of it
SPEEDS = tuple(round(SPEED_STEP**step, 3) for step in range(-14, 29))  # half to four times as slow


@dataclass(frozen=True, slots=True)
class Alone:
    """TTFT is `ttft_s` and `ttft_per_token_s` for each token of the prompt."""

    ttft_s: float
    ttft_per_token_s: float
    tpot_s: float

    def ttft_of(self, prompt_tokens: int) -> float:
        return self.ttft_s + self.ttft_per_token_s * prompt_tokens

    def slower_than(self, other: "Alone", prompt_tokens: int) -> float:
        """By which factor: of a TTFT and a TPOT, the geometric mean."""
        ttft = self.ttft_of(prompt_tokens) / other.ttft_of(prompt_tokens)
        return math.sqrt(ttft * self.tpot_s / other.tpot_s)

    def at_speed_of(self, other: "Alone") -> "Alone":
        """As it would have been on a machine as fast as `other` met, where both have the same steps."""
        return self.times(other.tpot_s / self.tpot_s)

    def times(self, factor: float) -> "Alone":
        """As it is on a machine that many times as slow."""
        return Alone(self.ttft_s * factor, self.ttft_per_token_s * factor, self.tpot_s * factor)


async def measured(served: Served, prompt_tokens: int, seed: int) -> Alone:
    """One request at a time, of half the length, of the length and of twice the length."""
    lengths = (prompt_tokens // 2, prompt_tokens, 2 * prompt_tokens)
    lines = [await _one(served, tokens, seed + number) for number, tokens in enumerate(lengths * TIMES)]
    ttft_s = [statistics.median(float(line.ttft_s[0]) for line in lines[at :: len(lengths)]) for at in range(3)]
    slope, base = _line(lengths, ttft_s)
    return Alone(base, slope, statistics.median(float(line.tpot_s[0]) for line in lines))


async def speed(served: Served, prompt_tokens: int, seed: int, before: Alone) -> float:
    """How much slower a request alone is now than it was: 1.1 is a tenth slower. Of prompts of that length."""
    lines = [await _one(served, prompt_tokens, seed + number) for number in range(TIMES)]
    ttft_s = statistics.median(float(line.ttft_s[0]) for line in lines)
    tpot_s = statistics.median(float(line.tpot_s[0]) for line in lines)
    return Alone(ttft_s, 0.0, tpot_s).slower_than(before, prompt_tokens)


def factor_of(slower: float) -> float:
    """By which a run is sent, and judged, as if its clock went so much slower: one of few, so that a router can be told
    the objectives for each of them beforehand."""
    return min(SPEEDS, key=lambda speed: abs(math.log(speed / slower)))


def as_if(lines: Timelines, factor: float) -> Timelines:
    """On a machine that is as fast as when the unit was taken."""
    if factor == 1.0:
        return lines
    return replace(
        lines,
        arrival=lines.arrival / factor,
        first_token=lines.first_token / factor,
        last_token=lines.last_token / factor,
        itl_p99_s=None if lines.itl_p99_s is None else lines.itl_p99_s / factor,
    )


async def _one(served: Served, prompt_tokens: int, seed: int) -> Timelines:
    requests = Requests(np.zeros(1), np.array([prompt_tokens]), np.array([OUTPUT_TOKENS]))
    run = await open_loop.run(requests, served.send(requests, seed, APART), open_loop.Limits(deadline_s=60.0))
    if not np.isfinite(run.timelines.tpot_s[0]):
        raise RuntimeError(f"a request alone failed: {run.record(0).error or run.record(0).ending.name}")
    return run.timelines


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and value at 0, neither below 0: a prompt's quadratic part must not make short ones free."""
    slope, base = np.polyfit(x, y, 1)
    if base < 0.0:
        return float(np.dot(x, y) / np.dot(x, x)), 0.0
    return float(slope), float(base)
