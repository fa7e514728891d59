"""The client for asyncio. One channel, any number of concurrent calls; for one event loop."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Self, TypeVar, Unpack

import grpc

from splitserve.client.calls import Drained, Migrated, Options, Prompt, Retries, request_of
from splitserve.core.errors import Cancelled, SplitserveError
from splitserve.core.fleet import FleetStatus, WorkerStatus
from splitserve.core.request import Chunk, GenerateRequest, SamplingParams
from splitserve.core.worker import Pool
from splitserve.rpc import convert
from splitserve.rpc.channel import open_channel
from splitserve.rpc.gen import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from splitserve.rpc.status import from_rpc_error

AnswerT = TypeVar("AnswerT")


class AsyncClient:
    """`async with AsyncClient("127.0.0.1:50051") as client: async for chunk in client.generate("..."): ...`

    Every method raises a SplitserveError: the one the router raised, or Unavailable if there is none to be reached.
    """

    def __init__(self, address: str, retries: Retries | None = None) -> None:
        self._channel = open_channel(address)
        self._retries = retries or Retries()
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._admin: Any = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what still runs."""
        await self._channel.close()

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk, None]:
        """The output, piece by piece; the last has finish_reason, usage and timings. Closing the iterator cancels the
        request."""
        return self.send(request_of(prompt, sampling, options))

    async def send(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Like `generate`, for a request that is put together already."""
        message, tokens_seen, retries = convert.request_to_proto(request), False, 0
        while True:
            try:
                async with aclosing(self._stream(message)) as chunks:
                    async for chunk in chunks:
                        tokens_seen = True
                        yield chunk
                return
            except SplitserveError as error:
                pause_s = self._retries.pause_s(error, retries, tokens_seen)
                if pause_s is None:
                    raise
            retries += 1
            await asyncio.sleep(pause_s)

    async def fleet(self) -> FleetStatus:
        """Who serves, and what each holds."""
        return convert.fleet_status_from_proto(await _answer(lambda: self._admin.GetFleet(admin_pb2.GetFleetRequest())))

    async def drain(self, worker: str, timeout_s: float | None = None) -> Drained:
        """Takes a worker (name or uuid) out of service; returns once it has left."""
        request = admin_pb2.DrainRequest(worker=worker, timeout_s=timeout_s)
        answer = await _answer(lambda: self._admin.Drain(request))
        return Drained(answer.finished_requests, answer.migrated_requests)

    async def migrate(self, request_id: str, worker: str = "", timeout_s: float | None = None) -> Migrated:
        """Moves a request that decodes to another worker (name or uuid; none: the router chooses), KV and all; its
        stream goes on. Raises Unavailable if it can't move now."""
        request = admin_pb2.MigrateRequest(request_id=request_id, worker=worker, timeout_s=timeout_s)
        answer = await _answer(lambda: self._admin.Migrate(request))
        return Migrated(answer.from_worker, answer.to_worker, answer.stall_s)

    async def set_pool(self, worker: str, pool: Pool) -> WorkerStatus:
        """Moves a worker (name or uuid) to another pool while it runs."""
        request = admin_pb2.SetWorkerPoolRequest(worker=worker, pool=convert.pool_to_proto(pool))
        return convert.worker_status_from_proto(await _answer(lambda: self._admin.SetWorkerPool(request)))

    async def _stream(self, message: inference_pb2.GenerateRequest) -> AsyncGenerator[Chunk, None]:
        call = self._inference.Generate(message)
        try:
            async for response in call:
                yield convert.chunk_from_proto(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError as error:
            if _is_cancelled_itself():
                raise
            raise Cancelled("the router ended the call") from error
        finally:
            call.cancel()


def _is_cancelled_itself() -> bool:
    """grpc.aio raises CancelledError for a call that the other side cancelled, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _answer(call: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
    try:
        return await call()
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
