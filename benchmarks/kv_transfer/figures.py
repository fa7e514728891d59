"""What is computed from the timings of `benchmarks/kv_transfer`: values and pure functions, no engines, no clock.

Times are seconds on the monotonic clock; rows are in milliseconds and GB/s (10^9 bytes).
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

ENOUGH_FOR_P99 = 100  # with fewer samples the 99th percentile is the largest of them, or beyond
MIN_ROUNDS = 2  # of each case: one for latency, one beside a stream
STREAM_EVERY = 4  # rounds; the second of each four runs beside a stream

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """So many prompts of so many tokens, asked at once."""

    prompt_tokens: int
    concurrent: int

    @property
    def most_rounds(self) -> int:
        """Enough for a 99th percentile; one in four measures something else."""
        return max(MIN_ROUNDS, math.ceil(ENOUGH_FOR_P99 / self.concurrent * STREAM_EVERY / (STREAM_EVERY - 1)))


@dataclass(frozen=True, slots=True)
class Timing:
    """One request. `prefilled_at`: the prefill worker's first token, None without such a worker."""

    asked_at: float
    prefilled_at: float | None
    first_at: float
    second_at: float
    tokens: tuple[int, ...]
    uncovered_s: float | None = None

    @property
    def handover_s(self) -> float | None:
        return None if self.prefilled_at is None else self.first_at - self.prefilled_at


@dataclass(slots=True)
class Record:
    """All that was seen of one system under one case. Gaps are those between the tokens of a stream beside it: with
    nothing else asked, while requests were served, and of these the ones in which KV moved."""

    timings: list[Timing] = field(default_factory=list)
    moved_bytes: int = 0
    moving_s: float = 0.0
    alone_s: list[float] = field(default_factory=list)
    serving_s: list[float] = field(default_factory=list)
    receiving_s: list[float] = field(default_factory=list)

    def add(self, other: "Record") -> None:
        self.timings += other.timings
        self.moved_bytes += other.moved_bytes
        self.moving_s += other.moving_s
        self.alone_s += other.alone_s
        self.serving_s += other.serving_s
        self.receiving_s += other.receiving_s

    def add_gaps(self, token_times: Sequence[float], served: Interval, moves: Sequence[Interval]) -> None:
        for gap in pairwise(token_times):
            if not overlap(gap, served):
                self.alone_s.append(gap[1] - gap[0])
                continue
            self.serving_s.append(gap[1] - gap[0])
            if any(overlap(gap, move) for move in moves):
                self.receiving_s.append(gap[1] - gap[0])


@dataclass(frozen=True, slots=True)
class Spread:
    """`p99` is None where the samples don't tell it."""

    n: int
    median: float
    p99: float | None
    largest: float


@dataclass(frozen=True, slots=True)
class Row:
    """One system under one case. None: doesn't apply, or there was no sample."""

    prompt_tokens: int
    concurrent: int
    system: str
    handover_ms: Spread | None
    ttft_ms: Spread | None
    ttft_over_colocated_ms: Spread | None
    second_token_over_colocated_ms: Spread | None
    uncovered_ms: Spread | None
    other_tokens: int  # requests whose two tokens were not the colocated engine's
    gbps: float | None
    memcpy_gbps: float
    itl_alone_ms: Spread | None
    itl_serving_ms: Spread | None
    itl_receiving_ms: Spread | None


@dataclass(slots=True)
class Spent:
    """On one case so far."""

    rounds: int = 0
    seconds: float = 0.0


def next_case(spent: Mapping[Case, Spent]) -> Case | None:
    """The case to run next: all get `MIN_ROUNDS`, one after the other; then all get about the same time, until they
    have enough. None: all have."""
    short = [case for case in spent if spent[case].rounds < MIN_ROUNDS]
    if short:
        return min(short, key=lambda case: (spent[case].rounds, case))
    unfinished = [case for case in spent if spent[case].rounds < case.most_rounds]
    return min(unfinished, key=lambda case: (spent[case].seconds, case), default=None)


def beside_a_stream(number: int) -> bool:
    """Whether this round of a case measures the disturbance of a stream rather than latency."""
    return number % STREAM_EVERY == 1


def spread(values: Iterable[float | None], scale: float = 1000.0) -> Spread | None:
    """Of the values there are, times `scale`; None if there are none. p99 by nearest rank."""
    there = sorted(value * scale for value in values if value is not None)
    if not there:
        return None
    n = len(there)
    p99 = there[math.ceil(0.99 * n) - 1] if n >= ENOUGH_FOR_P99 else None
    return Spread(n, statistics.median(there), p99, there[-1])


def covered_s(intervals: Iterable[Interval]) -> float:
    """How long at least one of them lasted."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def overlap(one: Interval, other: Interval) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def row(case: Case, system: str, record: Record, colocated: Record, memcpy_gbps: float) -> Row:
    """Both records hold the same prompts in the same order; overheads are per prompt."""
    pairs = list(zip(record.timings, colocated.timings, strict=True)) if record is not colocated else []
    return Row(
        prompt_tokens=case.prompt_tokens,
        concurrent=case.concurrent,
        system=system,
        handover_ms=spread(timing.handover_s for timing in record.timings),
        ttft_ms=spread(timing.first_at - timing.asked_at for timing in record.timings),
        ttft_over_colocated_ms=spread(
            (ours.first_at - ours.asked_at) - (zero.first_at - zero.asked_at) for ours, zero in pairs
        ),
        second_token_over_colocated_ms=spread(
            (ours.second_at - ours.asked_at) - (zero.second_at - zero.asked_at) for ours, zero in pairs
        ),
        uncovered_ms=spread(timing.uncovered_s for timing in record.timings),
        other_tokens=sum(ours.tokens != zero.tokens for ours, zero in pairs),
        gbps=record.moved_bytes / record.moving_s / 1e9 if record.moving_s else None,
        memcpy_gbps=memcpy_gbps,
        itl_alone_ms=spread(record.alone_s),
        itl_serving_ms=spread(record.serving_s),
        itl_receiving_ms=spread(record.receiving_s),
    )


def faster_cases(rows: Sequence[Row], system: str, others: Sequence[str]) -> tuple[int, int]:
    """In how many cases this system's median hand-over is below all the others', and of how many."""
    medians = {(each.prompt_tokens, each.concurrent, each.system): each.handover_ms for each in rows}
    cases = sorted({(each.prompt_tokens, each.concurrent) for each in rows})
    compared = [
        [found.median for name in (system, *others) if (found := medians.get((*case, name))) is not None]
        for case in cases
    ]
    whole = [values for values in compared if len(values) == 1 + len(others)]
    return sum(values[0] < min(values[1:]) for values in whole), len(whole)
