"""The two neighbours of a worker: a router over real gRPC that a test speaks for, and an engine that a test drives."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import grpc
from prometheus_client import CollectorRegistry

from splitserve.core.cached import CacheNews
from splitserve.core.config import KvTransferSettings, SimSettings, WorkerConfig
from splitserve.core.errors import EngineError, SplitserveError
from splitserve.core.model import ModelInfo
from splitserve.core.request import SamplingParams
from splitserve.core.worker import (
    DecodeJob,
    Delta,
    Job,
    KvFormat,
    KvMode,
    KvPeer,
    Load,
    Outcome,
    Pool,
    Ticket,
    WorkerInfo,
)
from splitserve.engine.protocol import Engine, EngineInfo, EngineLoad, OnCached, OnDeltas, OnTransfer, uncached, unheard
from splitserve.rpc import convert
from splitserve.rpc.gen import worker_pb2, worker_pb2_grpc
from splitserve.rpc.names import Resolve
from splitserve.rpc.status import abort
from splitserve.telemetry.metrics import WorkerMetrics
from splitserve.worker.serve import Worker
from tests.unit.peers import peer

TIMEOUT_S = 20.0
HEARTBEAT_S = 0.05
BLOCK = 16
FORMAT = KvFormat("f" * 16, "float32", BLOCK, 2, 2, 64, 4096, KvMode.PUSH, "shm")
PEER = peer("worker-uuid")
INFO = EngineInfo(PEER.uuid, "sim", FORMAT, (PEER,), 100, 8, 20 * BLOCK, 4 * BLOCK)


class ScriptedEngine:
    """Emits what a test tells it to."""

    def __init__(self) -> None:
        self.submitted: asyncio.Queue[Job] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.started = threading.Event()
        self.holds_start: threading.Event | None = None
        self.peers: list[KvPeer] = []
        self.handed: asyncio.Queue[tuple[str, Ticket, bool]] = asyncio.Queue()
        self.held = EngineLoad(100, 0, 0)
        self.broken: EngineError | None = None
        self.closed = threading.Event()

    def start(
        self, on_deltas: OnDeltas, on_transfer: OnTransfer = unheard, on_cached: OnCached = uncached
    ) -> EngineInfo:
        self._on_deltas, self.end_transfer, self.cached = on_deltas, on_transfer, on_cached
        if self.holds_start is not None:
            self.holds_start.wait(TIMEOUT_S)
        self.started.set()
        return INFO

    def submit(self, job: Job) -> None:
        self.submitted.put_nowait(job)

    def cancel(self, job_id: str) -> None:
        self.cancelled.put_nowait(job_id)

    def hand_over(self, job_id: str, ticket: Ticket, *, at_end: bool) -> None:
        self.handed.put_nowait((job_id, ticket, at_end))

    def connect(self, peers: Sequence[KvPeer]) -> None:
        self.peers = list(peers)

    def load(self) -> EngineLoad:
        if self.broken is not None:
            raise self.broken
        return self.held

    def close(self) -> None:
        self.closed.set()

    def step(self, *deltas: Delta) -> None:
        self._on_deltas(deltas)

    async def next_job(self) -> Job:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.submitted.get()

    async def next_hand_over(self) -> tuple[str, Ticket, bool]:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.handed.get()

    async def next_cancel(self) -> str:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.cancelled.get()


class Stream:
    """The router's end of one worker's stream."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.messages: list[worker_pb2.WorkerMessage] = []
        self.orders: asyncio.Queue[worker_pb2.RouterMessage | SplitserveError] = asyncio.Queue()
        self.ended = False
        self._changed = asyncio.Condition()
        self._jobs = 0

    def send_job(self, job: Job) -> None:
        self._jobs += 1
        self.send(job=convert.job_to_proto(job, self._jobs))

    def send_hand_over(self, job_id: str, ticket: Ticket, at_end: bool) -> None:
        order = worker_pb2.HandOver(job_id=job_id, ticket=convert.ticket_to_proto(ticket), at_end=at_end)
        self.send(hand_over=order)

    def send(self, **message: object) -> None:
        self.orders.put_nowait(worker_pb2.RouterMessage(**message))  # type: ignore[arg-type]

    def break_off(self, error: SplitserveError) -> None:
        self.orders.put_nowait(error)

    async def heard(self, message: worker_pb2.WorkerMessage | None) -> None:
        async with self._changed:
            self.ended = message is None
            self.messages.extend([message] if message is not None else [])
            self._changed.notify_all()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S), self._changed:
            await self._changed.wait_for(holds)

    @property
    def deltas(self) -> list[Delta]:
        return [convert.delta_from_proto(delta) for message in self.messages for delta in message.deltas]

    @property
    def loads(self) -> list[Load]:
        return [convert.load_from_proto(message.load) for message in self.messages if message.HasField("load")]

    @property
    def cache_news(self) -> list[CacheNews]:
        return [convert.cache_news_from_proto(news) for message in self.messages for news in message.cache_news]

    def outcome(self, job_id: str) -> Outcome | None:
        return next((delta.outcome for delta in self.deltas if delta.job_id == job_id and delta.outcome), None)

    async def outcome_of(self, job_id: str) -> Outcome:
        await self.until(lambda: self.outcome(job_id) is not None)
        outcome = self.outcome(job_id)
        assert outcome is not None
        return outcome

    async def next_load(self, holds: Callable[[Load], bool]) -> Load:
        await self.until(lambda: any(holds(load) for load in self.loads))
        return next(load for load in reversed(self.loads) if holds(load))


