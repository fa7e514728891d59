"""What each worker of the fleet holds, as one router knows it: the last reported Load less what was promised since.

Pure state, one owner (`router/membership`): no method awaits, reads a clock or does I/O; `now` is seconds on the
caller's clock. It does not choose (`policy`) and does not judge what a worker accepts (`admission`).
"""

from dataclasses import dataclass, field

from splitserve.core.fleet import Health, WorkerStatus
from splitserve.core.worker import Load, Pool, WorkerInfo
from splitserve.routing.promise import Effect, Promise, nothing


@dataclass(frozen=True, slots=True)
class Candidate:
    """One live worker as `policy` sees it. `load` has every promise taken off that the worker has not reported yet."""

    info: WorkerInfo
    pool: Pool
    health: Health
    load: Load
    accepting: bool  # False before the first report, and from a NotNow until the next


@dataclass(slots=True)
class _Held:
    promise: Promise
    effect: Effect
    number: int | None = None  # in the worker's stream; None until it is sent


@dataclass(slots=True)
class _Member:
    info: WorkerInfo
    pool: Pool
    load: Load
    heard_at: float
    active_at: float  # last time it did something for anyone
    token_at: float | None = None
    draining: bool = False
    accepting: bool = False
    sent_jobs: int = 0
    held: dict[str, _Held] = field(default_factory=dict)  # promised or running
    unseen: dict[str, _Held] = field(default_factory=dict)  # promises that `load` does not reflect yet
    unseen_effect: Effect = field(default_factory=Effect)  # of all of them together
    granted: Load | None = None  # `load` after that; None when it must be worked out anew

    def forget(self, job_id: str) -> None:
        """What an unseen promise takes counts no more."""
        self.unseen_effect = self.unseen_effect - self.unseen.pop(job_id).effect
        self.granted = None


class Fleet:
    """Live workers in the order they joined. Unknown worker uuids raise KeyError: asking for one is our mistake."""

    def __init__(self, silent_after_s: float) -> None:
        self._silent_after_s = silent_after_s
        self._members: dict[str, _Member] = {}

    # Who is there ------------------------------------------------------------------------------------------------
    def join(self, info: WorkerInfo, now: float) -> None:
        """It gets no job before its first report."""
        self._members[info.uuid] = _Member(info, info.pool, nothing(info.pool), heard_at=now, active_at=now)

    def leave(self, uuid: str) -> None:
        """With everything it held."""
        del self._members[uuid]

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._members

    def __len__(self) -> int:
        return len(self._members)

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        return tuple(member.info for member in self._members.values())

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
            member.pool = load.pool
        member.load = load
        member.heard_at = now
        member.accepting = True
        member.granted = None
        for job_id in [job_id for job_id, held in member.unseen.items() if _seen(held, load)]:
            member.forget(job_id)

    def heard(self, uuid: str, now: float, *, tokens: bool) -> None:
        """A batch of deltas came; `tokens` says whether any token was in it."""
        member = self._members[uuid]
        member.heard_at = member.active_at = now
        if tokens:
            member.token_at = now

    def refused(self, uuid: str) -> None:
        """A NotNow: nothing more for this worker before its next report."""
        self._members[uuid].accepting = False

    def set_pool(self, uuid: str, pool: Pool) -> None:
        self._members[uuid].pool = pool

    def drain(self, uuid: str) -> None:
        self._members[uuid].draining = True

    # What is promised to them ------------------------------------------------------------------------------------
    def promise(self, uuid: str, job_id: str, promise: Promise) -> None:
        """A route was bound; the job may be sent later."""
        member = self._members[uuid]
        held = _Held(promise, Effect.of(promise, member.info.kv.block_size))
        member.held[job_id] = member.unseen[job_id] = held
        member.unseen_effect = member.unseen_effect + held.effect
        member.granted = None

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
        member.forget(job_id)
        return True

    def ended(self, uuid: str, job_id: str) -> None:
        """The worker said so. What the job took stays counted until a report that has seen it."""
        self._members[uuid].held.pop(job_id, None)

    # What can be asked -------------------------------------------------------------------------------------------
    def candidates(self, now: float) -> tuple[Candidate, ...]:
        """In the order they joined."""
        return tuple(self._candidate(member, now) for member in self._members.values())

    def active_at(self, uuid: str) -> float:
        """When the worker last did something for any request; -inf for one that is gone."""
        member = self._members.get(uuid)
        return member.active_at if member is not None else float("-inf")

    def status(self, uuid: str, now: float) -> WorkerStatus:
        member = self._members[uuid]
        prefills = sum(held.promise.pool is Pool.PREFILL for held in member.held.values())
        return WorkerStatus(
            worker=member.info,
            pool=member.pool,
            health=self._health(member, now),
            load=member.load,
            seconds_since_heartbeat=now - member.heard_at,
            seconds_since_token=now - member.token_at if member.token_at is not None else -1.0,
            prefills=prefills,
            decodes=len(member.held) - prefills,
        )

    def _candidate(self, member: _Member, now: float) -> Candidate:
        if member.granted is None:
            member.granted = member.unseen_effect.on(member.load)
        return Candidate(
            info=member.info,
            pool=member.pool,
            health=self._health(member, now),
            load=member.granted,
            accepting=member.accepting,
        )

    def _health(self, member: _Member, now: float) -> Health:
        if member.draining or member.load.draining:
            return Health.DRAINING
        return Health.SILENT if now - member.heard_at > self._silent_after_s else Health.READY


def _seen(held: _Held, load: Load) -> bool:
    return held.number is not None and held.number <= load.seen_jobs
