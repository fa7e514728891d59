"""What the planner is asked, resolved: names looked up, files read. `inputs` makes it from what people write."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from splitserve.core.slo import Slo
from splitserve.latency.gpus import Gpu
from splitserve.latency.model import LatencyModel
from splitserve.latency.shape import ModelShape
from splitserve.planner.deployment import Parallelism
from splitserve.planner.machines import Machines
from splitserve.workload.workload import Workload


class Objective(StrEnum):
    """What the best placement has most of: goodput per GPU, per hour's cost or per watt; or the fewest GPUs (the
    cheapest, where prices differ) that reach the rate asked for."""

    PER_GPU = "goodput-per-gpu"
    PER_COST = "goodput-per-cost"
    PER_WATT = "goodput-per-watt"
    FEWEST = "fewest-gpus"


@dataclass(frozen=True, slots=True)
class Costs:
    """What a worker of some parallelism is on some GPU: None where it can't be said or the weights don't fit."""

    latency: LatencyModel
    kv_tokens: int  # what its GPUs hold of KV beside the weights, all stages together


CostsOf = Callable[[Gpu, Parallelism], "Costs | str"]  # a string says why there are none


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard the search tries. More of each is slower and surer."""

    requests: int = 1000  # of one simulation
    seeds: int = 5  # simulations at the goodput point, for its confidence interval
    finalists: int = 4  # placements that are simulated jointly
    rate_step: float = 0.05  # two rates closer than this share are the same: the search's step


@dataclass(frozen=True, slots=True)
class Question:
    """`rate_rps`: what must be served, if anything in particular must."""

    model: ModelShape
    machines: Machines
    slo: Slo
    workload: Workload
    costs: CostsOf
    objective: Objective = Objective.PER_GPU
    rate_rps: float | None = None
    max_model_len: int = 8192
    block_tokens: int = 16
    max_sequences: int = 256
    chunks: tuple[int, ...] = (512, 2048, 8192)  # most tokens in one step, tried for colocated workers
    prefill_chunk: int = 8192  # of prefill workers
    effort: Effort = Effort()
    seed: int = 0
