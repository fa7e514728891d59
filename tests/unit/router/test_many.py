"""Many requests on one call: each as by itself, and none in another's way."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import error_details_pb2

from splitserve.client import AsyncClient, Retries
from splitserve.client.many import WINDOW
from splitserve.core.errors import InvalidRequest, Unavailable
from splitserve.core.request import Chunk, FinishReason, SamplingParams
from splitserve.core.worker import Outcome, Pool
from splitserve.router.serve import Router
from splitserve.rpc import convert
from splitserve.rpc.channel import open_channel
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from tests.unit.router.scripted import WITHIN_S
from tests.unit.router.wired import WiredWorker, router

FOUR = SamplingParams(max_tokens=4, temperature=0.0)
DONE = Outcome(FinishReason.STOP)


@pytest.fixture
async def serving() -> AsyncIterator[Router]:
    async with router() as started:
        yield started


@pytest.fixture
async def worker(serving: Router) -> AsyncIterator[WiredWorker]:
    async with WiredWorker(serving.address, "d0", Pool.DECODE) as attached:
        yield attached


@pytest.fixture
async def client(serving: Router) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(serving.address, Retries(most=0)) as client:
        yield client


class Call:
    """A call made by hand."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._call = inference_pb2_grpc.InferenceStub(self._channel).GenerateMany()  # type: ignore[no-untyped-call]

    async def start(self, number: int, window: int = 9, **fields: object) -> None:
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[5, 6]), sampling=convert.sampling_to_proto(FOUR)
        )
        request.MergeFrom(inference_pb2.GenerateRequest(**fields))  # type: ignore[arg-type]
        start = inference_pb2.ManyStart(request=request, window=window)
        await self._call.write(inference_pb2.ManyRequest(number=number, start=start))

    async def say(self, number: int, **kind: object) -> None:
        await self._call.write(inference_pb2.ManyRequest(number=number, **kind))  # type: ignore[arg-type]

    async def events(self, count: int) -> list[inference_pb2.ManyEvent]:
        heard: list[inference_pb2.ManyEvent] = []
        async with asyncio.timeout(WITHIN_S):
            while len(heard) < count:
                heard.extend((await self._call.read()).events)
        return heard

    async def ends(self) -> None:
        await self._call.done_writing()
        async with asyncio.timeout(WITHIN_S):
            assert await self._call.read() is grpc.aio.EOF

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


@pytest.fixture
async def call(serving: Router) -> AsyncIterator[Call]:
    call = Call(serving.address)
    yield call
    await call.close()


async def collect(client: AsyncClient, request_id: str) -> list[Chunk]:
    return [chunk async for chunk in client.generate([5, 6], FOUR, request_id=request_id)]


async def test_each_request_gets_its_own_tokens_and_end(client: AsyncClient, worker: WiredWorker) -> None:
    names = [f"r{number}" for number in range(5)]
    answers = {name: asyncio.create_task(collect(client, name)) for name in names}
    for job in [await worker.job() for _ in names]:
        worker.say(job, int(job.request_id[1:]), outcome=DONE)
    for name, answer in answers.items():
        async with asyncio.timeout(WITHIN_S):
            chunks = await answer
        assert [token for chunk in chunks for token in chunk.token_ids] == [int(name[1:])]
        assert {chunk.request_id for chunk in chunks} == {name}
        assert chunks[-1].usage is not None


async def test_what_came_for_all_at_once_is_one_message(call: Call, worker: WiredWorker) -> None:
    for number in (1, 2, 3):
        await call.start(number)
    worker.say_all([await worker.job() for _ in range(3)], 7)
    async with asyncio.timeout(WITHIN_S):
        message = await call._call.read()
    assert sorted(event.number for event in message.events) == [1, 2, 3]


async def test_an_error_is_a_status_with_details_and_ends_one_request_alone(call: Call, worker: WiredWorker) -> None:
    await call.start(1)
    job = await worker.job()
    await call.start(2, sampling=inference_pb2.SamplingParams(top_p=7.0))
    (refused,) = await call.events(1)
    assert (refused.number, refused.end) == (2, True)
    assert refused.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert any(detail.Is(error_details_pb2.BadRequest.DESCRIPTOR) for detail in refused.error.details)
    worker.say(job, 7, outcome=DONE)
    served = await call.events(1)
    assert {event.number for event in served} == {1}


