"""The Open Inference Protocol's servicer on a real server, before a door that does what a test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from splitserve.core.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded, SplitserveError
from splitserve.core.request import Chunk, FinishReason, GenerateRequest, Model, Usage
from splitserve.core.sink import Send, Sink
from splitserve.router.kserve import KserveService
from splitserve.rpc.channel import Access, open_channel
from splitserve.rpc.convert.tensors import texts_of_raw
from splitserve.rpc.gen import grpc_service_pb2 as pb
from splitserve.rpc.gen import grpc_service_pb2_grpc
from splitserve.rpc.server import Server
from splitserve.rpc.status import from_rpc_error

SERVICE = "inference.GRPCInferenceService"
WITHIN_S = 20.0
STATUS_WANTED = (("triton_grpc_error", "true"),)
LARGE = "x" * (1 << 20)  # more than a stream's flow control lets through unread

Serve = Callable[[GenerateRequest, Send], Awaitable[None]]


class Door:
    """Serves `serve`, and notes what comes to it."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self.ready = True
        self.keys: list[str] = []
        self.times_left: list[float | None] = []
        self.running: set[str] = set()
        self.most_running = 0
        self.cancelled: list[str] = []
        self._changed = asyncio.Condition()

    async def generate(
        self, request: GenerateRequest, sink: Sink, bearer: str = "", time_left_s: float | None = None
    ) -> None:
        name = request.request_id.partition("-")[0]
        self.keys.append(bearer)
        self.times_left.append(time_left_s)
        self.running.add(name)
        self.most_running = max(self.most_running, len(self.running))
        await self._tell()
        try:
            await self._serve(request, sink.send)
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            self.running.discard(name)
            await asyncio.shield(self._tell())

    async def model(self, name: str, bearer: str = "") -> Model:
        if name not in ("model", "polite"):
            raise ModelNotFound(f"name: {name!r} is not served here")
        return Model(name, 100)

    async def can_serve(self) -> bool:
        return self.ready

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN_S), self._changed:
            await self._changed.wait_for(holds)

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def service(serve: Serve, key: str | None = None, **settings: Any) -> AsyncIterator[tuple[Door, Any]]:
    """The door, and a stub for a client."""
    door, server = Door(serve), Server("127.0.0.1:0", 16, [SERVICE])
    servicer = KserveService(door, **settings)
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server.grpc)  # type: ignore[no-untyped-call]
    await server.start()
    try:
        async with asyncio.timeout(WITHIN_S), open_channel(server.address, access=Access(api_key=key)) as channel:
            yield door, grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
    finally:
        await server.stop(0)


def request(request_id: str = "r", prompt: str = "Once", **fields: Any) -> pb.ModelInferRequest:
    text = pb.ModelInferRequest.InferInputTensor(
        name="text_input",
        datatype="BYTES",
        shape=[1],
        contents=pb.InferTensorContents(bytes_contents=[prompt.encode()]),
    )
    return pb.ModelInferRequest(**{"model_name": "model", "id": request_id, "inputs": [text], **fields})


def texts(response: pb.ModelInferResponse) -> tuple[bytes, ...]:
    return texts_of_raw(response.raw_output_contents[0], "text_output")


async def tell(request: GenerateRequest, send: Send, *said: str) -> None:
    """A chunk for each, and the end."""
    for at, text in enumerate(said):
        await send(Chunk(request.request_id, at, (at,), text))
    usage = Usage(1, len(said))
    await send(Chunk(request.request_id, len(said), (), "", finish_reason=FinishReason.STOP, usage=usage))


async def three(request: GenerateRequest, send: Send) -> None:
    await tell(request, send, "a", "b", "c")


async def for_ever(request: GenerateRequest, send: Send) -> None:
    await send(Chunk(request.request_id, 0, (1,), "a"))
    await asyncio.Event().wait()


def failing(error: SplitserveError, others: Serve = three) -> Serve:
    """The request `bad` fails so, after its first chunk."""

    async def serve(request: GenerateRequest, send: Send) -> None:
        if not request.request_id.startswith("bad"):
            return await others(request, send)
        await send(Chunk(request.request_id, 0, (1,), "a"))
        raise error

    return serve


