"""The client for asyncio. One channel, any number of concurrent requests (on shared calls: `many`); one event loop."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.client.calls import (
    ASK_WITHIN_S,
    HEALTH_SERVICE,
    TOKENIZE_WITHIN_S,
    Drained,
    Migrated,
    Options,
    Prompt,
    Retries,
    request_of,
    shown,
)
from splitserve.client.many import Shared
from splitserve.core.config import ClientTls
from splitserve.core.errors import SplitserveError
from splitserve.core.fleet import Explanation, FleetStatus, RunningRequests, WorkerStatus
from splitserve.core.request import Chat, Chunk, GenerateRequest, Model, SamplingParams
from splitserve.core.worker import Pool
from splitserve.rpc import convert
from splitserve.rpc.channel import Access, connected_to, open_channel, routers_of
from splitserve.rpc.gen import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from splitserve.rpc.names import Place
from splitserve.rpc.status import code_of, from_rpc_error
from splitserve.telemetry.traces import calling, note_answered

AnswerT = TypeVar("AnswerT")


class AsyncClient:
    """`async with AsyncClient("127.0.0.1:50051") as client: async for chunk in client.generate("..."): ...`

    Every method raises a SplitserveError: the one the router raised, or Unavailable if there is none to be reached.
    """

    def __init__(
        self,
        address: str | Place,
        retries: Retries | None = None,
        *,
        tls: ClientTls | None = None,
        api_key: str | None = None,
    ) -> None:
        """`address` is one router's, or several with commas between them; a name stands for all addresses that it has.
        Calls go round those that answer.
        Without `tls` nothing is encrypted, the key neither. Raises ConfigError for files that can't be used."""
        self._channel = open_channel(address, access=Access(tls, api_key))
        self._retries = retries or Retries()
        self._inference: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._shared = Shared(self._inference, partial(connected_to, self._channel))
        self._admin: Any = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what still runs."""
        await self._shared.close()
        await self._channel.close()

    def routers(self) -> tuple[Place, ...]:
        """Those that calls go round, as far as names have been looked up; nobody where one address was said."""
        return routers_of(self._channel)

    def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Chunk, None]:
        """The output, piece by piece; the last has finish_reason, usage and timings. Closing the iterator cancels the
        request."""
        return self.send(request_of(prompt, sampling, options))

    async def send(self, request: GenerateRequest, bearer: str = "") -> AsyncGenerator[Chunk, None]:
        """Like `generate`, for a request that is put together already. `bearer` is an API key for this call alone."""
        with calling(request) as span:
            message, chunk, retries = convert.request_to_proto(span.carried_by(request)), None, 0
            while True:
                try:
                    async with aclosing(self._shared.stream(message, bearer)) as chunks:
                        async for chunk in chunks:
                            yield chunk
                    note_answered(span, chunk)
                    return
                except SplitserveError as error:
                    pause_s = self._retries.pause_s(error, retries, chunk is not None)
                    if pause_s is None:
                        span.fail(code_of(error).name, str(error))
                        raise
                retries += 1
                await asyncio.sleep(pause_s)

    async def tokenize(self, prompt: str | Chat, model: str = "", bearer: str = "") -> tuple[int, ...]:
        """The tokens that `generate` would read for this prompt."""
        request = convert.tokenize_to_proto(prompt, model)
        answer = await _answer(
            lambda: self._inference.Tokenize(request, timeout=TOKENIZE_WITHIN_S, metadata=shown(bearer))
        )
        return tuple(answer.token_ids)

    async def models(self, bearer: str = "") -> tuple[Model, ...]:
        """The model that is served, first; then its LoRA adapters."""
        request = inference_pb2.ListModelsRequest()
        answer = await _answer(
            lambda: self._inference.ListModels(request, timeout=ASK_WITHIN_S, metadata=shown(bearer))
        )
        return tuple(convert.model_from_proto(model) for model in answer.models)

    async def model(self, name: str, bearer: str = "") -> Model:
        """Raises ModelNotFound for a name that `models` does not have."""
        request = inference_pb2.GetModelRequest(name=name)
        return convert.model_from_proto(
            await _answer(lambda: self._inference.GetModel(request, timeout=ASK_WITHIN_S, metadata=shown(bearer)))
        )

    async def can_serve(self) -> bool:
        """Whether a router is there and has a worker that takes requests. Needs no key."""
        request = health_pb2.HealthCheckRequest(service=HEALTH_SERVICE)
        try:
            answer = await _answer(lambda: self._health.Check(request, timeout=ASK_WITHIN_S))
        except SplitserveError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def fleet(self, bearer: str = "") -> FleetStatus:
        """Who serves, and what each holds. `bearer` is an API key for this call alone."""
        request = admin_pb2.GetFleetRequest()
        return convert.fleet_status_from_proto(
            await _answer(lambda: self._admin.GetFleet(request, timeout=ASK_WITHIN_S, metadata=shown(bearer)))
        )

    async def requests(self, most: int = 0, bearer: str = "") -> RunningRequests:
        """What waits and runs in the router, the newest `most` (0: a hundred) of it; at most a thousand."""
        request = admin_pb2.ListRequestsRequest(most=most)
        return convert.running_requests_from_proto(
            await _answer(lambda: self._admin.ListRequests(request, timeout=ASK_WITHIN_S, metadata=shown(bearer)))
        )

    async def explain(self, request_id: str) -> Explanation:
        """Why a request that waits or runs has the workers that it has. Raises InvalidRequest for one that does
        neither."""
        request = admin_pb2.ExplainRequest(request_id=request_id)
        return convert.explanation_from_proto(await _answer(lambda: self._admin.Explain(request)))

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


async def _answer(call: Callable[[], Awaitable[AnswerT]]) -> AnswerT:
    try:
        return await call()
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
