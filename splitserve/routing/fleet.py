"""What each worker of the fleet holds, as one router knows it: the last reported Load less what was promised since.

Pure state, one owner (`router/membership`): no method awaits, reads a clock or does I/O; `now` is seconds on the
caller's clock. It does not choose (`policy`) and does not judge what a worker accepts (`admission`).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from splitserve.core.fleet import Health, WorkerStatus
from splitserve.core.worker import KvFormat, Load, Pool, WorkerInfo
from splitserve.kv.layout import differing_field
from splitserve.latency.cost import latency_of
from splitserve.routing.admission import Limits
from splitserve.routing.candidate import Candidate
from splitserve.routing.mix import Mix
from splitserve.routing.outlook import alone_s
from splitserve.routing.pace import LEAST_SLOWDOWN, MOST_SLOWDOWN
from splitserve.routing.promise import Effect, Promise, nothing
from splitserve.routing.route import Split
from splitserve.routing.sample import WHOLE, Sample

_NEW_STEP_WEIGHT = 0.1  # of the moving mean of a worker's steps


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
    active_at: float  # last time it did something for anyone
    token_at: float | None = None
    goes_on: bool = False  # some decode had a token then, and not its last
    step_s: float | None = None
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
        self.candidate.changed()

    def stepped(self, now: float) -> None:
        """Tokens came: a moving mean, unless nothing was to come in between."""
        if self.goes_on and self.token_at is not None:
            gap_s = now - self.token_at
            self.step_s = gap_s if self.step_s is None else self.step_s + _NEW_STEP_WEIGHT * (gap_s - self.step_s)

    @property
    def health(self) -> Health:
        """As long as it is heard of."""
        if self.draining or self.load.draining:
            return Health.DRAINING
        return Health.FAILING if self.failing else Health.READY


class Fleet:
    """Live workers in the order they joined. Unknown worker uuids raise KeyError: asking for one is our mistake."""

    def __init__(self, silent_after_s: float) -> None:
        self._silent_after_s = silent_after_s
        self._members: dict[str, _Member] = {}
        self._sample = Sample()
        self._kv_classes: list[KvFormat] = []

    # Who is there ------------------------------------------------------------------------------------------------
    def join(self, info: WorkerInfo, now: float) -> None:
        """It gets no job before its first report."""
        limits = Limits.of(info.total_blocks, info.max_model_len, info.kv.block_size)
        load = nothing(info.pool)
        latency = latency_of(info.step_cost) if info.step_cost is not None else None
        candidate = Candidate(
            info, limits, self._kv_class(info.kv), info.pool, Health.READY, load, accepting=False, latency=latency
        )
        candidate.heard_at = now
        self._members[info.uuid] = _Member(candidate, load, active_at=now)

    def leave(self, uuid: str) -> None:
        """With everything it held."""
        self._sample.remove(self._members.pop(uuid).candidate)

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
        return tuple(uuid for uuid, member in self._members.items() if member.candidate.heard_at < before)

    # What they say -----------------------------------------------------------------------------------------------
    def report(self, uuid: str, load: Load, now: float) -> None:
        """The worker's own word replaces every promise that it has seen."""
        member = self._members[uuid]
        if (load.produced_tokens, load.prefill_tokens) != (member.load.produced_tokens, member.load.prefill_tokens):
            member.active_at = now
        candidate = member.candidate
        if load.pool != member.load.pool:  # it obeyed this router, or another one
            candidate.pool = load.pool
        member.load = load
        candidate.accepting = True
        candidate.tpot_s, candidate.slack_s = load.tpot_s, load.slack_s
        candidate.slowdown = min(MOST_SLOWDOWN, max(LEAST_SLOWDOWN, load.slowdown))
        member.forget([job_id for job_id, held in member.unseen.items() if _seen(held, load)])
        self._spoke(member, now)
        self._place(member)

    def heard(self, uuid: str, now: float, *, tokens: bool, goes_on: bool = False) -> None:
        """A batch of deltas came; `tokens` says whether any token was in it, `goes_on` whether one of a decode that is
        to have more. Then the time until the next is that of a step."""
        member = self._members[uuid]
        member.active_at = now
        self._spoke(member, now)
        if tokens:
            member.stepped(now)
            member.token_at, member.goes_on = now, goes_on

    def refused(self, uuid: str) -> None:
        """A NotNow: nothing more for this worker before its next report."""
        self._members[uuid].candidate.accepting = False

    def set_pool(self, uuid: str, pool: Pool) -> None:
        member = self._members[uuid]
        member.candidate.pool = pool
        self._place(member)

    def drain(self, uuid: str) -> None:
        member = self._members[uuid]
        member.draining = True
        self._place(member)

    def set_failing(self, uuid: str, failing: bool) -> bool:
        """A failing worker gets no jobs. Returns whether that is new."""
        member = self._members.get(uuid)
        if member is None or member.failing == failing:
            return False
        member.failing = failing
        self._place(member)
        return True

    # What is promised to them ------------------------------------------------------------------------------------
    def promise(self, uuid: str, job_id: str, promise: Promise) -> None:
        """A route was bound; the job may be sent later."""
        member = self._members[uuid]
        member.promised(job_id, _Held(promise, Effect.of(promise, member.info.kv.block_size)))
        self._place(member)

    def reads_until(self, uuid: str, time: float) -> None:
        """When it is predicted to have read the prompts that were promised to it."""
        self._members[uuid].candidate.read_until = time

    def read_s(self, uuid: str, tokens: int, cached: int, now: float) -> float:
        """How long from now one more prompt is read there, behind those that were promised to it; so many of its tokens
        are cached. 0 where nobody knows what the worker's steps cost."""
        candidate = self._members[uuid].candidate
        if candidate.latency is None:
            return 0.0
        look = candidate.outlook
        queue_s = max(0.0, candidate.read_until - now) if look.reads else 0.0
        return queue_s + look.read_s(alone_s(candidate.latency, tokens, cached) * look.slowdown)

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
        self._place(member)
        return True

    def ended(self, uuid: str, job_id: str) -> None:
        """The worker said so. What the job took stays counted until a report that has seen it."""
        member = self._members[uuid]
        member.held.pop(job_id, None)
        member.goes_on = member.goes_on and bool(member.held)

    # What can be asked -------------------------------------------------------------------------------------------
    def candidates(self, now: float) -> list[Candidate]:
        """All of them, in the order they joined."""
        return self._now([member.candidate for member in self._members.values()], now)

    def sample(self, now: float, random: Random, also: Iterable[str] = ()) -> list[Candidate]:
        """Whom a decision looks at: all of a small fleet, some of a large one (`sample`). `also`: workers that it
        asks for."""
        if len(self._members) <= WHOLE:
            return self.candidates(now)
        drawn = self._sample.draw(random)
        drawn += [self._members[uuid].candidate for uuid in also if uuid in self._members]
        return self._now(drawn, now)

    def split(self, mix: Mix, seen: list[Candidate], tpot_s: float) -> Split:
        """How many of those that get jobs are to decode."""
        return mix.split(seen, self._sample.workers, self._sample.decoding, tpot_s)

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
            health=self._now([member.candidate], now)[0].health,
            load=member.load,
            seconds_since_heartbeat=now - member.candidate.heard_at,
            seconds_since_token=now - member.token_at if member.token_at is not None else -1.0,
            prefills=prefills,
            decodes=len(member.held) - prefills,
            step_s=member.step_s if member.step_s is not None else -1.0,
        )

    # -------------------------------------------------------------------------------------------------------------
    def _kv_class(self, kv: KvFormat) -> int:
        for number, known in enumerate(self._kv_classes):
            if not differing_field(known, kv):
                return number
        self._kv_classes.append(kv)
        return len(self._kv_classes) - 1

    def _place(self, member: _Member) -> None:
        """Something about it has changed. Who gets no jobs is not drawn."""
        candidate = member.candidate
        if candidate.health is not Health.SILENT or member.draining:
            candidate.health = member.health
        if member.health is Health.READY:
            candidate.look_ahead()
            self._sample.put(candidate)
        else:
            self._sample.remove(candidate)

    @staticmethod
    def _spoke(member: _Member, now: float) -> None:
        member.candidate.heard_at, member.candidate.health = now, member.health

    def _now(self, candidates: list[Candidate], now: float) -> list[Candidate]:
        """With those that have become silent."""
        before = now - self._silent_after_s
        for each in candidates:
            if each.heard_at < before and each.health is not Health.DRAINING:
                each.health = Health.SILENT
        return candidates


def _seen(held: _Held, load: Load) -> bool:
    return held.number is not None and held.number <= load.seen_jobs
