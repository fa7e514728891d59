"""What is computed from the runs of a router: values and pure functions, no processes, no clock.

CPU is that of the router's processes alone, in seconds of one core.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """What is measured, one after the other."""

    BURST = "burst"
    PACED = "paced"
    FIRST_TOKEN = "first token"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one system. `ttft_s`: the median of its requests."""

    requests: int
    tokens: int
    messages: int
    wall_s: float
    router_cpu_s: float
    client_cpu_s: float
    ttft_s: float

    @property
    def tokens_per_core(self) -> float:
        """Output tokens for a second of the router's CPU."""
        return self.tokens / self.router_cpu_s

    @property
    def cpu_ms_per_request(self) -> float:
        return 1000 * self.router_cpu_s / self.requests

    @property
    def tokens_per_message(self) -> float:
        """1 where every token is a message, or an event, of its own."""
        return self.tokens / self.messages

    @property
    def router_cores(self) -> float:
        return self.router_cpu_s / self.wall_s

    @property
    def client_cores(self) -> float:
        """Near 1 the client, one thread, holds the router up."""
        return self.client_cpu_s / self.wall_s


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident, MiB: with no stream, and with all of them open."""

    idle_mib: float
    held_mib: float
    streams: int

    @property
    def kib_per_stream(self) -> float:
        return 1024 * (self.held_mib - self.idle_mib) / self.streams


@dataclass(slots=True)
class Record:
    """All that was seen of one system. `straight_s`: TTFT of a worker without a router, beside each
    sample of the first token."""

    ours: bool
    samples: dict[Phase, list[Sample]] = field(default_factory=dict)
    straight_s: list[float] = field(default_factory=list)
    memory: Memory | None = None

    def add(self, phase: Phase, sample: Sample) -> None:
        self.samples.setdefault(phase, []).append(sample)

    def tokens_per_core(self, phase: Phase) -> "Spread | None":
        return spread(sample.tokens_per_core for sample in self.samples.get(phase, ()))

    def cpu_ms_per_request(self, phase: Phase) -> "Spread | None":
        return spread(sample.cpu_ms_per_request for sample in self.samples.get(phase, ()))

    def ttft_ms(self) -> "Spread | None":
        return spread(1000 * sample.ttft_s for sample in self.samples.get(Phase.FIRST_TOKEN, ()))

    def added_ttft_ms(self) -> "Spread | None":
        """Over a worker without a router, round by round."""
        routed = self.samples.get(Phase.FIRST_TOKEN, ())
        return spread(
            1000 * (sample.ttft_s - straight_s) for sample, straight_s in zip(routed, self.straight_s, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the rounds."""

    median: float
    least: float
    most: float


def spread(values: Iterable[float]) -> Spread | None:
    there = sorted(values)
    return Spread(statistics.median(there), there[0], there[-1]) if there else None


def best_peer(records: Mapping[str, Record], phase: Phase) -> tuple[str, float] | None:
    """The one with the most tokens for a second of CPU (median), and how many these are; None without peers."""
    found = {
        name: tokens.median
        for name, record in records.items()
        if not record.ours and (tokens := record.tokens_per_core(phase)) is not None
    }
    return max(found.items(), key=lambda item: item[1], default=None)


def ratio(record: Record, records: Mapping[str, Record], phase: Phase) -> float | None:
    """Its tokens for a second of CPU over the best peer's."""
    mine, best = record.tokens_per_core(phase), best_peer(records, phase)
    return None if mine is None or best is None else mine.median / best[1]


def turns(names: Sequence[str], rounds: int) -> list[str]:
    """Who runs when: A B C A B C, so that drift of the machine meets all."""
    return [name for _ in range(rounds) for name in names]
