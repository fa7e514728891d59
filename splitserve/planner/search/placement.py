"""Puts a candidate's workers on nodes and makes the deployment that the simulator serves. Pure.

Tensor ranks of a stage share a node. DistServe's two cases: with high affinity pools sit anywhere, packed tightly; with
low affinity every node gets its share of both pools, so that less KV leaves a node. Low is taken where the links
between nodes would be busy with KV otherwise. Which decode worker a prefill worker's KV goes to is the router's choice,
not ours, so each is taken to be equally likely.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitserve.planner.deployment import Deployment, Link, WorkerSpec
from splitserve.planner.machines import Machines
from splitserve.planner.question import Question
from splitserve.planner.result import Placement, PoolPlacement
from splitserve.planner.search.candidates import Candidate, Option

_BUSY = 0.5  # share of a link's time above which KV queues noticeably

Worker = tuple[int, Option]  # of which pool


@dataclass(slots=True)
class _Free:
    """GPUs left on each node, by the node's place in the machines."""

    machines: Machines
    left: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = [node.gpus for node in self.machines.nodes]

    def take(self, option: Option) -> tuple[int, ...] | None:
        """A node for each stage: one for all, the fullest that has room, or else as few as will do."""
        tp, pp = option.parallelism.tp, option.parallelism.pp
        usable = [n for n, node in enumerate(self.machines.nodes) if node.gpu == option.gpu]
        whole = [n for n in usable if self.left[n] >= tp * pp]
        order = sorted(whole, key=lambda n: self.left[n])[:1] if whole else sorted(usable, key=lambda n: -self.left[n])
        stages = [n for n in order for _ in range(self.left[n] // tp)][:pp]
        if len(stages) < pp:
            return None
        for node in stages:
            self.left[node] -= tp
        return tuple(stages)


def place(question: Question, candidate: Candidate, rate_rps: float) -> Placement | None:
    """None where the GPUs suffice in number but not as they are spread over nodes."""
    high = _pack(question.machines, _widest_first(candidate))
    low = None if candidate.colocated else _pack(question.machines, _mixed(candidate))
    if high is None and low is None:
        return None
    if low is not None and (high is None or _prefers_low(question, high, low, rate_rps)):
        return _placement(candidate, low, "low")
    return _placement(candidate, high or [], "none" if candidate.colocated else "high")


def deployment(question: Question, candidate: Candidate, placement: Placement) -> Deployment:
    """The workers in the order of the pools."""
    specs = [
        _spec(question, option, nodes[0])
        for (option, _), pool in zip(candidate.pools, placement.pools, strict=True)
        for nodes in pool.nodes
    ]
    model, slowest = question.model, min(option.gpu.link_bytes_per_s for option, _ in candidate.pools)
    return Deployment(
        workers=tuple(specs),
        kv_bytes_per_token=model.kv_bytes_per_token,
        layers=model.layers,
        within=Link(slowest),
        between=question.machines.between,
    )


def crossing(placement: Placement) -> float:
    """The share of requests whose KV goes from one node to another."""
    if placement.colocated:
        return 0.0
    prefills, decodes = ([nodes[0] for nodes in pool.nodes] for pool in placement.pools)
    same = sum(prefills.count(node) * decodes.count(node) for node in set(prefills))
    return 1.0 - same / (len(prefills) * len(decodes))


def link_ceiling_rps(question: Question, placement: Placement) -> float:
    """The rate at which the busiest node's link carries KV all the time; inf where none leaves a node."""
    busiest = _leaving([[nodes[0] for nodes in pool.nodes] for pool in placement.pools])
    kv_bytes = question.model.kv_bytes_per_token * question.workload.mean_prompt_tokens
    return question.machines.between.bytes_per_s / (busiest * kv_bytes) if busiest else float("inf")


def _pack(machines: Machines, workers: Sequence[Worker]) -> list[tuple[int, tuple[int, ...]]] | None:
    """Of which pool, and where each worker's stages are; None if one finds no room."""
    free = _Free(machines)
    placed = []
    for pool, option in workers:
        nodes = free.take(option)
        if nodes is None:
            return None
        placed.append((pool, nodes))
    return placed


def _widest_first(candidate: Candidate) -> list[Worker]:
    """So packed, powers of two leave no gaps."""
    workers = [(pool, option) for pool, (option, count) in enumerate(candidate.pools) for _ in range(count)]
    return sorted(workers, key=lambda worker: (-worker[1].parallelism.tp, -worker[1].parallelism.pp, worker[0]))


def _mixed(candidate: Candidate) -> list[Worker]:
    """Pools in proportion all along, so that each node gets its share of both."""
    shares = [
        ((number + 0.5) / count, pool, option)
        for pool, (option, count) in enumerate(candidate.pools)
        for number in range(count)
    ]
    return [(pool, option) for _, pool, option in sorted(shares, key=lambda share: share[:2])]


def _prefers_low(
    question: Question, high: list[tuple[int, tuple[int, ...]]], low: list[tuple[int, tuple[int, ...]]], rate_rps: float
) -> bool:
    kv_bytes_per_s = rate_rps * question.model.kv_bytes_per_token * question.workload.mean_prompt_tokens
    leaving = [_leaving([[nodes[0] for p, nodes in packed if p == pool] for pool in (0, 1)]) for packed in (high, low)]
    busy = leaving[0] * kv_bytes_per_s / question.machines.between.bytes_per_s
    return busy > _BUSY and leaving[1] < leaving[0]


def _leaving(pools: list[list[int]]) -> float:
    """The share of all KV that the busiest node sends or receives. `pools` has the node of each worker."""
    if len(pools) < 2:
        return 0.0
    prefills, decodes = pools
    busiest = 0.0
    for node in {*prefills, *decodes}:
        sends, takes = prefills.count(node) / len(prefills), decodes.count(node) / len(decodes)
        busiest = max(busiest, sends * (1 - takes), takes * (1 - sends))
    return busiest


def _placement(candidate: Candidate, packed: list[tuple[int, tuple[int, ...]]], affinity: str) -> Placement:
    pools = tuple(
        PoolPlacement(
            option.role,
            option.gpu.name,
            option.parallelism,
            tuple(n for p, n in packed if p == pool),
            option.chunk_tokens,
        )
        for pool, (option, _) in enumerate(candidate.pools)
    )
    gpus = [(option.gpu, option.gpus * count) for option, count in candidate.pools]
    cost = sum((gpu.price_per_hour or 0.0) * count for gpu, count in gpus)
    return Placement(pools, affinity, cost, sum(gpu.watts * count for gpu, count in gpus))


def _spec(question: Question, option: Option, node: int) -> WorkerSpec:
    return WorkerSpec(
        role=option.role,
        latency=option.costs.latency,
        kv_blocks=option.costs.kv_tokens // question.block_tokens,
        node=node,
        block_tokens=question.block_tokens,
        max_sequences=question.max_sequences,
        max_batched_tokens=option.chunk_tokens,
        max_model_len=question.max_model_len,
    )
