"""Who is in the fleet, what goes to whom, and who hears what comes back.

One object, used on the router's event loop only; no method awaits, so it needs no lock. What a worker is to be sent is
put into its `Attachment`; the gRPC shell that empties it is `router/attach`. It chooses nothing (`routing/policy`) and
retries nothing (`router/journey`).
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter

from splitserve.core.cached import CacheNews
from splitserve.core.errors import JoinRefused, UnknownWorker
from splitserve.core.fleet import Health, WorkerStatus
from splitserve.core.worker import DecodeJob, Delta, Failure, Job, Load, Pool, Ticket, WorkerInfo
from splitserve.kv.layout import differing_field
from splitserve.router.mailbox import Lost, Mailbox
from splitserve.router.orders import Outbox, SendCancel, SendDrain, SendHandOver, SendJob, SendPeers, SendPool
from splitserve.routing.fleet import Fleet
from splitserve.routing.prefix import PrefixIndex, chain_of
from splitserve.routing.promise import Promise

MOST_CACHED_BLOCKS = 500_000  # of all workers together that a router keeps in mind: some 150 MB


@dataclass(slots=True)
class Attachment:
    """The router's end of one worker's stream. `outbox` is what it is to be told; `gone` is set once it has left."""

    info: WorkerInfo
    outbox: Outbox = field(default_factory=Outbox)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    gone_reason: str = ""
    finished_jobs: int = 0
    migrated_jobs: int = 0


@dataclass(slots=True)
class _Sent:
    """A job whose outcome has not come. `mailbox` is None once nobody waits for it."""

    worker: str
    mailbox: Mailbox | None


class Membership:
    """See the module's docstring. `changed` is called after whatever may let a waiting request go."""

    def __init__(
        self, model: str, fleet: Fleet, changed: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model = model
        self._fleet = fleet
        self._changed = changed
        self._clock = clock
        self._attachments: dict[str, Attachment] = {}
        self._sent: dict[str, _Sent] = {}
        self._suspected_at: dict[str, float] = {}
        self._prefixes = PrefixIndex(MOST_CACHED_BLOCKS)
        self._block_sizes: set[int] = set()
        # Every request asks for these, and only who is there changes them.
        self.token_limit: int | None = None  # longest prompt and output together that every worker can hold, tokens
        self.loras: tuple[str, ...] = ()  # names of the LoRA adapters that some worker has

    # Workers -----------------------------------------------------------------------------------------------------
    def join(self, info: WorkerInfo) -> Attachment:
        """Raises JoinRefused naming the field that disagrees with this router or with the workers it has."""
        _check_alone(info, self._model)
        for other in self._fleet.workers:
            _check_beside(info, other)
        attachment = self._attachments[info.uuid] = Attachment(info)
        self._fleet.join(info, self._clock())
        self._prefixes.join(info.uuid)
        self._note_workers()
        self._introduce()
        self._changed()
        return attachment

    def leave(self, uuid: str, reason: str) -> None:
        """The worker is gone: every journey that has a job there hears it now. A second time does nothing."""
        attachment = self._attachments.pop(uuid, None)
        if attachment is None:
            return
        self._fleet.leave(uuid)
        self._prefixes.leave(uuid)
        self._suspected_at.pop(uuid, None)
        for job_id in [job_id for job_id, sent in self._sent.items() if sent.worker == uuid]:
            _tell(self._sent.pop(job_id), Lost(job_id, reason))
        attachment.gone_reason = reason
        attachment.gone.set()
        self._note_workers()
        self._introduce()
        self._changed()

    def expire(self, heartbeat_timeout_s: float) -> tuple[WorkerInfo, ...]:
        """Drops the workers silent for so long, and returns them."""
        gone = self._fleet.silent_since(self._clock() - heartbeat_timeout_s)
        workers = tuple(self._attachments[uuid].info for uuid in gone)
        for uuid in gone:
            self.leave(uuid, f"it was silent for {heartbeat_timeout_s:g} s")
        return workers

    def heard(self, uuid: str, load: Load | None, deltas: Sequence[Delta]) -> None:
        """One message of a worker. Its load comes first: a NotNow beside it is newer than what it grants."""
        if uuid not in self._fleet:
            return
        now = self._clock()
        if load is not None:
            self._fleet.report(uuid, load, now)
        if deltas:
            tokens = any(delta.token_ids for delta in deltas)
            goes_on = any(delta.token_ids and delta.outcome is None for delta in deltas)
            self._fleet.heard(uuid, now, tokens=tokens, goes_on=goes_on)
            self._deliver(uuid, deltas)
        if load is not None:
            self._changed()

    def cached(self, uuid: str, news: CacheNews) -> None:
        """What became of a worker's prefix cache. Of one whose news were lost on the way nothing is known that came
        before: it tells again what is used."""
        if uuid not in self._prefixes:
            return
        if self._prefixes.apply(uuid, news.number, news.events):
            self._prefixes.restart(uuid, news.number)
            self._prefixes.apply(uuid, news.number, news.events)

    def cached_tokens(self, tokens: Sequence[int], lora: str, salt: str) -> dict[str, int]:
        """By worker, how many of a prompt's leading tokens are in its prefix cache; see `PrefixIndex`."""
        if not len(self._prefixes):
            return {}
        chains = [chain_of(tokens, block_size, lora, salt) for block_size in self._block_sizes]
        found = [item for chain in chains for item in self._prefixes.cached_tokens(chain).items()]
        return dict(found if len(chains) == 1 else sorted(found, key=itemgetter(1)))

    # Jobs --------------------------------------------------------------------------------------------------------
    def send(self, uuid: str, job: Job, mailbox: Mailbox) -> None:
        """Sends a job that was promised to this worker. If the worker is gone the mailbox hears that, also if it has
        come back since: what it was promised then is forgotten."""
        if not self._fleet.holds(uuid, job.job_id):
            mailbox.put(Lost(job.job_id, "it left before the job was sent"))
            return
        number = self._fleet.sent(uuid, job.job_id)
        self._sent[job.job_id] = _Sent(uuid, mailbox)
        self._attachments[uuid].outbox.put_nowait(SendJob(number, job))

    def cancel(self, job_id: str) -> None:
        """Nobody waits for this job any more. Does nothing if it has ended."""
        sent = self._sent.get(job_id)
        if sent is not None and sent.mailbox is not None:
            sent.mailbox = None
            self._attachments[sent.worker].outbox.put_nowait(SendCancel(job_id))

    def hand_over(self, job_id: str, ticket: Ticket, *, at_end: bool) -> None:
        """A running decode's KV is to be claimable under this ticket. Does nothing if it has ended."""
        sent = self._sent.get(job_id)
        if sent is not None:
            self._attachments[sent.worker].outbox.put_nowait(SendHandOver(job_id, ticket, at_end))

    def worker(self, uuid: str) -> WorkerInfo | None:
        attachment = self._attachments.get(uuid)
        return attachment.info if attachment is not None else None

    def active_at(self, uuid: str) -> float:
        """When the worker last did anything for any request, on the clock given; -inf if it is gone."""
        return self._fleet.active_at(uuid)

    # Probes ------------------------------------------------------------------------------------------------------
    def probed(self) -> tuple[WorkerInfo, ...]:
        """Workers that can be asked whether they still make tokens."""
        return tuple(each.worker for each in self.statuses() if each.health in (Health.READY, Health.FAILING))

    def suspect(self, uuid: str) -> None:
        """A request failed there by the worker's own fault."""
        if uuid in self._fleet:
            self._suspected_at[uuid] = self._clock()

    def suspected_at(self, uuid: str) -> float:
        return self._suspected_at.get(uuid, float("-inf"))

    @contextmanager
    def asked(self, uuid: str, job: DecodeJob, mailbox: Mailbox) -> Iterator[None]:
        """Sends a job that nobody has promised, and cancels it if it has not ended when the block is left."""
        if uuid in self._fleet:
            self._fleet.promise(uuid, job.job_id, Promise(Pool.DECODE, len(job.prompt)))
        self.send(uuid, job, mailbox)
        try:
            yield
        finally:
            self.cancel(job.job_id)

    def is_failing(self, uuid: str) -> bool:
        return uuid in self._fleet and self._fleet.status(uuid, self._clock()).health is Health.FAILING

    def set_failing(self, uuid: str, *, failing: bool) -> bool:
        """Returns whether that is new."""
        changed = self._fleet.set_failing(uuid, failing)
        if changed:
            self._changed()
        return changed

    # Operators ---------------------------------------------------------------------------------------------------
    def drain(self, name_or_uuid: str) -> Attachment:
        """No new jobs for this worker; its attachment tells when it has left. Raises UnknownWorker."""
        attachment = self._named(name_or_uuid)
        self._fleet.drain(attachment.info.uuid)
        attachment.outbox.put_nowait(SendDrain())
        self._changed()
        return attachment

    def set_pool(self, name_or_uuid: str, pool: Pool) -> WorkerStatus:
        """Raises UnknownWorker."""
        attachment = self._named(name_or_uuid)
        self._fleet.set_pool(attachment.info.uuid, pool)
        attachment.outbox.put_nowait(SendPool(pool))
        self._changed()
        return self._fleet.status(attachment.info.uuid, self._clock())

    def statuses(self) -> tuple[WorkerStatus, ...]:
        now = self._clock()
        return tuple(self._fleet.status(worker.uuid, now) for worker in self._fleet.workers)

    def find(self, name_or_uuid: str) -> WorkerInfo:
        """Raises UnknownWorker."""
        return self._named(name_or_uuid).info

    @property
    def draining(self) -> tuple[str, ...]:
        """The uuids of workers that drain, by whoever's order."""
        return tuple(status.worker.uuid for status in self.statuses() if status.health is Health.DRAINING)

    @property
    def can_serve(self) -> bool:
        """Whether some worker takes requests."""
        return any(status.health is Health.READY for status in self.statuses())

    # -------------------------------------------------------------------------------------------------------------
    def _named(self, name_or_uuid: str) -> Attachment:
        info = self._fleet.find(name_or_uuid)
        if info is None:
            names = ", ".join(worker.name for worker in self._fleet.workers) or "none"
            raise UnknownWorker(f"no live worker is named {name_or_uuid!r}; there are: {names}")
        return self._attachments[info.uuid]

    def _deliver(self, uuid: str, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            sent = self._sent.get(delta.job_id)
            if sent is None or sent.worker != uuid:
                continue
            if delta.outcome is not None:
                self._end(uuid, delta)
            _tell(sent, delta)

    def _end(self, uuid: str, delta: Delta) -> None:
        assert delta.outcome is not None
        del self._sent[delta.job_id]
        self._fleet.ended(uuid, delta.job_id)
        if delta.outcome.failure is Failure.NOT_NOW:
            self._fleet.refused(uuid)
        self._attachments[uuid].finished_jobs += delta.outcome.failure is None
        self._attachments[uuid].migrated_jobs += delta.outcome.failure is Failure.MIGRATED

    def _note_workers(self) -> None:
        workers = self._fleet.workers
        self._block_sizes = {worker.kv.block_size for worker in workers}
        self.token_limit = min(map(_token_limit, workers), default=None)
        self.loras = tuple(sorted({name for worker in workers for name in worker.loras}))

    def _introduce(self) -> None:
        """Tells every worker who its peers are now."""
        peers = tuple(peer for worker in self._fleet.workers for peer in worker.kv_peers)
        for attachment in self._attachments.values():
            others = tuple(peer for peer in peers if peer not in attachment.info.kv_peers)
            attachment.outbox.put_nowait(SendPeers(others))


def _tell(sent: _Sent, event: Delta | Lost) -> None:
    if sent.mailbox is not None:
        sent.mailbox.put(event)


def _token_limit(worker: WorkerInfo) -> int:
    return min(worker.max_model_len, worker.total_blocks * worker.kv.block_size)


def _check_alone(info: WorkerInfo, model: str) -> None:
    if info.model != model:
        raise JoinRefused(
            "model", f"{info.model!r}, but this router serves {model!r}; start the worker with that model"
        )
    for name in ("uuid", "name"):
        if not getattr(info, name):
            raise JoinRefused(name, "is empty; a worker needs one")
    for name in ("total_blocks", "max_sequences", "max_model_len"):
        if getattr(info, name) < 1:
            raise JoinRefused(name, "is 0: the worker could serve nothing")
    if info.kv.block_size < 1:
        raise JoinRefused("kv.block_size", "is 0: a block must hold a token")


def _check_beside(info: WorkerInfo, other: WorkerInfo) -> None:
    if info.uuid == other.uuid:
        raise JoinRefused(
            "uuid", f"{info.uuid!r} is attached already; one stream will do where two addresses lead to this router"
        )
    if info.name == other.name:
        raise JoinRefused("name", f"{info.name!r} is taken by a live worker; choose another name")
    if name := differing_field(info.kv, other.kv):
        mine, theirs = getattr(info.kv, name), getattr(other.kv, name)
        raise JoinRefused(f"kv.{name}", f"{mine}, but the fleet's is {theirs} ({other.name}); start it alike")
    _check_control(info, other)


def _check_control(info: WorkerInfo, other: WorkerInfo) -> None:
    """Every rank may have to talk to every other."""
    for ours, theirs in ((one.control, another.control) for one in info.kv_peers for another in other.kv_peers):
        if ours.common(theirs) is None:
            older = "this worker" if ours.highest < theirs.lowest else other.name
            raise JoinRefused(
                "kv_peers.control",
                f"it speaks version {ours} of KV control messages and {other.name}, which is in the fleet, {theirs}; "
                f"upgrade {older} to a release that speaks both",
            )
