"""What the planner decides, as plain values: workers of a role, their parallelism, the GPUs that they sit on."""

from dataclasses import dataclass
from enum import StrEnum

from splitserve.latency.model import LatencyModel
from splitserve.routing.admission import PREFILL_STEPS_AHEAD


class Role(StrEnum):
    """What a worker does in a plan."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"  # both, with chunked prefill


@dataclass(frozen=True, slots=True)
class Parallelism:
    """GPUs of one worker: `tp` tensor ranks in each of `pp` pipeline stages."""

    tp: int = 1
    pp: int = 1

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"TP{self.tp}" + (f" PP{self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True, slots=True)
class Link:
    """What KV moves over: `bytes_per_s` in each direction, `latency_s` per transfer. Transfers queue on it."""

    bytes_per_s: float
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker of a deployment, as the simulator needs it.

    `node` is where it sits. `kv_blocks` of `block_tokens` tokens each are what its GPUs have left beside the weights.
    `cold_start_s`: seconds from the simulation's start until it takes its first request. `admits_by_peak`: as a worker
    does, it takes no decode that its decodes will leave no room for (`routing/peak`); else by what they hold now.
    `steps_ahead`: prompts for so many steps are sent to it, and wait for the others in the router.
    """

    role: Role
    latency: LatencyModel
    kv_blocks: int
    node: int = 0
    block_tokens: int = 16
    max_sequences: int = 256
    max_batched_tokens: int = 2048  # of one step: the prefill chunk
    max_model_len: int = 8192
    prefix_caching: bool = True
    cold_start_s: float = 0.0
    admits_by_peak: bool = True
    steps_ahead: int = PREFILL_STEPS_AHEAD


@dataclass(frozen=True, slots=True)
class Deployment:
    """Workers and what joins them. Between workers of one node KV moves over `within` (NVLink: each worker has its
    own), between nodes over `between` (NICs: all workers of a node share one).

    In splitserve the decode worker makes every token; with `prefill_answers` the prefill worker's is the first one, as
    in DistServe and in vLLM's own connectors: for comparing with what they publish.
    """

    workers: tuple[WorkerSpec, ...]
    kv_bytes_per_token: float
    layers: int
    within: Link
    between: Link
    layerwise: bool = True  # KV is pushed while the prompt is read; else after prefill
    prefill_answers: bool = False

    def __post_init__(self) -> None:
        assert self.workers
