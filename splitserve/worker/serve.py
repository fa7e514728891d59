"""One worker process around one engine: starts it, attaches to every router, serves until it is drained.

Everything here runs on one event loop; the engine has its own thread and reaches the loop by `call_soon_threadsafe`.
Which job belongs to whom is `jobs.py`, which routers there are `routers.py`, one router's stream is `link.py`.

Ends: drained (SIGTERM, or a router's Drain): 0. Too many blocks in quarantine, which only a new process gets back:
drained too, but 3, and whoever supervises it starts it again. A second SIGTERM: 143, without waiting for anything. An
engine that is broken for good: EngineError.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

from splitserve.core.cached import CacheEvent
from splitserve.core.config import WorkerConfig
from splitserve.core.errors import ConfigError, EngineError, SplitserveError, first_of
from splitserve.core.model import ModelInfo
from splitserve.core.worker import Delta, Failure, Job, KvPeer, Load, Outcome, Pace, Pool, Ticket, WorkerInfo
from splitserve.engine.protocol import Engine, EngineInfo
from splitserve.routing.admission import Capacity, Refusal
from splitserve.rpc.channel import Access, check_access
from splitserve.rpc.names import Resolve
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import WorkerMetrics, WorkerState
from splitserve.telemetry.traces import Tracer
from splitserve.worker.cache_news import CacheReporter
from splitserve.worker.jobs import Ended, JobTable, kind_of
from splitserve.worker.link import RouterLink
from splitserve.worker.routers import Routers
from splitserve.worker.spans import JobSpans

DRAINED = 0
QUARANTINED = 3
KILLED = 143
ENGINE_STALL_S = 120.0  # in one step: longer than any, and than what an engine compiles on the way
WATCH_S = 0.1  # deadlines and blocks that outlive their jobs are looked at so often
_FAULTS = (Failure.ENGINE, Failure.TRANSFER)

OnReady = Callable[[WorkerInfo], None]


async def serve(worker: "Worker", on_ready: OnReady) -> int:
    """Runs the worker and returns its exit code. The first SIGTERM or SIGINT drains, the second ends the process."""
    with _signals(worker.drain):
        return await worker.run(on_ready)


class Worker:
    """Raises from `run`: ConfigError if the engine can't serve the model or every router refuses this worker,
    EngineError if the engine breaks."""

    def __init__(
        self,
        config: WorkerConfig,
        model: ModelInfo,
        engine: Engine,
        metrics: WorkerMetrics,
        access: Callable[[], Access] = Access,
        tracer: Tracer | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        """`access` says how routers are called; it is asked at the start and whenever one is attached to. `resolve`
        says what a router's name stands for; default: the machine's resolver."""
        self._config = config
        self._access = access
        self._model = model
        self._engine = engine
        self._metrics = metrics
        self._logger = Logger("worker")
        self._spans = JobSpans(tracer or Tracer())
        self._pool = config.pool
        self._pace = Pace()
        self._cache = CacheReporter()
        self._resolve = resolve
        self._routers: Routers | None = None
        self._drain = asyncio.Event()
        self._over = asyncio.Event()
        self._exit_code = DRAINED
        self._fault: SplitserveError | None = None

    async def run(self, on_ready: OnReady) -> int:
        """Serves until drained; `on_ready` is called once the first router has taken the worker in."""
        self._loop = asyncio.get_running_loop()
        check_access(self._access(), "router_tls")
        self._on_ready: OnReady | None = on_ready
        with closing(self._spans):
            try:
                started = await asyncio.to_thread(
                    self._engine.start, self._from_engine, self._metrics.transferred, self._from_cache
                )
                await self._serve(started)
            finally:
                await asyncio.to_thread(self._engine.close)
        return self._exit_code

    def drain(self) -> None:
        """No new jobs; `run` returns when those that run have ended. May come at any time, also before it is ready."""
        if not self._drain.is_set():
            self._logger.info("worker drains", name=self._config.name)
        self._drain.set()
        self._refresh()

    # What its supervisor asks, on any thread -------------------------------------------------------------------------
    def engine_fault(self) -> str:
        """Why the process had better be started anew; "" if all is well, and while the engine loads."""
        if self._routers is None:
            return ""
        try:
            turned_at = self._engine.load().turned_at
        except EngineError as error:
            return str(error)
        still_s = time.monotonic() - turned_at if turned_at is not None else 0.0
        return f"its engine has been in one step for {still_s:.0f} s" if still_s > ENGINE_STALL_S else ""

    def unready(self) -> str:
        """Why no request comes here now."""
        if self._routers is None:
            return "its engine is loading"
        if self._drain.is_set():
            return "it drains"
        if not self._table.routers:
            refusals = [f"{router}: {refusal}" for router, refusal in self._routers.refusals.items()]
            return "; ".join(["it is attached to no router", *refusals])
        return ""

    async def _serve(self, started: EngineInfo) -> None:
        self.info = worker_info(self._config, self._model, started)
        self._capacity = Capacity(
            started.total_blocks,
            started.kv.block_size,
            started.max_sequences,
            started.max_model_len,
            started.max_batched_tokens,
        )
        self._table = JobTable(self._capacity)
        routers = self._routers = Routers(
            self._config.routers, lambda place: RouterLink(place, self.info, self, self._access), self._resolve
        )
        self._shown = WorkerState(self._capacity.load(self._pool), total_blocks=started.total_blocks)
        self._metrics.watch(lambda: self._shown)
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(self._watch())
                tasks.create_task(routers.run())
                await self._over.wait()
                watch.cancel()
                routers.leave()
                if self._fault is not None:
                    raise self._fault
        except ExceptionGroup as group:
            raise first_of(group) from group

    @property
    def _links(self) -> Mapping[str, RouterLink]:
        return self._routers.links if self._routers is not None else {}

    # The engine's news -----------------------------------------------------------------------------------------------
    def _from_engine(self, deltas: Sequence[Delta]) -> None:
        """Called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._on_step, tuple(deltas))

    def _from_cache(self, events: Sequence[CacheEvent]) -> None:
        """Called on a thread of the engine's."""
        self._loop.call_soon_threadsafe(self._on_cache, events)

    def _on_cache(self, events: Sequence[CacheEvent]) -> None:
        news = self._cache.news(events)
        if news is not None:
            for link in self._links.values():
                link.cached(news)

    def _on_step(self, deltas: Sequence[Delta]) -> None:
        step = self._table.step(deltas)
        self._metrics.stepped(step.jobs, step.tokens)
        self._spans.step(deltas)
        for ended in step.ended:
            self._metrics.ended(ended.kind, ended.outcome)
            self._note_fault(ended)
        for router, batch in step.batches.items():
            self._links[router].send(batch)
        self._refresh()

    def _refresh(self) -> None:
        """After anything that may change what the worker grants."""
        if self._routers is None:
            return
        try:
            outlived = self._engine.load()
        except EngineError as error:
            self._fault = error
            self._over.set()
            return
        self._capacity.outlived(outlived.pinned_blocks, outlived.quarantined_blocks)
        self._pace = outlived.pace
        self._check_quarantine()
        self._capacity.draining = self._drain.is_set()
        if self._drain.is_set() and not len(self._table) and not outlived.pinned_blocks:
            self._over.set()
        self._shown = WorkerState(
            self._capacity.load(self._pool),
            self._capacity.parked_jobs,
            self._capacity.parked_blocks,
            outlived.in_flight_bytes,
            outlived.counts,
            outlived.preemptions,
            self.info.total_blocks,
        )
        for link in self._links.values():
            link.nudge()

    def _check_quarantine(self) -> None:
        share, limit = self._capacity.quarantined_share, self._config.kv_transfer.quarantine_share
        if share > limit and self._exit_code != QUARANTINED:
            self._logger.warning(
                "too many blocks wait for silent peers; draining to start anew", share=share, limit=limit
            )
            self._exit_code = QUARANTINED
            self._drain.set()

    async def _watch(self) -> None:
        """What no message announces: passing deadlines, and transfers that end after their job."""
        while True:
            await asyncio.sleep(WATCH_S)
            for job_id in self._table.expired(time.monotonic()):
                self._engine.cancel(job_id)
            self._refresh()

    # The routers' words: `link.Host` ---------------------------------------------------------------------------------
    def attached(self, router: str) -> None:
        self._table.attach(router)
        self._cache.tell_again()
        self._logger.info("attached to router", router=router, name=self.info.name)
        if self._on_ready is not None:
            on_ready, self._on_ready = self._on_ready, None
            on_ready(self.info)

    def lost(self, router: str) -> None:
        orphans = self._table.detach(router)
        self._logger.info("detached from router", router=router, cancelled_jobs=len(orphans))
        for job_id in orphans:
            self._engine.cancel(job_id)
        assert self._routers is not None
        self._routers.look_again()

    def refused(self, router: str) -> None:
        """One that refuses may be another by the next time; with nobody else left there is nothing to wait for."""
        assert self._routers is not None
        refusals = self._routers.refusals
        if not self._routers.all_refuse:
            return
        if len(refusals) == 1:
            self._fault = ConfigError(f"routers: {router} refused this worker", refusals[router])
        else:
            said = "; ".join(f"{address}: {refusal}" for address, refusal in refusals.items())
            self._fault = ConfigError("routers: every one refused this worker", said)
        self._over.set()

    def load(self, router: str) -> Load:
        return self._table.load(router, self._pool, self._pace)

    def job(self, router: str, number: int, job: Job) -> None:
        refusal = self._table.take(router, number, job, time.monotonic())
        if refusal is None:
            self._engine.submit(self._spans.taken(job, self.info.name))
        else:
            self._refuse(router, job, refusal)
        self._refresh()

    def bad_job(self, router: str, number: int) -> None:
        self._table.seen(router, number)

    def cancel(self, router: str, job_id: str) -> None:
        if self._table.stop(router, job_id):
            self._engine.cancel(job_id)

    def hand_over(self, router: str, job_id: str, ticket: Ticket, at_end: bool) -> None:
        if self._table.runs(router, job_id):
            self._engine.hand_over(job_id, ticket, at_end=at_end)

    def peers(self, peers: Sequence[KvPeer]) -> None:
        self._engine.connect(peers)

    def set_pool(self, pool: Pool) -> None:
        self._logger.info("pool changed", name=self.info.name, pool=pool.value)
        self._pool = pool
        self._refresh()

    def _note_fault(self, ended: Ended) -> None:
        """The router knows too, but this is the log beside the engine's."""
        outcome = ended.outcome
        if outcome.failure in _FAULTS:
            self._logger.info(
                "job failed",
                request_id=ended.request_id,
                job_id=ended.job_id,
                kind=ended.kind,
                failure=outcome.failure.value,
                reason=outcome.message,
            )

    def _refuse(self, router: str, job: Job, refusal: Refusal) -> None:
        outcome = Outcome(failure=refusal.failure, message=refusal.reason, field=refusal.field)
        self._metrics.ended(kind_of(job), outcome)
        if refusal.failure is not Failure.NOT_NOW:
            self._logger.info("job refused", request_id=job.request_id, job_id=job.job_id, reason=refusal.reason)
        self._links[router].send([Delta(job.job_id, outcome=outcome)])


def worker_info(config: WorkerConfig, model: ModelInfo, started: EngineInfo) -> WorkerInfo:
    """What the worker says of itself; its identity is its engine's, one process start."""
    return WorkerInfo(
        uuid=started.uuid,
        name=config.name or f"{config.pool.value}-{started.uuid[:8]}",
        pool=config.pool,
        model=model.name,
        kv=started.kv,
        kv_peers=started.kv_peers,
        total_blocks=started.total_blocks,
        max_sequences=started.max_sequences,
        max_model_len=started.max_model_len,
        engine=started.kind,
        pid=os.getpid(),
        metrics_address=config.metrics or "",
        restores=started.restores,
        loras=started.loras,
        step_cost=started.step_cost,
    )


@contextmanager
def _signals(drain: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    heard: list[int] = []

    def on_signal() -> None:
        if heard:
            os._exit(KILLED)
        heard.append(1)
        drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
