"""What a worker is, what it holds, and the jobs a router gives it: plain values shared by router, worker and engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from splitserve.core.request import FinishReason, Logprob, SamplingParams, Tool, ToolCall, ToolChoice
from splitserve.core.versions import Versions


class Pool(StrEnum):
    """What the router uses a worker for now. Every worker can do both."""

    PREFILL = "prefill"
    DECODE = "decode"


class KvMode(StrEnum):
    """Who moves KV, and when."""

    PUSH = "push"  # The prefill worker writes each layer as soon as it is computed.
    PULL = "pull"  # The decode worker reads after prefill (vLLM's stock NixlPullConnector).


@dataclass(frozen=True, slots=True)
class KvFormat:
    """A worker's KV as a whole, over all of its ranks. What must agree before one worker may write another's is
    `kv/layout.differing_field`'s to say."""

    model_fingerprint: str
    dtype: str
    block_size: int  # tokens
    layers: int
    kv_heads: int
    head_dim: int
    block_bytes: int  # one block of one layer, all heads
    mode: KvMode
    transport: str  # "nixl", "shm" or "tcp"


@dataclass(frozen=True, slots=True)
class KvPart:
    """What one rank holds of its worker's KV: the layers of its pipeline stage, the heads of its tensor rank. Where
    ranks outnumber heads, each head has `replicas` holders, of which this is number `replica`."""

    first_layer: int
    layers: int
    first_head: int
    heads: int
    tensor_rank: int = 0
    replica: int = 0
    replicas: int = 1


CONTROL_UNSAID = Versions(2, 2)  # what every release spoke before they said it


@dataclass(frozen=True, slots=True)
class KvPeer:
    """One rank's KV control channel. `uuid` is `rank_uuid`'s: one process start, and so is `public_key`. `control`: the
    versions of its messages (`kv/messages`)."""

    uuid: str
    endpoint: str  # tcp://host:port
    part: KvPart
    public_key: str = ""  # of CURVE, in Z85; empty: it has none
    control: Versions = CONTROL_UNSAID


def rank_uuid(worker: str, rank: int) -> str:
    """What a worker's rank is called among KV peers; `rank` counts stage by stage, tensor ranks within."""
    return f"{worker}/{rank}"


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step of a worker's engine takes, in seconds through all `stages`: the coefficients of `latency/fit`.
    Beyond a break (infinite: there is none) the slope changes by `..._more_s`."""

    fixed_s: float
    prefill_fixed_s: float
    token_s: float
    token_break: float
    token_more_s: float
    pair_s: float
    chunk_s: float
    decode_s: float
    decode_break: float
    decode_more_s: float
    context_s: float
    stages: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself when it joins. `uuid` is one process start; `name` is for people. `step_cost`: None
    if nobody has measured its engine."""

    uuid: str
    name: str
    pool: Pool
    model: str
    kv: KvFormat
    kv_peers: tuple[KvPeer, ...]  # one per rank
    total_blocks: int
    max_sequences: int
    max_model_len: int
    engine: str
    pid: int = 0
    metrics_address: str = ""
    restores: tuple[str, ...] = ()  # sampling fields whose state a request can bring along: `core/sampler_state`
    loras: tuple[str, ...] = ()  # names of the LoRA adapters that it has
    step_cost: StepCost | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker grants a router now; `seen_jobs` says up to which job of the router's stream that holds.

    A prefill is accepted while `prefill_tokens` (accepted, not yet computed) is below `prefill_token_limit`. A decode
    that waits for KV is accepted while its blocks fit `parked_limit_blocks`: the rest is the prefill reserve.
    `growth_blocks` of the free ones are what running decodes are expected to need yet: no new decode gets them.

    `tpot_s`, `slack_s` and `slowdown` are its `Pace`.
    """

    seen_jobs: int
    free_blocks: int
    free_sequences: int
    prefill_tokens: int
    prefill_token_limit: int
    parked_limit_blocks: int
    running: int
    quarantined_blocks: int
    pinned_blocks: int
    pool: Pool
    draining: bool
    produced_tokens: int
    routers: int = 1  # attached to the worker now, this one included
    tpot_s: float = inf
    slack_s: float = inf
    slowdown: float = 1.0
    growth_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a job's request is to meet, in seconds: its first token from now on, each token after it in the mean, and
    the longest gap between two (99 of 100). Infinite: it has no such objective."""

    first_token_s: float = inf
    tpot_s: float = inf
    itl_s: float = inf

    @property
    def step_s(self) -> float:
        """What its engine's steps may take in the mean, once its first token is out."""
        return min(self.tpot_s, self.itl_s)


