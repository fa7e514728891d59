"""The Open Inference Protocol over gRPC: a thin shell, like `service`, around the same endpoint.

ModelStreamInfer is one call for many requests, and that decides how one of them fails. A status is what gRPC has for
errors, but it ends the call, and with it every other request on it; Triton's clients expect the call to go on and the
error in `error_message`, and drop the response beside it. So, as in Triton, the client chooses. With
`triton_grpc_error: true` in its metadata the first error ends the call with its status and details. Without it the
error is a message: its sentence begins with the request's id and the name of the code, and its response carries the
id, the code, the field and the delay as values, so that nothing is lost that a status would have had. Guessing
instead, by whether only one request is on the call, would make the same error look different by timing. What concerns
the whole call, such as a client that takes nothing, is a status in any case.

The router reads a call's requests whether or not it can serve them: one too many is refused. All answers go through one
task: gRPC takes one message at a time, and a request that ends while its message is being written must not break the
call. Each request has one message there at most, so that what comes meanwhile gathers in its next one.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Protocol

import grpc

from splitserve import __version__
from splitserve.core.errors import Limit, Overloaded, SplitserveError, first_of
from splitserve.core.request import Chunk, GenerateRequest, Model
from splitserve.core.sink import Awaited, Send, Sink
from splitserve.rpc.convert import kserve
from splitserve.rpc.gen import grpc_service_pb2 as pb
from splitserve.rpc.gen import grpc_service_pb2_grpc
from splitserve.rpc.guard import key_shown
from splitserve.rpc.status import abort
from splitserve.telemetry.traces import carried

EXTENSIONS = ("parameters", "schedule_policy")  # Triton's names; the latter is `priority` and `timeout`
WANTS_STATUS = "triton_grpc_error"
_MOST_AT_ONCE = 256
_CLIENT_STALL_S = 60.0
_RETRY_S = 1.0


class Door(Protocol):
    """What this needs of the endpoint."""

    async def generate(
        self, request: GenerateRequest, sink: Sink, bearer: str = "", time_left_s: float | None = None
    ) -> None: ...

    async def model(self, name: str, bearer: str = "") -> Model: ...

    async def can_serve(self) -> bool: ...


class KserveService(grpc_service_pb2_grpc.GRPCInferenceServiceServicer):
    """`most_at_once`: requests of one stream. A stream whose client takes nothing for `client_stall_s` is ended."""

    def __init__(self, door: Door, most_at_once: int = _MOST_AT_ONCE, client_stall_s: float = _CLIENT_STALL_S) -> None:
        self._door = door
        self._most_at_once = most_at_once
        self._client_stall_s = client_stall_s

    async def ServerLive(
        self, message: pb.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, message: pb.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=await self._door.can_serve())

    async def ModelReady(
        self, message: pb.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelReadyResponse:
        await self._model(message, context)
        return pb.ModelReadyResponse(ready=await self._door.can_serve())

    async def ServerMetadata(
        self, message: pb.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="splitserve", version=__version__, extensions=EXTENSIONS)

    async def ModelMetadata(
        self, message: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        return kserve.model_to_metadata(await self._model(message, context))

    async def ModelInfer(
        self, message: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        try:
            asked = kserve.asked_from_proto(message, stream=False)
            asked = replace(asked, request=carried(asked.request, context.invocation_metadata()))
            answering = _Answering(asked, self._door, key_shown(context), context.time_remaining())
            return await answering.whole()
        except SplitserveError as error:
            await abort(context, error)

    async def ModelStreamInfer(
        self, messages: AsyncIterator[pb.ModelInferRequest], context: grpc.aio.ServicerContext
    ) -> None:
        failure: Exception | None = None
        try:
            await _Stream(self._door, context, self._most_at_once, self._client_stall_s).run(messages)
        except* SplitserveError as group:
            failure = first_of(group)
        except* _ClientGone:
            pass  # nobody is there to be told
        if isinstance(failure, SplitserveError):
            await abort(context, failure)

    async def _model(
        self, message: pb.ModelReadyRequest | pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> Model:
        try:
            model = await self._door.model(message.name, key_shown(context))
            kserve.check_version(message.name, message.version)
        except SplitserveError as error:
            await abort(context, error)
        return model


class _Answering:
    """One request. Raises a SplitserveError that names its field as the client does."""

    def __init__(self, asked: kserve.Asked, door: Door, key: str, time_left_s: float | None) -> None:
        self._asked = asked
        self._door = door
        self._key = key
        self._time_left_s = time_left_s

    async def whole(self) -> pb.ModelInferResponse:
        chunks: list[Chunk] = []

        async def keep(chunk: Chunk) -> None:
            chunks.append(chunk)

        await self._generate(keep)
        return kserve.whole_to_proto(self._asked, chunks)

    async def piecewise(self, send: "_Sender") -> None:
        """A response for each chunk."""
        so_far: dict[int, float] = {}  # cumulative log probabilities

        async def pass_on(chunk: Chunk) -> None:
            part = kserve.part_of((chunk,), so_far.get(chunk.choice, 0.0))
            so_far[chunk.choice] = part.cumulative_logprob
            response = kserve.answer_to_proto(self._asked, (part,), chunk)
            await send(kserve.streamed(response, final=chunk.usage is not None))

        await self._generate(pass_on)

    async def _generate(self, send: Send) -> None:
        try:
            await self._door.generate(self._asked.request, Awaited(send), self._key, self._time_left_s)
        except SplitserveError as error:
            raise self._asked.named(error) from error


class _ClientGone(Exception):
    """Noticed by a write, before the call's handler is cancelled."""


