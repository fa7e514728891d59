"""What an operator sees of a fleet: plain values. Who is in it: `router/membership`; what each holds: routing/fleet."""

from dataclasses import dataclass, field
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
    """`pool` is what the router uses it for now. Times are seconds; `seconds_since_token` is -1 before the first.
    `step_s`: what a step with decodes takes of late, as the router hears them come; -1 before the second."""

    worker: WorkerInfo
    pool: Pool
    health: Health
    load: Load
    seconds_since_heartbeat: float
    seconds_since_token: float
    prefills: int
    decodes: int
    step_s: float = -1.0


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of seconds, as `core/slo` has them; -1 where there is none."""

    p50_s: float = -1.0
    p90_s: float = -1.0
    p99_s: float = -1.0


@dataclass(frozen=True, slots=True)
class RecentOutputs:
    """One SLO class's outputs that ended in the last minute, how many met every objective, TTFT of those that finished,
    and TPOT of those that finished with more than one token."""

    ended: int = 0
    met: int = 0
    ttft: Percentiles = field(default_factory=Percentiles)
    tpot: Percentiles = field(default_factory=Percentiles)


@dataclass(frozen=True, slots=True)
class ClassStatus:
    """One SLO class: its objectives in seconds (infinite: it has none), and of the last five minutes how many outputs
    ended, how many of them met every objective, and how many of those there were per second."""

    name: str
    ttft_s: float
    ttft_per_token_s: float
    tpot_s: float
    itl_p99_s: float
    ended: int
    met: int
    goodput_rps: float
    last_minute: RecentOutputs = field(default_factory=RecentOutputs)


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """KV from a prefill worker to a decode worker in the last five minutes: transfers that arrived, those that failed,
    bytes, and of these the bytes that were there before the prefill ended. Names are empty for all links that are not
    listed, together."""

    source: str
    destination: str
    transfers: int
    failed: int
    bytes: int
    bytes_before_prefill_ended: int


class Phase(StrEnum):
    """Where a running request is."""

    WAITING = "waiting"  # it has no route
    PREFILL = "prefill"  # its prompt is read
    TRANSFER = "transfer"  # that is done, or was elsewhere; its KV is taken up by the worker that decodes it
    DECODE = "decode"  # its tokens come


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """One output on its way, `id#1` for a request's second. `since_s`: its arrival. Workers are names; none is empty,
    as `prefill_worker` is where the decode worker reads the prompt."""

    request_id: str
    slo_class: str
    phase: Phase
    prompt_tokens: int
    output_tokens: int
    since_s: float
    prefill_worker: str
    decode_worker: str


@dataclass(frozen=True, slots=True)
class RunningRequests:
    """The newest first, and how many there are."""

    requests: tuple[RunningRequest, ...] = ()
    total: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """A route that was bound for a request: `predicted` to be good, or chosen by the workers' pools. Times are seconds
    from then on: `left_s` until its first token was due (infinite: never), `read_s` and `ttft_s` as predicted until the
    prompt is read and the first token out, `first_token_s` when that was (-1: not yet), `since_s` until now. `waited_s`
    is the time before; `behind` how many still waited. `moved`: it came from another decode worker, KV and all.
    `ended`: how, if it failed or was left."""

    decode_worker: str
    prefill_worker: str
    moved: bool
    predicted: bool
    waited_s: float
    behind: int
    left_s: float
    read_s: float
    ttft_s: float
    first_token_s: float
    since_s: float
    ended: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request has the workers that it has, or waits. `ttft_s`, `tpot_s` and `itl_p99_s` are its objectives, the
    first for a prompt of its length; infinite: none. `place` in the line is from 1; 0: it does not wait."""

    request_id: str
    slo_class: str
    priority: int
    prompt_tokens: int
    output_tokens: int
    since_s: float
    ttft_s: float
    tpot_s: float
    itl_p99_s: float
    place: int
    waits_for: str
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetStatus:
    model: str
    workers: tuple[WorkerStatus, ...]
    waiting_requests: int
    running_requests: int
    router_uuid: str
    classes: tuple[ClassStatus, ...] = ()
    links: tuple[LinkStatus, ...] = ()