@dataclass(frozen=True, slots=True)
class Pace:
    """How an engine's decodes stand: the tightest mean step that their objectives allow, the time for prompts that they
    leave now (`routing/slack`), and what steps take of late, as a multiple of its step cost. Infinite: none of them has
    an objective."""

    tpot_s: float = inf
    slack_s: float = inf
    slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class Ticket:
    """A claim on KV that the ranks of `source` write into blocks of `destination`'s. A new try has a new epoch."""

    transfer_id: str
    epoch: int
    source: tuple[KvPeer, ...]
    destination: tuple[KvPeer, ...]
    handover: bytes = b""  # pull mode: the source engine's parameters for the destination engine


@dataclass(frozen=True, slots=True)
class PrefillJob:
    """Read `prompt`, leave its KV to the ticket's destination; the sampled token is dropped."""

    job_id: str
    request_id: str
    prompt: tuple[int, ...]
    ticket: Ticket
    deadline_s: float
    priority: int = 0
    lora: str = ""
    cache_salt: str = ""
    traceparent: str = ""  # W3C Trace Context; empty: not traced
    objectives: Objectives = Objectives()


@dataclass(frozen=True, slots=True)
class Parse:
    """A chat's output: reasoning and tool calls are told from text where the worker has parsers for them."""

    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """Produce the tokens after `prompt` + `output`. `output` was already sent to the client (a request that goes on
    here): deltas start at index len(output). With a ticket, the KV of all these tokens but the last comes from its
    source; without, compute it. `parse` None: the output is plain text. `sampling.n` is always 1."""

    job_id: str
    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float
    output: tuple[int, ...] = ()
    ticket: Ticket | None = None
    priority: int = 0
    lora: str = ""
    cache_salt: str = ""
    traceparent: str = ""
    parse: Parse | None = None
    objectives: Objectives = Objectives()


Job = PrefillJob | DecodeJob


class Failure(StrEnum):
    """Why a job ended without finishing."""

    NOT_NOW = "not_now"  # beyond the worker's credits; cost nothing
    TRANSFER = "transfer"  # the KV did not arrive
    CANCELLED = "cancelled"
    MIGRATED = "migrated"  # stopped on request; its KV waits under the ticket it was handed over with
    INVALID = "invalid"  # the request's own fault
    ENGINE = "engine"  # the worker's own fault


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Source side: what was written. `uncovered_s`: last WRITE done minus end of the prefill (negative: earlier)."""

    bytes: int = 0
    bytes_before_prefill_ended: int = 0
    uncovered_s: float = 0.0
    writes: int = 0
    writing_s: float = 0.0  # summed over WRITEs, from posted to done
    queued_s: float = 0.0  # the longest that a WRITE waited for room on its link


@dataclass(frozen=True, slots=True)
class TransferEnd:
    """One side of a transfer is over, on all ranks of its worker. `reason`: what a failure is counted under, empty on
    success."""

    source_side: bool
    stats: TransferStats
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KvCounts:
    """What a worker's transfers have come to since it started; every number only grows. `leases`: prefills that ended
    unclaimed and whose KV was kept for a while; `dropped`: messages and calls that fit no state, by kind."""

    written_bytes: int = 0
    writes: int = 0
    cancels: int = 0
    leases: int = 0
    expired_leases: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: either `finish_reason` or `failure` with a sentence is set."""

    finish_reason: FinishReason | None = None
    failure: Failure | None = None
    message: str = ""
    field: str = ""
    handover: bytes = b""
    transfer: TransferStats | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine step made for one job. `index`: output position of the first token. The last has `outcome`.

    A prefill job has exactly one delta with its outcome when its prompt is computed AND its KV is sent (push) or ready
    to be read (pull).
    """

    job_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[tuple[Logprob, ...], ...] = ()
    outcome: Outcome | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[tuple[Logprob, ...], ...] = ()  # with the first token only