class _Sender(Protocol):
    async def __call__(self, message: pb.ModelStreamInferResponse) -> None: ...


class _Stream:
    """One call of ModelStreamInfer: requests come while others are answered."""

    def __init__(self, door: Door, context: grpc.aio.ServicerContext, most_at_once: int, client_stall_s: float) -> None:
        self._door = door
        self._context = context
        self._most_at_once = most_at_once
        self._client_stall_s = client_stall_s
        self._key = key_shown(context)
        self._ends_at_error = _wants_status(context)
        self._running = 0
        self._outbox: asyncio.Queue[tuple[pb.ModelStreamInferResponse, asyncio.Future[None]]] = asyncio.Queue()

    async def run(self, messages: AsyncIterator[pb.ModelInferRequest]) -> None:
        """Returns when the client says no more and all is answered. Raises a group of SplitserveErrors for what ends
        the call; that, and the client's going away, cancels what runs."""
        async with asyncio.TaskGroup() as tasks:
            writing = tasks.create_task(self._write())
            async with asyncio.TaskGroup() as requests:
                async for message in messages:
                    if self._running < self._most_at_once:
                        self._running += 1
                        requests.create_task(self._serve(message))
                    else:
                        await self._fail(message, self._too_many())
            writing.cancel()

    async def _serve(self, message: pb.ModelInferRequest) -> None:
        try:
            await self._answer(message)
        except SplitserveError as error:
            await self._fail(message, error)
        finally:
            self._running -= 1

    async def _answer(self, message: pb.ModelInferRequest) -> None:
        asked = kserve.asked_from_proto(message, stream=True)
        answering = _Answering(asked, self._door, self._key, self._context.time_remaining())
        if asked.stream:
            await answering.piecewise(self._send)
        else:
            await self._send(kserve.streamed(await answering.whole(), final=True))

    async def _fail(self, message: pb.ModelInferRequest, error: SplitserveError) -> None:
        if self._ends_at_error:
            raise error
        await self._send(kserve.failure_to_proto(message, error))

    async def _send(self, message: pb.ModelStreamInferResponse) -> None:
        """Returns when it is written."""
        written = asyncio.get_running_loop().create_future()
        self._outbox.put_nowait((message, written))
        await written

    async def _write(self) -> None:
        while True:
            message, written = await self._outbox.get()
            try:
                async with asyncio.timeout(self._client_stall_s):
                    await self._context.write(message)
            except TimeoutError as error:
                raise self._too_slow() from error
            except grpc.aio.InternalError as error:  # the call is over, and its cancellation on the way
                raise _ClientGone from error
            if not written.done():
                written.set_result(None)

    def _too_many(self) -> Overloaded:
        sentence = f"{self._most_at_once} requests run on this stream, the most at once"
        return Overloaded(sentence, _RETRY_S, Limit.CALL_STREAMS)

    def _too_slow(self) -> Overloaded:
        sentence = f"the client took nothing for {self._client_stall_s:g} s; read the stream faster"
        return Overloaded(sentence, _RETRY_S, Limit.SLOW_CLIENT)


def _wants_status(context: grpc.aio.ServicerContext) -> bool:
    metadata: Any = context.invocation_metadata() or ()
    return any(name == WANTS_STATUS and str(value).lower() == "true" for name, value in metadata)
