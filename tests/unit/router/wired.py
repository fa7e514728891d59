"""A router on a real port, and workers that attach to it over gRPC and do what a test says."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import grpc
from prometheus_client import CollectorRegistry

from splitserve.core.config import RouterConfig
from splitserve.core.model import ModelInfo
from splitserve.core.worker import DecodeJob, Delta, Job, Load, Outcome, Pool, WorkerInfo
from splitserve.router.serve import Router
from splitserve.rpc import convert
from splitserve.rpc.channel import open_channel
from splitserve.rpc.gen import worker_pb2, worker_pb2_grpc
from splitserve.telemetry.metrics import RouterMetrics
from tests.unit.router.scripted import DEMO_MODEL, WITHIN_S, load_of, worker_info


def router(registry: CollectorRegistry | None = None, **config: object) -> Router:
    settings = RouterConfig.model_validate({"listen": "127.0.0.1:0", "heartbeat_interval_s": 0.05, **config})
    metrics = RouterMetrics(registry or CollectorRegistry())
    return Router(settings, ModelInfo.read(DEMO_MODEL, name="model"), metrics)


class WiredWorker:
    """`async with WiredWorker(address, "d0", Pool.DECODE) as worker:` attaches; leaving ends the stream. While `reads`
    is cleared it takes nothing that the router writes."""

    def __init__(
        self,
        address: str,
        name: str,
        pool: Pool,
        protocol_version: int = convert.PROTOCOL_VERSION,
        max_protocol_version: int = 0,
        **changes: object,
    ) -> None:
        self.info: WorkerInfo = worker_info(name, pool, **changes)  # type: ignore[arg-type]
        self.grants: Load = load_of(self.info)
        self.orders: list[worker_pb2.RouterMessage] = []
        self.error: grpc.aio.AioRpcError | None = None
        self._versions = {"protocol_version": protocol_version, "max_protocol_version": max_protocol_version}
        self._channel = open_channel(address)
        self._call: Any = None
        self._upward: asyncio.Queue[worker_pb2.WorkerMessage | None] = asyncio.Queue()
        self.reads = asyncio.Event()
        self.reads.set()
        self._heard = asyncio.Condition()
        self._listening: asyncio.Task[None] | None = None
        self._taken = 0
        self._ended = False

    async def __aenter__(self) -> Self:
        stub: Any = worker_pb2_grpc.FleetStub(self._channel)  # type: ignore[no-untyped-call]
        join = worker_pb2.Join(**self._versions, worker=convert.worker_info_to_proto(self.info))
        self._upward.put_nowait(worker_pb2.WorkerMessage(join=join))
        self._call = stub.Attach(self._messages())
        self._listening = asyncio.create_task(self._listen())
        await self.until(lambda: bool(self.orders) or self._ended)
        if not self._ended:
            self.report()
        return self

    async def __aexit__(self, *_: object) -> None:
        """A second time does nothing."""
        assert self._listening is not None
        self._upward.put_nowait(None)
        async with asyncio.timeout(WITHIN_S):
            await self._listening
        await self._channel.close()

    def report(self, **changes: object) -> None:
        seen = sum(order.HasField("job") for order in self.orders)
        self.grants = replace(self.grants, seen_jobs=seen, **changes)  # type: ignore[arg-type]
        self._upward.put_nowait(worker_pb2.WorkerMessage(load=convert.load_to_proto(self.grants)))

    def say(self, job: Job, *token_ids: int, index: int = 0, outcome: Outcome | None = None) -> None:
        delta = Delta(job.job_id, index, token_ids, "".join(f"<{token}>" for token in token_ids), outcome=outcome)
        self._upward.put_nowait(worker_pb2.WorkerMessage(deltas=[convert.delta_to_proto(delta)]))
        self.report()

    def say_all(self, jobs: Sequence[Job], token: int) -> None:
        """One engine step."""
        deltas = [convert.delta_to_proto(Delta(job.job_id, 0, (token,), f"<{token}>")) for job in jobs]
        self._upward.put_nowait(worker_pb2.WorkerMessage(deltas=deltas))

    async def job(self) -> DecodeJob:
        """The next decode job."""
        await self.until(lambda: len(self.jobs) > self._taken)
        self._taken += 1
        job = self.jobs[self._taken - 1]
        assert isinstance(job, DecodeJob)
        return job

    @property
    def jobs(self) -> list[Job]:
        return [convert.job_from_proto(order.job) for order in self.orders if order.HasField("job")]

    @property
    def cancelled(self) -> list[str]:
        return [order.cancel.job_id for order in self.orders if order.HasField("cancel")]

    @property
    def hand_overs(self) -> list[worker_pb2.HandOver]:
        return [order.hand_over for order in self.orders if order.HasField("hand_over")]

    async def told(self, what: str) -> worker_pb2.RouterMessage:
        """Waits for an order of this kind, and returns the last one."""
        await self.until(lambda: any(order.HasField(what) for order in self.orders))
        return [order for order in self.orders if order.HasField(what)][-1]

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN_S), self._heard:
            await self._heard.wait_for(holds)

    async def ended(self) -> grpc.aio.AioRpcError | None:
        """Waits until the stream has ended; the router's error, if it gave one."""
        await self.until(lambda: self._ended)
        return self.error

    async def _messages(self) -> AsyncIterator[worker_pb2.WorkerMessage]:
        while (message := await self._upward.get()) is not None:
            yield message

    async def _listen(self) -> None:
        try:
            async for order in self._call:
                async with self._heard:
                    self.orders.append(order)
                    self._heard.notify_all()
                await self.reads.wait()
        except grpc.aio.AioRpcError as error:
            self.error = error
        async with self._heard:
            self._ended = True
            self._heard.notify_all()
