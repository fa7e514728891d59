"""What a worker needs of an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from splitserve.core.cached import CacheEvent
from splitserve.core.worker import Delta, Job, KvCounts, KvFormat, KvPeer, Pace, StepCost, Ticket, TransferEnd

OnDeltas = Callable[[Sequence[Delta]], None]
OnTransfer = Callable[[TransferEnd], None]
OnCached = Callable[[Sequence[CacheEvent]], None]

NO_TOOL_PARSER = "this worker has no tool parser; start it with engine: {tool_parser: ...}"
NO_TOOLS = "asks for a call, but there are no tools; give some, or leave it out"
NEEDS_NO_TICKET = "come from a decode that computes its prompt itself: send the job without a ticket"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Known once the engine has started and warmed up. Blocks are of `kv.block_size` tokens."""

    uuid: str
    kind: str  # "vllm" or "sim"
    kv: KvFormat
    kv_peers: tuple[KvPeer, ...]  # one per rank
    total_blocks: int
    max_sequences: int
    max_model_len: int
    max_batched_tokens: int
    restores: tuple[str, ...] = ()  # sampling fields whose state a decode can bring along: `core/sampler_state`
    loras: tuple[str, ...] = ()  # names of the LoRA adapters that it has
    step_cost: StepCost | None = None  # None: it is not known, and prompts are read without regard to objectives


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """KV blocks by what holds them. free + quarantined + held by running requests and pinned sends = total. `counts`
    and `preemptions`, of requests that lost their blocks and were computed anew, are history, of which two loads with
    the same blocks may differ. `turned_at`, on the monotonic clock: when its loop last began a step or
    found nothing to do, about every second; None where that can't be known."""

    free_blocks: int
    pinned_blocks: int  # of ended prefills whose KV is still being sent
    quarantined_blocks: int  # of ended decodes that a silent peer may still write
    in_flight_bytes: int = 0  # of WRITEs to other workers
    counts: KvCounts = field(default_factory=KvCounts, compare=False)
    pace: Pace = field(default=Pace(), compare=False)
    preemptions: int = field(default=0, compare=False)
    turned_at: float | None = field(default=None, compare=False)


def unheard(_: TransferEnd) -> None:
    """`on_transfer` of whoever has no use for it."""


def uncached(_: Sequence[CacheEvent]) -> None:
    """`on_cached` of whoever has no use for it."""


class Engine(Protocol):
    """Runs jobs. All methods are thread-safe and, `start` and `close` aside, return at once."""

    def start(
        self, on_deltas: OnDeltas, on_transfer: OnTransfer = unheard, on_cached: OnCached = uncached
    ) -> EngineInfo:
        """Blocks until every sampler path is warm. From then on `on_deltas` is called from the engine's thread, once
        per engine step, with what the step made for all jobs; and `on_transfer` from a thread that must not wait, once
        for each side of every transfer, also of those that belong to no job; and `on_cached` from a thread of its own,
        also while it starts, with what became of its prefix cache, in order, if that can be followed. Raises
        ConfigError for a model or setting it can't serve."""

    def submit(self, job: Job) -> None:
        """Takes a job; whatever is wrong with it comes back as a Delta with an Outcome, as does its end."""

    def cancel(self, job_id: str) -> None:
        """Ends a job; its Delta says Failure.CANCELLED. Unknown ids are ignored. Blocks that a peer may still write
        stay quarantined until that is over."""

    def hand_over(self, job_id: str, ticket: Ticket, *, at_end: bool) -> None:
        """Offers the KV of a running decode under this ticket: that of the tokens so far, or with `at_end` that of all
        tokens when it stops, which it does at the next token. Its last Delta then says Failure.MIGRATED. Ignored if the
        job is unknown, ends first or has not made a token here."""

    def connect(self, peers: Sequence[KvPeer]) -> None:
        """Connects the KV control channel and transport to these peers before the first request needs them."""

    def load(self) -> EngineLoad:
        """Raises EngineError once the engine is broken for good: the process must end."""

    def close(self) -> None:
        """Ends every job and frees what the engine holds."""
