"""What each worker of the fleet holds, as one router knows it: the last reported Load less what was promised since.

Pure state, one owner (`router/membership`): no method awaits, reads a clock or does I/O; `now` is seconds on the
caller's clock. It does not choose (`policy`) and does not judge what a worker accepts (`admission`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import TypeVar

from splitserve.core.fleet import Health, WorkerStatus
from splitserve.core.worker import KvFormat, Load, Pool, WorkerInfo
from splitserve.kv.layout import differing_field
from splitserve.latency.cost import latency_of
from splitserve.latency.model import LatencyModel
from splitserve.routing.admission import Limits, Room
from splitserve.routing.outlook import Held, Outlook, outlook
from splitserve.routing.promise import Effect, Promise, nothing

WHOLE = 64  # workers of a fleet that a decision looks at one by one
SAMPLE = 16  # candidates of each pool that it looks at in a larger one
LEAST_SLOWDOWN, MOST_SLOWDOWN = 0.5, 4.0  # of a worker's steps: what lies beyond is taken for a mistake


@dataclass(slots=True)
class Candidate:
    """One live worker as `policy` sees it, until the fleet's next change. `load` has every promise taken off that the
    worker has not reported yet. Workers of the same `kv_class` can write each other's KV. `latency`: what its steps
    cost, if that is known, and `slowdown` by which factor they are longer now. `tpot_s`: the tightest objective of its
    decodes, and `slack_s` the time for prompts that these leave, in its own word; `read_until`: when it is predicted to
    have read the prompts that it was given, on the caller's clock."""

    info: WorkerInfo
    limits: Limits
    kv_class: int
    pool: Pool
    health: Health
    load: Room
    accepting: bool  # False before the first report, and from a NotNow until the next
    latency: LatencyModel | None = None
    slowdown: float = 1.0
    tpot_s: float = inf
    slack_s: float = inf
    read_until: float = -inf
    _outlook: Outlook | None = None
    _outlook_of: tuple[object, ...] = ()

    @property
    def decodes(self) -> int:
        """Sequences that are decoded there, or will be."""
        return max(1, self.info.max_sequences - 1) - self.load.free_sequences

    @property
    def outlook(self) -> Outlook:
        """Of a worker whose latency is known."""
        load = self.load
        grants = load.free_sequences, load.free_blocks, load.parked_limit_blocks, load.prefill_tokens, load.draining
        of = (*grants, self.slowdown, self.tpot_s, self.slack_s)
        if self._outlook is None or of != self._outlook_of:
            assert self.latency is not None
            held = Held(self.decodes, self.tpot_s, self.slack_s)
            block_size = self.info.kv.block_size
            self._outlook = outlook(self.latency, self.slowdown, held, load, self.limits, block_size)
            self._outlook_of = of
        return self._outlook


@dataclass(slots=True)
class _Held:
    promise: Promise
    effect: Effect
    number: int | None = None  # in the worker's stream; None until it is sent


@dataclass(slots=True)
class _Member:
    """`candidate` is what policy sees of it, kept up to date; `load` is the worker's own last word."""

    candidate: Candidate
    load: Load
    heard_at: float
    active_at: float  # last time it did something for anyone
    token_at: float | None = None
    draining: bool = False
    failing: bool = False
    sent_jobs: int = 0
    held: dict[str, _Held] = field(default_factory=dict)  # promised or running
    unseen: dict[str, _Held] = field(default_factory=dict)  # promises that `load` does not reflect yet
    unseen_effect: Effect = field(default_factory=Effect)  # of all of them together

    @property
    def info(self) -> WorkerInfo:
        return self.candidate.info

    def promised(self, job_id: str, held: _Held) -> None:
        self.held[job_id] = self.unseen[job_id] = held
        self.unseen_effect = self.unseen_effect.plus(held.effect)
        self.regrant()

    def forget(self, job_ids: Iterable[str]) -> None:
        """What these unseen promises take counts no more."""
        for job_id in job_ids:
            self.unseen_effect = self.unseen_effect.minus(self.unseen.pop(job_id).effect)
        self.regrant()

    def regrant(self) -> None:
        self.candidate.load = self.unseen_effect.on(self.load) if self.unseen else self.load


