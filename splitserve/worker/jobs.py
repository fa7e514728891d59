"""Whose job is whose, and what each router must be told: the worker's job table.

State of the worker's event loop; no method awaits, no I/O, no clock (`now` is seconds on the caller's). It keeps the
account of what the worker holds (`routing/admission`), for all routers together, but runs nothing: what is admitted the
caller gives to the engine, what must stop it cancels there.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from splitserve.core.worker import Delta, Job, Load, Outcome, Pace, Pool, PrefillJob
from splitserve.routing.admission import Capacity, Refusal


@dataclass(frozen=True, slots=True)
class Ended:
    """One job's end, as metrics count it and the log names it."""

    kind: str
    outcome: Outcome
    job_id: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: what goes to which router, and what ended in it."""

    batches: Mapping[str, Sequence[Delta]]
    ended: Sequence[Ended]
    jobs: int
    tokens: int


@dataclass(slots=True)
class _Entry:
    """`router` is None once that router is gone; `stopped`: the engine has been told to cancel it."""

    kind: str
    request_id: str
    router: str | None
    expires_at: float
    stopped: bool = False


@dataclass(slots=True)
class _Router:
    seen_jobs: int = 0
    jobs: set[str] = field(default_factory=set)


class JobTable:
    """Routers are named by their address; a router that attaches again counts its jobs from 1 again."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._routers: dict[str, _Router] = {}
        self._jobs: dict[str, _Entry] = {}

    def attach(self, router: str) -> None:
        assert router not in self._routers, "detach comes before attaching again"
        self._routers[router] = _Router()

    def detach(self, router: str) -> tuple[str, ...]:
        """The router is gone. Returns its jobs, to be cancelled: nobody waits for them."""
        gone = self._routers.pop(router, _Router())
        for job_id in gone.jobs:
            self._jobs[job_id].router = None
            self._jobs[job_id].stopped = True
        return tuple(gone.jobs)

    def take(self, router: str, number: int, job: Job, now: float) -> Refusal | None:
        """Admits the job, which must then be given to the engine, or says why not."""
        self.seen(router, number)
        refusal = self._capacity.admit(job)
        if refusal is None:
            self._jobs[job.job_id] = _Entry(kind_of(job), job.request_id, router, now + job.deadline_s)
            self._routers[router].jobs.add(job.job_id)
        return refusal

    def seen(self, router: str, number: int) -> None:
        """This many jobs of the router's stream are reflected in the loads that follow."""
        self._routers[router].seen_jobs = number

    def stop(self, router: str, job_id: str) -> bool:
        """Whether this router has such a job, which must then be cancelled."""
        entry = self._jobs.get(job_id)
        if entry is None or entry.router != router:
            return False
        entry.stopped = True
        return True

    def runs(self, router: str, job_id: str) -> bool:
        """Whether this router has such a job that was not told to stop."""
        entry = self._jobs.get(job_id)
        return entry is not None and entry.router == router and not entry.stopped

    def expired(self, now: float) -> tuple[str, ...]:
        """Jobs past their deadline, each named once, to be cancelled."""
        late = [job_id for job_id, entry in self._jobs.items() if entry.expires_at <= now and not entry.stopped]
        for job_id in late:
            self._jobs[job_id].stopped = True
        return tuple(late)

    def step(self, deltas: Sequence[Delta]) -> Step:
        """Books what one engine step made, and sorts it by router."""
        batches: dict[str, list[Delta]] = defaultdict(list)
        ended: list[Ended] = []
        for delta in deltas:
            entry = self._jobs.get(delta.job_id)
            if entry is None:
                continue
            if entry.router is not None:
                batches[entry.router].append(delta)
            self._book(delta, entry, ended)
        return Step(batches, ended, len(deltas), sum(len(delta.token_ids) for delta in deltas))

    def load(self, router: str, pool: Pool, pace: Pace) -> Load:
        return replace(
            self._capacity.load(pool, self._routers[router].seen_jobs),
            routers=len(self._routers),
            tpot_s=pace.tpot_s,
            slack_s=pace.slack_s,
            slowdown=pace.slowdown,
        )

    @property
    def routers(self) -> int:
        """Attached now."""
        return len(self._routers)

    def __len__(self) -> int:
        return len(self._jobs)

    def _book(self, delta: Delta, entry: _Entry, ended: list[Ended]) -> None:
        if delta.outcome is None or delta.token_ids:
            self._capacity.progressed(delta.job_id, len(delta.token_ids))
        if delta.outcome is None:
            return
        self._capacity.ended(delta.job_id, finished=delta.outcome.finish_reason is not None)
        del self._jobs[delta.job_id]
        if entry.router is not None:
            self._routers[entry.router].jobs.discard(delta.job_id)
        ended.append(Ended(entry.kind, delta.outcome, delta.job_id, entry.request_id))


def kind_of(job: Job) -> str:
    return "prefill" if isinstance(job, PrefillJob) else "decode"