class FakeRouter(worker_pb2_grpc.FleetServicer):
    """Welcomes every worker, unless `refuse` says why not."""

    def __init__(self) -> None:
        self.refuse: SplitserveError | None = None
        self.refusals: asyncio.Queue[SplitserveError] = asyncio.Queue()
        self.address = ""
        self.heartbeat_s = HEARTBEAT_S
        self.protocol_version = 0  # what its welcomes say
        self.joins: list[worker_pb2.Join] = []
        self._streams: asyncio.Queue[Stream] = asyncio.Queue()

    async def next_stream(self) -> Stream:
        async with asyncio.timeout(TIMEOUT_S):
            return await self._streams.get()

    async def next_refusal(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.refusals.get()

    async def Attach(
        self, messages: AsyncIterator[worker_pb2.WorkerMessage], context: grpc.aio.ServicerContext
    ) -> None:
        first = await anext(messages)
        self.joins.append(first.join)
        if self.refuse is not None:
            self.refusals.put_nowait(self.refuse)
            await abort(context, self.refuse)
        stream = Stream(convert.worker_info_from_proto(first.join.worker))
        welcome = worker_pb2.Welcome(
            router_uuid="router", heartbeat_interval_s=self.heartbeat_s, protocol_version=self.protocol_version
        )
        await context.write(worker_pb2.RouterMessage(welcome=welcome))
        self._streams.put_nowait(stream)
        async with asyncio.TaskGroup() as tasks:
            orders = tasks.create_task(self._order(stream, context))
            async for message in messages:
                await stream.heard(message)
            orders.cancel()
        await stream.heard(None)

    async def _order(self, stream: Stream, context: grpc.aio.ServicerContext) -> None:
        while True:
            order = await stream.orders.get()
            if isinstance(order, SplitserveError):
                await abort(context, order)
            else:
                await context.write(order)


@asynccontextmanager
async def router_at(address: str = "127.0.0.1:0") -> AsyncIterator[FakeRouter]:
    router, server = FakeRouter(), grpc.aio.server()
    worker_pb2_grpc.add_FleetServicer_to_server(router, server)  # type: ignore[no-untyped-call]
    router.address = f"{address.rpartition(':')[0]}:{server.add_insecure_port(address)}"
    await server.start()
    try:
        yield router
    finally:
        await server.stop(None)


class Running:
    """A worker that runs beside the test."""

    def __init__(
        self, engine: Engine, routers: Sequence[FakeRouter | str], model: ModelInfo, resolve: Resolve | None = None
    ) -> None:
        self.registry = CollectorRegistry()
        config = WorkerConfig(
            pool=Pool.DECODE,
            name="w",
            routers=[router if isinstance(router, str) else router.address for router in routers],
            engine=SimSettings(),
            kv_transfer=KvTransferSettings(quarantine_share=0.25),
        )
        self.ready: list[WorkerInfo] = []
        self.worker = Worker(config, model, engine, WorkerMetrics(self.registry), resolve=resolve)
        self.task = asyncio.create_task(self.worker.run(self.ready.append))

    async def exit_code(self) -> int:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.task


@asynccontextmanager
async def running(
    engine: Engine, routers: Sequence[FakeRouter | str], model: ModelInfo, resolve: Resolve | None = None
) -> AsyncIterator[Running]:
    """`routers` may be names, which `resolve` knows."""
    worker = Running(engine, routers, model, resolve)
    try:
        yield worker
    finally:
        worker.task.cancel()
        await asyncio.wait({worker.task}, timeout=TIMEOUT_S)


def a_decode(job_id: str, tokens: int = 20, deadline_s: float = 60.0) -> DecodeJob:
    return DecodeJob(job_id, f"request of {job_id}", (7,) * tokens, SamplingParams(max_tokens=4), deadline_s)