async def test_the_clients_error_is_the_routers_own(client: AsyncClient, worker: WiredWorker) -> None:
    with pytest.raises(InvalidRequest, match=r"^sampling\.top_p"):
        await anext(client.generate("x", SamplingParams(top_p=7.0)))


async def test_a_request_that_is_cancelled_leaves_its_worker_and_the_others_stay(
    client: AsyncClient, worker: WiredWorker
) -> None:
    staying = asyncio.create_task(collect(client, "stays"))
    stays = await worker.job()
    leaving = client.generate([5, 6], FOUR, request_id="goes")
    first = asyncio.create_task(anext(leaving))
    goes = await worker.job()
    worker.say(goes, 8)
    await first
    await leaving.aclose()
    await worker.until(lambda: goes.job_id in worker.cancelled)
    worker.say(stays, 7, outcome=DONE)
    async with asyncio.timeout(WITHIN_S):
        await staying


async def test_a_reader_that_stops_holds_up_itself_alone(call: Call, worker: WiredWorker) -> None:
    await call.start(1, window=1)
    slow = await worker.job()
    await call.start(2)
    quick = await worker.job()
    for index in range(3):
        worker.say(slow, 10 + index, index=index)
        await asyncio.sleep(0.01)
    worker.say(quick, 7, outcome=DONE)
    heard = await call.events(2)
    while not any(event.end for event in heard):
        heard += await call.events(1)
    assert [tuple(event.response.token_ids) for event in heard if event.number == 1] == [(10,)]
    await call.say(1, more=2)
    assert [tuple(event.response.token_ids) for event in await call.events(2)] == [(11,), (12,)]


async def test_a_number_in_use_is_refused(call: Call, worker: WiredWorker) -> None:
    await call.start(1)
    await worker.job()
    await call.start(1)
    (refused,) = await call.events(1)
    assert refused.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_a_call_whose_caller_is_done_ends_after_its_requests(call: Call, worker: WiredWorker) -> None:
    await call.start(1)
    worker.say(await worker.job(), 7, outcome=DONE)
    await call.events(1)
    await call.ends()


async def test_a_call_that_breaks_takes_its_requests_along(call: Call, worker: WiredWorker) -> None:
    await call.start(1)
    job = await worker.job()
    await call.close()
    await worker.until(lambda: job.job_id in worker.cancelled)


async def test_more_responses_than_a_window_come_through(client: AsyncClient, worker: WiredWorker) -> None:
    tokens = WINDOW + 20
    sampling = SamplingParams(max_tokens=200, temperature=0.0)
    chunks: list[Chunk] = []

    async def read() -> None:
        async for chunk in client.generate([5], sampling):
            chunks.append(chunk)

    reading = asyncio.create_task(read())
    job = await worker.job()
    for index in range(tokens):
        worker.say(job, index, index=index, outcome=DONE if index == tokens - 1 else None)
    async with asyncio.timeout(WITHIN_S):
        await reading
    assert [token for chunk in chunks for token in chunk.token_ids] == list(range(tokens))


async def test_a_router_that_goes_is_unavailable_to_every_request(client: AsyncClient) -> None:
    serving = router()
    await serving.start()
    async with (
        AsyncClient(serving.address, Retries(most=0)) as client,
        WiredWorker(serving.address, "d0", Pool.DECODE) as worker,
    ):
        answers = [asyncio.create_task(collect(client, f"r{number}")) for number in range(2)]
        for _ in answers:
            await worker.job()
        await serving.stop()
        for answer in answers:
            with pytest.raises(Unavailable):
                async with asyncio.timeout(WITHIN_S):
                    await answer


async def test_a_router_that_came_back_is_called_anew() -> None:
    first = router()
    await first.start()
    async with AsyncClient(first.address, Retries(most=20, first_pause_s=0.01)) as client:
        with pytest.raises(Unavailable, match="no worker"):
            await anext(AsyncClient(first.address, Retries(most=0)).generate([5], FOUR))
        await first.stop()
        second = router(listen=first.address)
        await second.start()
        async with WiredWorker(second.address, "d0", Pool.DECODE) as worker:
            answer = asyncio.create_task(collect(client, "r"))
            worker.say(await worker.job(), 7, outcome=DONE)
            async with asyncio.timeout(WITHIN_S):
                assert len(await answer) >= 1
        await second.stop()
