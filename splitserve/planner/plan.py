"""The plan file: what was asked, which placement answers it, what that would serve and why the others lost.

YAML with a schema version. `planned` makes a plan from a search; tables, report, `explain`, `compare` and `watch` read
plans, never a search. The same question and seed write the same bytes: nothing in it depends on clock or machine.
"""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from splitserve.core.config import Count, Settings, parse, read
from splitserve.core.errors import ConfigError
from splitserve.latency.model import Trust
from splitserve.planner.deployment import Parallelism, Role
from splitserve.planner.inputs import Inputs

VERSION = 1
LINKS_SHOWN = 16

Quantiles = dict[str, float]  # by name: p50 is the median


class PoolFigures(Settings):
    """Workers of one role and shape; `nodes[i]` are the nodes on which worker i sits."""

    role: Role
    gpu: str
    tp: int = Field(ge=1)
    pp: int = Field(ge=1)
    workers: int = Field(ge=1)
    chunk_tokens: int = Field(ge=1, description="most tokens of one step")
    nodes: tuple[tuple[int, ...], ...]

    @property
    def parallelism(self) -> Parallelism:
        return Parallelism(self.tp, self.pp)

    @property
    def kind(self) -> str:
        """Of its workers; a colocated worker's chunk is part of what it is."""
        chunk = f" chunk {self.chunk_tokens}" if self.role is Role.COLOCATED else ""
        return f"{self.role} {self.parallelism}{chunk}"

    def __str__(self) -> str:
        return f"{self.workers} {self.kind} on {self.gpu}"


class PlacementFigures(Settings):
    affinity: str
    gpus: int
    cost_per_hour: float
    watts: float
    pools: tuple[PoolFigures, ...] = Field(min_length=1)

    @property
    def colocated(self) -> bool:
        return any(pool.role is Role.COLOCATED for pool in self.pools)

    @property
    def spans_nodes(self) -> bool:
        return len({node for pool in self.pools for nodes in pool.nodes for node in nodes}) > 1

    def __str__(self) -> str:
        """Their GPU once, where all have the same."""
        if len({pool.gpu for pool in self.pools}) > 1:
            return " + ".join(map(str, self.pools))
        return " + ".join(f"{pool.workers} {pool.kind}" for pool in self.pools) + f" on {self.pools[0].gpu}"


class IntervalFigures(Settings):
    """A mean over seeds with its 95% confidence interval."""

    mean: float
    low: float
    high: float


class RateFigures(Settings):
    """Attainment at one arrival rate, with its 95% confidence interval over seeds."""

    rate_rps: float
    mean: float
    low: float
    high: float


class Parts(Settings):
    """Where the mean request's time goes, seconds, in order. `first_token_s`: from KV's arrival to the first token."""

    wait_s: float
    prefill_queue_s: float
    prefill_s: float
    transfer_s: float  # what the prefill did not cover
    first_token_s: float
    decode_s: float

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.prefill_queue_s + self.prefill_s + self.transfer_s + self.first_token_s


class RoleUse(Settings):
    """All workers of one role together."""

    role: str
    workers: int
    busy_mean: float
    busy_most: float
    kv_peak: float
    preemptions: int


class LinkFigures(Settings):
    name: str
    carried_bytes: float
    busy_share: float


class SourceFigures(Settings):
    """Where a phase's latencies come from; `error` is the source's own held-out mean relative error."""

    phase: str
    trust: Trust
    source: str
    error: float | None = None

    def __str__(self) -> str:
        error = f"held-out error {self.error:.1%}" if self.error is not None else "held-out error unknown"
        return f"{self.phase}: {self.trust}, {self.source} ({error})"