class Fleet:
    """Live workers in the order they joined. Unknown worker uuids raise KeyError: asking for one is our mistake."""

    def __init__(self, silent_after_s: float) -> None:
        self._silent_after_s = silent_after_s
        self._members: dict[str, _Member] = {}
        self._pools: dict[Pool, list[_Member]] = {pool: [] for pool in Pool}
        self._latest: dict[Pool, _Member] = {}  # whose grant changed last
        self._kv_classes: list[KvFormat] = []

    # Who is there ------------------------------------------------------------------------------------------------
    def join(self, info: WorkerInfo, now: float) -> None:
        """It gets no job before its first report."""
        limits = Limits.of(info.total_blocks, info.max_model_len, info.kv.block_size)
        load = nothing(info.pool)
        candidate = Candidate(info, limits, self._kv_class(info.kv), info.pool, Health.READY, load, accepting=False)
        if info.step_cost is not None:
            candidate.latency = latency_of(info.step_cost)
        member = self._members[info.uuid] = _Member(candidate, load, heard_at=now, active_at=now)
        self._pools[info.pool].append(member)

    def leave(self, uuid: str) -> None:
        """With everything it held."""
        member = self._members.pop(uuid)
        pool = member.candidate.pool
        self._pools[pool] = [other for other in self._pools[pool] if other is not member]
        if self._latest.get(pool) is member:
            del self._latest[pool]

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._members

    def __len__(self) -> int:
        return len(self._members)

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        return tuple(member.info for member in self._members.values())

    def worker(self, uuid: str) -> WorkerInfo:
        return self._members[uuid].info

    def find(self, name_or_uuid: str) -> WorkerInfo | None:
        return next((info for info in self.workers if name_or_uuid in (info.uuid, info.name)), None)

    def silent_since(self, before: float) -> tuple[str, ...]:
        """Workers last heard of before that time."""
        return tuple(uuid for uuid, member in self._members.items() if member.heard_at < before)

    # What they say -----------------------------------------------------------------------------------------------
    def report(self, uuid: str, load: Load, now: float) -> None:
        """The worker's own word replaces every promise that it has seen."""
        member = self._members[uuid]
        if (load.produced_tokens, load.prefill_tokens) != (member.load.produced_tokens, member.load.prefill_tokens):
            member.active_at = now
        if load.pool != member.load.pool:  # it obeyed this router, or another one
            self.set_pool(uuid, load.pool)
        member.load = load
        member.heard_at = now
        candidate = member.candidate
        candidate.accepting = True
        candidate.tpot_s, candidate.slack_s = load.tpot_s, load.slack_s
        candidate.slowdown = min(MOST_SLOWDOWN, max(LEAST_SLOWDOWN, load.slowdown))
        member.forget([job_id for job_id, held in member.unseen.items() if _seen(held, load)])
        self._latest[member.candidate.pool] = member

    def heard(self, uuid: str, now: float, *, tokens: bool) -> None:
        """A batch of deltas came; `tokens` says whether any token was in it."""
        member = self._members[uuid]
        member.heard_at = member.active_at = now
        if tokens:
            member.token_at = now

    def refused(self, uuid: str) -> None:
        """A NotNow: nothing more for this worker before its next report."""
        self._members[uuid].candidate.accepting = False

    def set_pool(self, uuid: str, pool: Pool) -> None:
        member = self._members[uuid]
        if member.candidate.pool is not pool:
            self._pools[member.candidate.pool].remove(member)
            self._pools[pool].append(member)
            self._latest = {at: latest for at, latest in self._latest.items() if latest is not member}
            member.candidate.pool = pool

    def drain(self, uuid: str) -> None:
        self._members[uuid].draining = True

    def set_failing(self, uuid: str, failing: bool) -> bool:
        """A failing worker gets no jobs. Returns whether that is new."""
        member = self._members.get(uuid)
        if member is None or member.failing == failing:
            return False
        member.failing = failing
        return True

    # What is promised to them ------------------------------------------------------------------------------------
    def promise(self, uuid: str, job_id: str, promise: Promise) -> None:
        """A route was bound; the job may be sent later."""
        member = self._members[uuid]
        member.promised(job_id, _Held(promise, Effect.of(promise, member.info.kv.block_size)))

    def reads_until(self, uuid: str, time: float) -> None:
        """When it is predicted to have read the prompts that were promised to it."""
        self._members[uuid].candidate.read_until = time

    def holds(self, uuid: str, job_id: str) -> bool:
        """Whether the job is promised to this worker or running there; not if the worker has left, or left and come
        back."""
        member = self._members.get(uuid)
        return member is not None and job_id in member.held

    def sent(self, uuid: str, job_id: str) -> int:
        """The promised job goes out now; returns its number in the worker's stream."""
        member = self._members[uuid]
        member.sent_jobs += 1
        member.held[job_id].number = member.sent_jobs
        return member.sent_jobs

    def withdraw(self, uuid: str, job_id: str) -> bool:
        """Gives back a promise whose job was never sent; True if there was one."""
        member = self._members.get(uuid)
        if member is None or job_id not in member.held or member.held[job_id].number is not None:
            return False
        del member.held[job_id]
        member.forget([job_id])
        return True

    def ended(self, uuid: str, job_id: str) -> None:
        """The worker said so. What the job took stays counted until a report that has seen it."""
        self._members[uuid].held.pop(job_id, None)

    # What can be asked -------------------------------------------------------------------------------------------
    def candidates(self, now: float) -> list[Candidate]:
        """All of them, in the order they joined."""
        return [self._candidate(member, now) for member in self._members.values()]

    def sample(self, now: float, random: Random, also: str = "") -> list[Candidate]:
        """Whom a decision looks at: all of a small fleet; of a large one some of each pool, drawn at random, and those
        whose grants changed last, so that room which has just appeared is always seen. `also` is a worker that it asks
        for."""
        if len(self._members) <= WHOLE:
            return self.candidates(now)
        always = [*self._latest.values(), *([self._members[also]] if also in self._members else [])]
        return [self._candidate(member, now) for member in drawn(self._pools, always, random)]

    def active_at(self, uuid: str) -> float:
        """When the worker last did something for any request; -inf for one that is gone."""
        member = self._members.get(uuid)
        return member.active_at if member is not None else float("-inf")

    def status(self, uuid: str, now: float) -> WorkerStatus:
        member = self._members[uuid]
        prefills = sum(held.promise.pool is Pool.PREFILL for held in member.held.values())
        return WorkerStatus(
            worker=member.info,
            pool=member.candidate.pool,
            health=self._health(member, now),
            load=member.load,
            seconds_since_heartbeat=now - member.heard_at,
            seconds_since_token=now - member.token_at if member.token_at is not None else -1.0,
            prefills=prefills,
            decodes=len(member.held) - prefills,
        )

    # -------------------------------------------------------------------------------------------------------------
    def _kv_class(self, kv: KvFormat) -> int:
        for number, known in enumerate(self._kv_classes):
            if not differing_field(known, kv):
                return number
        self._kv_classes.append(kv)
        return len(self._kv_classes) - 1

    def _candidate(self, member: _Member, now: float) -> Candidate:
        member.candidate.health = self._health(member, now)
        return member.candidate

    def _health(self, member: _Member, now: float) -> Health:
        if member.draining or member.load.draining:
            return Health.DRAINING
        if now - member.heard_at > self._silent_after_s:
            return Health.SILENT
        return Health.FAILING if member.failing else Health.READY


MemberT = TypeVar("MemberT")


def drawn(pools: Mapping[Pool, list[MemberT]], always: Iterable[MemberT], random: Random) -> list[MemberT]:
    """`SAMPLE` members of each pool, drawn at random, and some that are looked at in any case."""
    looked_at = list(always)
    for members in pools.values():
        looked_at += random.choices(members, k=SAMPLE) if len(members) > SAMPLE else members
    return looked_at


def _seen(held: _Held, load: Load) -> bool:
    return held.number is not None and held.number <= load.seen_jobs
