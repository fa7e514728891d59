"""What a search has found: placements, what each would serve, and why the others lost. Plain values.

`search` makes them; the plan file, the tables and the report read them.
"""

from dataclasses import dataclass

from splitserve.latency.model import Provenance
from splitserve.planner.deployment import Deployment, Parallelism, Role
from splitserve.planner.simulator.outcome import Outcome


@dataclass(frozen=True, slots=True)
class PoolPlacement:
    """Workers of one role and shape. `nodes[i]` has the nodes on which worker i sits, one per pipeline stage at most;
    `chunk_tokens` is the most tokens of one step."""

    role: Role
    gpu: str
    parallelism: Parallelism
    nodes: tuple[tuple[int, ...], ...]
    chunk_tokens: int

    @property
    def workers(self) -> int:
        return len(self.nodes)

    @property
    def gpus(self) -> int:
        return self.workers * self.parallelism.gpus


@dataclass(frozen=True, slots=True)
class Placement:
    """`affinity` is DistServe's: "high" lets pools sit anywhere, "low" puts the stages that exchange KV on one node,
    "none" is colocated serving. Cost in the datasheet's currency per hour."""

    pools: tuple[PoolPlacement, ...]
    affinity: str
    cost_per_hour: float
    watts: float

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)

    @property
    def colocated(self) -> bool:
        return any(pool.role is Role.COLOCATED for pool in self.pools)

    def __str__(self) -> str:
        return " + ".join(f"{p.workers} {p.role} {p.parallelism} on {p.gpu}" for p in self.pools)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95% confidence interval (Student's t)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RatePoint:
    """What a placement does at one arrival rate, over several seeds."""

    rate_rps: float
    attainment: Interval


@dataclass(frozen=True, slots=True)
class Judged:
    """A placement that was simulated as a whole. `goodput_rps` is 0 where no rate meets the SLO. `value` is the
    objective's (more is better). `outcome` is one seed's simulation at the goodput point; `bottleneck` says what breaks
    first above it: "ttft" or "tpot". `sources` tells for prefill and decode where latencies came from."""

    placement: Placement
    deployment: Deployment
    goodput_rps: Interval
    value: float
    points: tuple[RatePoint, ...]
    outcome: Outcome
    bottleneck: str
    sources: tuple[tuple[str, Provenance], ...]

    @property
    def goodput_per_gpu(self) -> float:
        return self.goodput_rps.mean / self.placement.gpus


@dataclass(frozen=True, slots=True)
class PhaseGoodput:
    """What one worker of a role could serve by itself, its other phase being free. `reason` says why, where it is 0."""

    role: Role
    gpu: str
    parallelism: Parallelism
    goodput_rps: float
    bound_rps: float  # of the queueing bound that came first
    reason: str = ""

    @property
    def per_gpu(self) -> float:
        return self.goodput_rps / self.parallelism.gpus


@dataclass(frozen=True, slots=True)
class Infeasible:
    """Nothing meets the SLO (or the rate). `binding` is "ttft", "tpot", "memory" or "rate"; the nearest values are
    what would be met with the rest as asked, None where nothing is near."""

    binding: str
    sentence: str
    nearest_rate_rps: float | None
    nearest_ttft_s: float | None
    nearest_tpot_s: float | None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """`judged` is sorted, the best first; empty only if `infeasible` says why. `best_colocated` is among them.
    `adaptive_rps`: the best one's goodput if the router schedules by the objectives, and not by pools."""

    judged: tuple[Judged, ...]
    phases: tuple[PhaseGoodput, ...]
    infeasible: Infeasible | None
    simulated_requests: int
    cpu_s: float
    adaptive_rps: Interval | None = None

    @property
    def best(self) -> Judged | None:
        return self.judged[0] if self.judged and self.infeasible is None else None

    @property
    def best_colocated(self) -> Judged | None:
        return next((judged for judged in self.judged if judged.placement.colocated), None)