async def everything(call: Any) -> list[pb.ModelStreamInferResponse]:
    """What is left to read."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


# One call for one request -------------------------------------------------------------------------------------------
async def test_a_whole_answer_has_all_chunks() -> None:
    async with service(three) as (_, stub):
        answer = await stub.ModelInfer(request())
    assert texts(answer) == (b"Onceabc",)
    assert (answer.id, answer.model_name) == ("r", "model")
    assert answer.parameters["output_tokens"].int64_param == 3


async def test_the_key_and_the_time_that_is_left_come_with_the_request() -> None:
    async with service(three, key="k" * 16) as (door, stub):
        await stub.ModelInfer(request(), timeout=15)
        await stub.ModelInfer(request())
        await everything(stub.ModelStreamInfer(iter([request()]), timeout=15))
    assert door.keys == ["k" * 16] * 3
    assert [left is not None and 0 < left < 16 for left in door.times_left] == [True, False, True]


async def test_an_error_is_a_status_with_details_in_the_clients_words() -> None:
    max_tokens = {"max_tokens": pb.InferParameter(int64_param=0)}
    async with service(failing(InvalidRequest("sampling.max_tokens", "0 must be 1 or more"))) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(request("bad", parameters=max_tokens))
    error = from_rpc_error(refused.value)
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.message) == ("parameters.max_tokens", "0 must be 1 or more")


async def test_what_can_not_be_read_never_comes_to_the_door() -> None:
    async with service(three) as (door, stub):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(request(parameters={"max_new_tokens": pb.InferParameter(int64_param=1)}))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not door.keys


async def test_a_caller_who_goes_away_cancels_the_request() -> None:
    async with service(for_ever) as (door, stub):
        call = stub.ModelInfer(request())
        await door.until(lambda: bool(door.running))
        call.cancel()
        await door.until(lambda: not door.running)
    assert door.cancelled == ["r"]


async def test_ready_follows_the_door_and_live_does_not() -> None:
    async with service(three) as (door, stub):
        for ready in (True, False):
            door.ready = ready
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            assert (await stub.ServerReady(pb.ServerReadyRequest())).ready is ready
            assert (await stub.ModelReady(pb.ModelReadyRequest(name="polite"))).ready is ready


@pytest.mark.parametrize("named", [{"name": "gpt-9"}, {"name": ""}, {"name": "model", "version": "2"}])
async def test_what_is_not_served_is_not_found(named: dict[str, str]) -> None:
    async with service(three) as (_, stub):
        for call, message in (
            (stub.ModelReady, pb.ModelReadyRequest(**named)),
            (stub.ModelMetadata, pb.ModelMetadataRequest(**named)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(message)
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND


# One call for many --------------------------------------------------------------------------------------------------
async def test_each_chunk_is_a_response_and_the_last_one_is_marked() -> None:
    async with service(three) as (_, stub):
        responses = await everything(stub.ModelStreamInfer(iter([request()])))
    answers = [response.infer_response for response in responses]
    assert [texts(answer) for answer in answers] == [(b"a",), (b"b",), (b"c",), (b"",)]
    assert [answer.parameters["triton_final_response"].bool_param for answer in answers] == [False] * 3 + [True]
    assert {answer.id for answer in answers} == {"r"}


async def test_requests_are_served_at_once_while_the_client_says_more() -> None:
    """The first one ends only when the second has come."""
    both = asyncio.Event()

    async def serve(request: GenerateRequest, send: Send) -> None:
        if request.request_id.startswith("second"):
            both.set()
        await send(Chunk(request.request_id, 0, (1,), "early"))
        await both.wait()
        await tell(request, send, "late")

    async with service(serve) as (door, stub):
        call = stub.ModelStreamInfer()
        await call.write(request("first"))
        assert texts((await call.read()).infer_response) == (b"early",)
        await call.write(request("second"))
        await call.done_writing()
        rest = await everything(call)
    assert door.most_running == 2
    assert {response.infer_response.id for response in rest} == {"first", "second"}


async def test_a_client_that_says_no_more_still_gets_every_answer() -> None:
    async with service(three) as (_, stub):
        responses = await everything(stub.ModelStreamInfer(iter([request(f"r{n}") for n in range(20)])))
    ends = [
        one.infer_response.id for one in responses if one.infer_response.parameters["triton_final_response"].bool_param
    ]
    assert sorted(ends) == sorted(f"r{n}" for n in range(20))


async def test_the_end_of_a_stream_cancels_its_requests() -> None:
    async with service(for_ever) as (door, stub):
        call = stub.ModelStreamInfer()
        for name in ("one", "two"):
            await call.write(request(name))
        await door.until(lambda: len(door.running) == 2)
        call.cancel()
        await door.until(lambda: not door.running)
    assert sorted(door.cancelled) == ["one", "two"]


async def test_an_error_is_a_message_and_the_stream_goes_on() -> None:
    async with service(failing(Overloaded("full", 2.0))) as (_, stub):
        call = stub.ModelStreamInfer()
        await call.write(request("bad"))
        assert texts((await call.read()).infer_response) == (b"a",)
        failure = await call.read()
        assert failure.error_message == "[request id: bad] RESOURCE_EXHAUSTED: full"
        assert failure.infer_response.parameters["retry_after_s"].double_param == 2.0
        await call.write(request("good"))
        await call.done_writing()
        assert len(await everything(call)) == 4


async def test_an_error_is_a_status_for_a_client_that_says_so_and_ends_its_other_requests() -> None:
    async with service(failing(Overloaded("full", 2.0), others=for_ever)) as (door, stub):
        call = stub.ModelStreamInfer(metadata=STATUS_WANTED)
        await call.write(request("good"))
        await call.read()
        await call.write(request("bad"))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await everything(call)
        await door.until(lambda: not door.running)
    error = from_rpc_error(ended.value)
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 2.0
    assert door.cancelled == ["good"]


async def test_one_request_too_many_is_refused_and_the_others_go_on() -> None:
    go_on = asyncio.Event()

    async def serve(request: GenerateRequest, send: Send) -> None:
        await go_on.wait()
        await tell(request, send, "a")

    async with service(serve, most_at_once=2) as (door, stub):
        call = stub.ModelStreamInfer()
        for name in ("one", "two", "three"):
            await call.write(request(name))
        failure = await call.read()
        assert failure.error_message.startswith("[request id: three] RESOURCE_EXHAUSTED: 2 requests run on this stream")
        go_on.set()
        await door.until(lambda: not door.running)
        await call.write(request("four"))
        await call.done_writing()
        rest = await everything(call)
    assert not any(response.error_message for response in rest)
    assert {response.infer_response.id for response in rest} == {"one", "two", "four"}


async def test_a_request_that_ends_while_its_message_is_being_written_leaves_the_others_whole() -> None:
    """The client reads nothing until it has ended; then each other message comes once and in order."""
    count = 8

    async def serve(request: GenerateRequest, send: Send) -> None:
        if not request.request_id.startswith("bad"):
            return await tell(request, send, *(f"{at}{LARGE}" for at in range(count)))
        try:
            async with asyncio.timeout(0.2):
                while True:
                    await send(Chunk(request.request_id, 0, (1,), LARGE))
        except TimeoutError as error:
            raise DeadlineExceeded("deadline_s: too late") from error

    async with service(serve) as (door, stub):
        call = stub.ModelStreamInfer()
        await call.write(request("bad"))
        await door.until(lambda: "bad" in door.running)
        await door.until(lambda: "bad" not in door.running)
        await call.write(request("good"))
        await call.done_writing()
        responses = await everything(call)
    assert [one.error_message for one in responses if one.error_message] == [
        "[request id: bad] DEADLINE_EXCEEDED: deadline_s: too late"
    ]
    good = [texts(one.infer_response)[0][:1] for one in responses if one.infer_response.id == "good"]
    assert good == [*(str(at).encode() for at in range(count)), b""]


async def test_a_client_that_takes_nothing_is_ended_with_a_status() -> None:
    async def serve(request: GenerateRequest, send: Send) -> None:
        while True:
            await send(Chunk(request.request_id, 0, (1,), LARGE))

    async with service(serve, client_stall_s=0.3) as (door, stub):
        call = stub.ModelStreamInfer()
        for name in ("one", "two"):
            await call.write(request(name))
        await door.until(lambda: len(door.running) == 2)
        await door.until(lambda: not door.running)
        with pytest.raises(grpc.aio.AioRpcError, match=r"the client took nothing for 0\.3 s") as ended:
            await everything(call)
    assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_whole_answer_may_be_asked_for_on_a_stream() -> None:
    message = request()
    message.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(False)
    async with service(three) as (_, stub):
        (response,) = await everything(stub.ModelStreamInfer(iter([message])))
    assert texts(response.infer_response) == (b"Onceabc",)
    assert response.infer_response.parameters["triton_final_response"].bool_param
