"""What a worker grants: the one rule by which a worker takes a job and a router predicts that it will.

Pure. `Capacity` is a worker's own account, changed by its event loop alone; the `fits_*` functions work on what a
worker grants, so that a router predicts with what the worker decides by (what a job then takes: `promise.Effect`). It
is not the engine's allocator: blocks are counted here when a job is taken, whether or not the engine has handed them
out yet.

**Why two soft-role workers can't wait for each other for ever.** A decode that waits for KV holds blocks and makes no
progress by itself; everything else (a prefill, a running decode) goes on with what it holds and ends. So only parked
blocks must be bounded: they may take `parked_limit`, and the rest, the *reserve*, is left to work that ends. With

    reserve      = blocks of max_model_len, at most half of all blocks (rounded up)
    parked_limit = all blocks - reserve

whatever a decode can wait for is no larger than the reserve, so the prefill that another worker's parked decode waits
for fits as soon as the work in front of it has ended. A worker with less memory than two prompts of full length can't
park the longest ones: they are computed where they decode. Sequences obey the same rule: one of them stays free for a
prefill, unless there is only one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from splitserve.core.worker import DecodeJob, Failure, Job, Load, Pool, PrefillJob
from splitserve.kv.layout import blocks_for
from splitserve.routing.peak import Expectations, growth_blocks, peak_tokens

PREFILL_STEPS_AHEAD = 2  # prompt tokens accepted ahead of the engine, in steps: one runs, one is ready


@dataclass(frozen=True, slots=True)
class Limits:
    """A worker's fixed bounds, in blocks; the router derives the same from `WorkerInfo`."""

    total: int
    reserve: int

    @classmethod
    def of(cls, total_blocks: int, max_model_len: int, block_size: int) -> "Limits":
        return cls(total_blocks, min(blocks_for(max_model_len, block_size), -(-total_blocks // 2)))

    @property
    def parked_limit(self) -> int:
        return self.total - self.reserve


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a job is not taken. NOT_NOW passes with time, TRANSFER says: compute the prompt where it decodes, INVALID
    that no worker like this one ever can."""

    failure: Failure
    reason: str
    field: str = ""


class Room(Protocol):
    """What a worker grants now; `Load` says what each field means."""

    @property
    def free_blocks(self) -> int: ...
    @property
    def growth_blocks(self) -> int: ...
    @property
    def free_sequences(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def prefill_token_limit(self) -> int: ...
    @property
    def parked_limit_blocks(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def draining(self) -> bool: ...


# One rule for prediction and decision ---------------------------------------------------------------------------------
def decode_blocks(tokens: int, block_size: int) -> int:
    """Blocks that a decode starts with: its context and the first token it makes."""
    return blocks_for(tokens + 1, block_size)


def fits_prefill(load: Room, tokens: int, block_size: int) -> bool:
    """Whether a worker with this load takes a prefill of `tokens` prompt tokens."""
    return _prefill_obstacle(load, tokens, block_size) is None


def fits_decode(load: Room, tokens: int, block_size: int, waits_for_kv: bool) -> bool:
    """Whether a worker with this load takes a decode with `tokens` of context, whose KV comes from elsewhere or not."""
    return _decode_obstacle(load, tokens, block_size, waits_for_kv) is None


def fits_decode_next(load: Room, tokens: int, block_size: int) -> bool:
    """Whether a worker with this load takes a decode that computes its own context now, or as soon as the prompts ahead
    of it are read."""
    blocks = decode_blocks(tokens, block_size)
    return load.free_sequences >= 1 and (_common_obstacle(load, blocks) or _no_room_to_grow(load, blocks)) is None


def most_tokens(load: Room, limits: Limits, block_size: int) -> tuple[int, int, int]:
    """The same rule the other way round, for whoever asks it often: of how many tokens at most a worker with this load
    takes a prefill, a decode that waits for KV, and one that computes its context, if KV can go that way at all; below
    0: none."""
    if load.draining:
        return -1, -1, -1
    free = load.free_blocks
    slot = load.prefill_tokens < load.prefill_token_limit
    sequence = load.free_sequences >= 1
    fixed = max(0, free - load.growth_blocks)  # for a decode
    starts = min(free, limits.reserve) * block_size if slot else -1
    parks = min(fixed, load.parked_limit_blocks, limits.parked_limit) * block_size - 1 if sequence else -1
    computes = fixed * block_size - 1 if slot and sequence else -1
    return starts, parks, computes


def _prefill_obstacle(load: Room, tokens: int, block_size: int) -> str | None:
    return _common_obstacle(load, blocks_for(tokens, block_size)) or _no_prefill_slot(load)


def _decode_obstacle(load: Room, tokens: int, block_size: int, waits_for_kv: bool) -> str | None:
    blocks = decode_blocks(tokens, block_size)
    if load.free_sequences < 1:
        return "every sequence is taken"
    if waits_for_kv and blocks > load.parked_limit_blocks:
        return f"{blocks} blocks are needed to wait for KV and {load.parked_limit_blocks} may still wait"
    obstacle = _common_obstacle(load, blocks) or _no_room_to_grow(load, blocks)
    return obstacle or (None if waits_for_kv else _no_prefill_slot(load))


def _common_obstacle(load: Room, blocks: int) -> str | None:
    if load.draining:
        return "the worker is draining"
    if blocks > load.free_blocks:
        return f"{blocks} blocks are needed and {load.free_blocks} are free"
    return None


def _no_room_to_grow(load: Room, blocks: int) -> str | None:
    if blocks <= load.free_blocks - load.growth_blocks:
        return None
    return f"{load.growth_blocks} of {load.free_blocks} free blocks are for what its decodes will make yet"


def _no_prefill_slot(load: Room) -> str | None:
    if load.prefill_tokens < load.prefill_token_limit:
        return None
    return f"{load.prefill_tokens} prompt tokens wait already; the limit is {load.prefill_token_limit}"


# A worker's own account -----------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Held:
    """What one job has taken. `to_compute`: prompt tokens that this worker has yet to compute. Of a decode: `made`
    output tokens, here or before, `expected` in all by now, which `share` of outputs are shorter than; `most` it may
    have."""

    prefill: bool
    parked: bool
    tokens: int
    blocks: int
    to_compute: int
    made: int = 0
    share: float = 0.0
    most: int = 0
    expected: int = 0


class Capacity:
    """A worker's account of its blocks, sequences and prefill slots, for all routers together."""

    def __init__(
        self, total_blocks: int, block_size: int, max_sequences: int, max_model_len: int, max_batched_tokens: int
    ) -> None:
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._limits = Limits.of(total_blocks, max_model_len, block_size)
        self._decode_sequences = max(1, max_sequences - 1)
        self._prefill_token_limit = PREFILL_STEPS_AHEAD * max_batched_tokens
        self._jobs: dict[str, _Held] = {}
        self._pinned = 0
        self._quarantined = 0
        self._produced = 0
        self._expectations = Expectations()
        self._peak: int | None = 0  # tokens of its decodes at their fullest moment; None: to be worked out
        self.draining = False

    @property
    def jobs(self) -> int:
        return len(self._jobs)

    @property
    def parked_jobs(self) -> int:
        return sum(held.parked for held in self._jobs.values())

    @property
    def parked_blocks(self) -> int:
        return sum(held.blocks for held in self._jobs.values() if held.parked)

    @property
    def quarantined_share(self) -> float:
        return self._quarantined / self._limits.total

    def admit(self, job: Job) -> Refusal | None:
        """Takes the job, which then holds its blocks until `ended`; or says why not, and nothing has changed."""
        refusal = self._never(job) or self._not_now(job)
        if refusal is None:
            self._jobs[job.job_id] = held = self._held(job)
            held.share = self._expectations.share()
            self._peak = None
        return refusal

    def progressed(self, job_id: str, tokens: int) -> None:
        """The engine gave news of a job, with so many new tokens: its prompt is computed, or its KV has arrived."""
        held = self._jobs[job_id]
        held.parked, held.to_compute = False, 0
        held.tokens += tokens
        held.made += tokens
        if held.made > held.expected:
            self._peak = None
        held.blocks = max(held.blocks, blocks_for(held.tokens, self._block_size))
        self._produced += tokens

    def ended(self, job_id: str, finished: bool = False) -> None:
        """The job is over, whatever way; `finished`: its output has its end."""
        held = self._jobs.pop(job_id)
        self._peak = None
        if finished and not held.prefill:
            self._expectations.lengths.add(held.made)

    def outlived(self, pinned_blocks: int, quarantined_blocks: int) -> None:
        """What the engine says is held by KV still being sent, and by claims that a silent peer may still write."""
        self._pinned, self._quarantined = pinned_blocks, quarantined_blocks

    def load(self, pool: Pool, seen_jobs: int = 0) -> Load:
        """What a router is told; `seen_jobs` is that router's."""
        held = self._jobs.values()
        return Load(
            seen_jobs=seen_jobs,
            free_blocks=self._free_blocks(),
            growth_blocks=self._growth_blocks(),
            free_sequences=max(0, self._decode_sequences - sum(not job.prefill for job in held)),
            prefill_tokens=sum(job.to_compute for job in held),
            prefill_token_limit=self._prefill_token_limit,
            parked_limit_blocks=max(0, self._limits.parked_limit - self._quarantined - self.parked_blocks),
            running=len(self._jobs) - self.parked_jobs,
            quarantined_blocks=self._quarantined,
            pinned_blocks=self._pinned,
            pool=pool,
            draining=self.draining,
            produced_tokens=self._produced,
        )

    def _free_blocks(self) -> int:
        """A computed prefill whose job goes on is both pinned and held: its blocks count once."""
        held = sum(job.blocks for job in self._jobs.values())
        still_owned = sum(job.blocks for job in self._jobs.values() if job.prefill and job.to_compute == 0)
        ownerless = max(0, self._pinned - still_owned)
        return max(0, self._limits.total - held - ownerless - self._quarantined)

    def _growth_blocks(self) -> int:
        """Of its decodes, and of one more. Their peak changes when one joins or ends, or outlives what was expected of
        it; what is left until then shrinks with each token."""
        decodes = [held for held in self._jobs.values() if not held.prefill]
        if not decodes or not self._expectations.known:
            return 0
        if self._peak is None:
            self._peak = peak_tokens(self._to_come(decodes))
        return growth_blocks(self._peak, sum(held.tokens for held in decodes), self._limits.total, self._block_size)

    def _to_come(self, decodes: Sequence[_Held]) -> Iterator[tuple[int, int]]:
        for held in decodes:
            if held.made >= held.expected:
                held.expected = self._expectations.tokens(held.share, held.made, held.most)
            yield held.tokens, max(0, held.expected - held.made)
        yield 0, self._expectations.lengths.remaining(0, 0.5)

    def _never(self, job: Job) -> Refusal | None:
        if job.job_id in self._jobs:
            return Refusal(Failure.INVALID, f"{job.job_id!r} is running already", "job_id")
        tokens, room = context_tokens(job), self._max_model_len - (0 if isinstance(job, PrefillJob) else 1)
        if tokens > room:
            reason = f"{tokens} tokens; the model takes at most {room} before the first one it makes: shorten it"
            return Refusal(Failure.INVALID, reason, "prompt")
        return self._too_large(job, self._held(job).blocks)

    def _too_large(self, job: Job, blocks: int) -> Refusal | None:
        if blocks > self._limits.total:
            reason = f"{blocks} blocks of KV; the worker has {self._limits.total}: shorten it"
            return Refusal(Failure.INVALID, reason, "prompt")
        limit = self._limits.reserve if isinstance(job, PrefillJob) else self._limits.parked_limit
        if job.ticket is not None and blocks > limit:
            reason = f"{blocks} blocks can't move through this worker, which has room for {limit} of KV on its way; "
            return Refusal(Failure.TRANSFER, reason + "compute the prompt where it decodes")
        return None

    def _not_now(self, job: Job) -> Refusal | None:
        load, tokens = self.load(Pool.PREFILL), context_tokens(job)
        if isinstance(job, PrefillJob):
            obstacle = _prefill_obstacle(load, tokens, self._block_size)
        else:
            obstacle = _decode_obstacle(load, tokens, self._block_size, job.ticket is not None)
        return Refusal(Failure.NOT_NOW, obstacle) if obstacle else None

    def _held(self, job: Job) -> _Held:
        tokens = context_tokens(job)
        if isinstance(job, PrefillJob):
            return _Held(True, False, tokens, blocks_for(tokens, self._block_size), tokens)
        parked, made, room = job.ticket is not None, len(job.output), self._max_model_len - len(job.prompt)
        most = room if job.sampling.max_tokens is None else min(room, job.sampling.max_tokens)
        blocks = decode_blocks(tokens, self._block_size)
        return _Held(False, parked, tokens, blocks, 0 if parked else tokens, made, most=most)


def context_tokens(job: Job) -> int:
    """Tokens whose KV the job needs before it makes one."""
    return len(job.prompt) + (len(job.output) if isinstance(job, DecodeJob) else 0)