class Candidate(Settings):
    """One placement that was simulated as a whole. Quantiles, parts and use are those at `goodput_rps`."""

    placement: PlacementFigures
    goodput_rps: IntervalFigures
    goodput_per_gpu: float
    goodput_per_cost: float | None = Field(description="requests per second for one currency unit per hour")
    goodput_per_kilowatt: float | None
    bottleneck: str = Field(description="what breaks first above the goodput: ttft or tpot")
    attainment: tuple[RateFigures, ...]
    ttft_s: Quantiles
    tpot_s: Quantiles
    ttft_met: float = Field(description="share of requests within the TTFT objective")
    tpot_met: float
    both_met: float
    parts: Parts
    slowest_parts: Parts = Field(description="the same of the tenth of requests with the longest TTFT")
    use: tuple[RoleUse, ...]
    links: tuple[LinkFigures, ...] = Field(description=f"the busiest, at most {LINKS_SHOWN}")
    latencies: tuple[SourceFigures, ...]
    lost: str = Field("", description="why another placement was preferred; empty for the chosen one")


class PhaseFigures(Settings):
    """What one worker could serve if its other phase were free."""

    role: Role
    gpu: str
    tp: int
    pp: int
    goodput_rps: float
    goodput_per_gpu: float
    reason: str = ""

    @property
    def parallelism(self) -> Parallelism:
        return Parallelism(self.tp, self.pp)


class LengthFigures(Settings):
    """Of prompts or outputs, in tokens; `workload.Quantiles` in the plan file."""

    mean: float
    p10: float
    p25: float
    p50: float
    p75: float
    p90: float
    p99: float
    longest: float


class WorkloadFigures(Settings):
    """What was planned for."""

    name: str
    prompt: LengthFigures
    output: LengthFigures
    prefix_hit: float = Field(description="share of prompt tokens that a cache without bound would have read before")
    notes: tuple[str, ...] = ()


class EngineFigures(Settings):
    """What every worker's engine was taken to be started with."""

    max_model_len: Count
    max_sequences: Count
    block_tokens: Count


class Plan(Settings):
    """One answer, with all that made it."""

    version: Literal[1] = 1
    splitserve: str = Field(description="the release that wrote it")
    inputs: Inputs
    chosen: Candidate
    adaptive_rps: IntervalFigures | None = Field(
        None, description="goodput of the chosen workers if the router schedules by the objectives, and not by pools"
    )
    runners_up: tuple[Candidate, ...]
    phases: tuple[PhaseFigures, ...]
    workload: WorkloadFigures
    engine: EngineFigures
    seeds: int
    simulated_requests: int
    notes: tuple[str, ...]

    @property
    def better_by_pools(self) -> bool:
        """Whether scheduling by the objectives loses to the pools, beyond its interval."""
        return self.adaptive_rps is not None and self.adaptive_rps.high < self.chosen.goodput_rps.mean

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return (self.chosen, *self.runners_up)


def write_plan(plan: Plan, file: Path) -> None:
    """Raises ConfigError naming a file that can't be written."""
    write_text(file, _HEAD + dumped(plan))


def read_plan(file: Path) -> Plan:
    """Raises ConfigError naming the file and the key at fault, or the schema version that it does not know."""
    said = read(file)
    version = said.get("version")
    if version != VERSION:
        found = "is missing" if version is None else f"{version!r} is unknown"
        raise ConfigError(
            f"{file}: version", f"{found}; `splitserve plan --out` writes plan files of version {VERSION}"
        )
    return parse(Plan, said, str(file))


def write_text(file: Path, text: str) -> None:
    """Raises ConfigError naming a file that can't be written."""
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError(str(file), f"can't be written: {error.strerror or error}") from error


def dumped(value: Settings) -> str:
    """As YAML, keys in their order, the innermost lists and mappings on one line."""
    return yaml.safe_dump(value.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


_HEAD = "# Written by `splitserve plan`. `splitserve plan explain` and `plan report` tell what it says.\n"


def rounded(value: float) -> float:
    """Four digits: no figure here is known better."""
    return float(f"{value:.4g}")
