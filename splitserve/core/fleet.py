"""What an operator sees of a fleet: plain values. Who is in it: `router/membership`; what each holds: routing/fleet."""

from dataclasses import dataclass
from enum import StrEnum

from splitserve.core.worker import Load, Pool, WorkerInfo


class Health(StrEnum):
    """Whether a worker gets jobs."""

    READY = "ready"
    SILENT = "silent"  # missed heartbeats, not yet given up
    FAILING = "failing"  # asked for a token it made none
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """`pool` is what the router uses it for now. Times are seconds; `seconds_since_token` is -1 before the first."""

    worker: WorkerInfo
    pool: Pool
    health: Health
    load: Load
    seconds_since_heartbeat: float
    seconds_since_token: float
    prefills: int
    decodes: int


@dataclass(frozen=True, slots=True)
class FleetStatus:
    model: str
    workers: tuple[WorkerStatus, ...]
    waiting_requests: int
    running_requests: int
    router_uuid: str
