"""What a simulation gives back: columns of times, one row per request, and what each resource did."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitserve.core.slo import Timelines

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """What one worker did. `busy_share` of the simulated time, of its slowest stage."""

    name: str
    role: str
    requests: int
    busy_share: float
    peak_kv_share: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class LinkUse:
    """`busy_share`: of the simulated time in which the link carried bytes."""

    name: str
    carried_bytes: float
    busy_share: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times are seconds on the workload's clock; NaN where a phase was skipped, inf where it never came.

    The phases of a request follow each other: arrival, `bound` (a route was chosen), `prefill_start`, `prefill_end`,
    `kv_ready` (the decode worker has it all), first token, last token.
    """

    timelines: Timelines
    bound: Times
    prefill_start: Times
    prefill_end: Times
    kv_ready: Times
    cached_tokens: npt.NDArray[np.int64]  # of each prompt, found in the prefill worker's prefix cache
    prefill_worker: npt.NDArray[np.int32]  # -1: none
    decode_worker: npt.NDArray[np.int32]
    workers: tuple[WorkerUse, ...]
    links: tuple[LinkUse, ...]
    simulated_s: float
    events: int
