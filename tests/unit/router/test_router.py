"""What clients and operators of a router meet, over a real port."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from splitserve.client import AsyncClient, Drained, Retries
from splitserve.core.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    Limit,
    Overloaded,
    Unavailable,
    UnknownWorker,
)
from splitserve.core.fleet import Health
from splitserve.core.request import Chunk, FinishReason, SamplingParams, Usage
from splitserve.core.worker import Outcome, Pool
from splitserve.router.serve import Router, serve_until_signal
from splitserve.rpc.channel import open_channel
from tests.unit.router.scripted import WITHIN_S
from tests.unit.router.wired import WiredWorker, router

FOUR = SamplingParams(max_tokens=4)
STOPPED = Outcome(FinishReason.STOP)
NO_RETRIES = Retries(most=0)


@pytest.fixture
async def serving() -> AsyncIterator[Router]:
    async with router() as started:
        yield started


@pytest.fixture
async def client(serving: Router) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(serving.address, NO_RETRIES) as opened:
        yield opened


@pytest.fixture
async def worker(serving: Router) -> AsyncIterator[WiredWorker]:
    async with WiredWorker(serving.address, "d0", Pool.DECODE) as attached:
        await attached.told("peers")
        yield attached


async def collect(client: AsyncClient, **options: object) -> list[Chunk]:
    return [chunk async for chunk in client.generate([5, 6], FOUR, **options)]  # type: ignore[arg-type]


async def health_is(router: Router, status: int, service: str = "") -> None:
    """Waits for it."""
    async with open_channel(router.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        async with asyncio.timeout(WITHIN_S):
            while (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status != status:
                continue


# Clients ------------------------------------------------------------------------------------------------------------
async def test_a_request_is_answered_with_every_token_and_how_it_went(client: AsyncClient, worker: WiredWorker) -> None:
    answer = asyncio.create_task(collect(client, request_id="mine"))
    job = await worker.job()
    worker.say(job, 10, 11)
    worker.say(job, 12, index=2, outcome=STOPPED)
    chunks = await answer
    assert [token for chunk in chunks for token in chunk.token_ids] == [10, 11, 12]
    assert "".join(chunk.text for chunk in chunks) == "<10><11><12>"
    assert {chunk.request_id for chunk in chunks} == {"mine"}
    assert (chunks[-1].finish_reason, chunks[-1].usage) == (FinishReason.STOP, Usage(2, 3))
    assert chunks[-1].timings is not None
    assert chunks[-1].timings.decode_worker == "d0"


async def test_a_prompt_in_words_is_tokenised_by_the_router(client: AsyncClient, worker: WiredWorker) -> None:
    answer = asyncio.create_task(_last(client, "Once upon a time"))
    job = await worker.job()
    assert job.prompt[0] == 0
    worker.say(job, 10, outcome=STOPPED)
    assert (await answer).usage == Usage(len(job.prompt), 1)


async def test_a_bad_request_is_refused_and_disturbs_nothing_else(client: AsyncClient, worker: WiredWorker) -> None:
    answer = asyncio.create_task(collect(client))
    job = await worker.job()
    with pytest.raises(InvalidRequest) as raised:
        await _last(client, "x", SamplingParams(top_p=float("nan")))
    assert raised.value.field == "sampling.top_p"
    worker.say(job, 10, outcome=STOPPED)
    assert len(await answer) > 0


async def test_a_request_id_in_use_is_refused(client: AsyncClient, worker: WiredWorker) -> None:
    answer = asyncio.create_task(collect(client, request_id="mine"))
    job = await worker.job()
    with pytest.raises(InvalidRequest) as raised:
        await collect(client, request_id="mine")
    assert raised.value.field == "request_id"
    worker.say(job, 10, outcome=STOPPED)
    await answer


async def test_without_workers_a_request_is_refused_at_once(client: AsyncClient) -> None:
    with pytest.raises(Unavailable, match="no worker has joined"):
        await collect(client)


async def test_too_many_waiting_requests_are_told_when_to_come_back() -> None:
    async with (
        router(max_waiting_requests=1) as serving,
        AsyncClient(serving.address) as client,
        WiredWorker(serving.address, "d0", Pool.DECODE) as worker,
    ):
        worker.report(free_sequences=0)
        await _until_full(client)
        first = asyncio.create_task(collect(client))
        await _until_waiting(client, 1)
        with pytest.raises(Overloaded) as raised:
            await collect(client)
        assert raised.value.retry_after_s > 0
        assert raised.value.limit is Limit.QUEUE
        worker.report(free_sequences=1)
        worker.say(await worker.job(), 10, outcome=STOPPED)
        await first


async def test_more_requests_at_once_than_the_router_takes_are_told_which_limit_that_is() -> None:
    async with (
        router(limits={"streams": 1}) as serving,
        AsyncClient(serving.address) as client,
        WiredWorker(serving.address, "d0", Pool.DECODE) as worker,
    ):
        first = asyncio.create_task(collect(client))
        job = await worker.job()
        with pytest.raises(Overloaded, match="1 requests run or wait here") as raised:
            await collect(client)
        assert raised.value.limit is Limit.STREAMS
        worker.say(job, 10, outcome=STOPPED)
        await first


async def test_a_client_that_hangs_up_cancels_its_job(client: AsyncClient, worker: WiredWorker) -> None:
    stream = client.generate([5, 6], FOUR)
    first = asyncio.create_task(anext(stream))
    job = await worker.job()
    worker.say(job, 10)
    await first
    await stream.aclose()
    await worker.until(lambda: job.job_id in worker.cancelled)


async def test_requests_are_counted_by_how_they_ended() -> None:
    registry = CollectorRegistry()
    async with router(registry) as serving, AsyncClient(serving.address, NO_RETRIES) as client:
        with pytest.raises(Unavailable):
            await collect(client)
        async with WiredWorker(serving.address, "d0", Pool.DECODE) as worker:
            await worker.told("peers")
            answer = asyncio.create_task(collect(client))
            worker.say(await worker.job(), 10, 11, outcome=STOPPED)
            await answer
            async with asyncio.timeout(WITHIN_S):
                while not registry.get_sample_value("splitserve_workers", {"pool": "decode", "health": "ready"}):
                    await client.fleet()
    assert registry.get_sample_value("splitserve_requests_total", {"code": "OK"}) == 1
    assert registry.get_sample_value("splitserve_requests_total", {"code": "UNAVAILABLE"}) == 1
    assert registry.get_sample_value("splitserve_output_tokens_total") == 2
    assert registry.get_sample_value("splitserve_running_requests") == 0
    assert registry.get_sample_value("splitserve_ttft_seconds_count", {"slo_class": "standard"}) == 1


# Health and shutdown ------------------------------------------------------------------------------------------------
async def test_health_says_whether_a_worker_can_serve(serving: Router) -> None:
    await health_is(serving, health_pb2.HealthCheckResponse.NOT_SERVING)
    async with WiredWorker(serving.address, "d0", Pool.DECODE):
        await health_is(serving, health_pb2.HealthCheckResponse.SERVING)
    await health_is(serving, health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_health_is_told_for_each_pool(serving: Router) -> None:
    up, down = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with WiredWorker(serving.address, "d0", Pool.DECODE):
        await health_is(serving, up, "decode")
        await health_is(serving, down, "prefill")
    await health_is(serving, down, "decode")


async def test_a_port_in_use_names_the_address(serving: Router) -> None:
    second = router(listen=serving.address)
    with pytest.raises(ConfigError) as raised:
        await second.start()
    assert raised.value.path == serving.address
    await second.stop()


async def test_a_draining_router_finishes_what_runs_and_refuses_what_comes(
    serving: Router, client: AsyncClient, worker: WiredWorker
) -> None:
    answer = asyncio.create_task(collect(client))
    job = await worker.job()
    draining = asyncio.create_task(serving.drain())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="draining"):
        await collect(client)
    assert not draining.done()
    worker.say(job, 10, outcome=STOPPED)
    await answer
    async with asyncio.timeout(WITHIN_S):
        await draining


async def test_a_stopped_router_ends_its_requests_by_name(serving: Router, client: AsyncClient) -> None:
    async with WiredWorker(serving.address, "d0", Pool.DECODE) as worker:
        answer = asyncio.create_task(collect(client))
        await worker.job()
        await serving.stop()
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(Unavailable):
                await answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_drains_and_the_second_ends(
    serving: Router, client: AsyncClient, worker: WiredWorker, number: int
) -> None:
    await health_is(serving, health_pb2.HealthCheckResponse.SERVING)
    serve = asyncio.create_task(serve_until_signal(serving))
    answer = asyncio.create_task(collect(client))
    await worker.job()
    os.kill(os.getpid(), number)
    await health_is(serving, health_pb2.HealthCheckResponse.NOT_SERVING)
    assert not serve.done()
    os.kill(os.getpid(), number)
    async with asyncio.timeout(WITHIN_S):
        await serve
        with pytest.raises(Unavailable):
            await answer


async def test_a_worker_that_falls_silent_while_the_router_drains_is_given_up() -> None:
    async with (
        router(heartbeat_timeout_s=0.3) as serving,
        AsyncClient(serving.address, NO_RETRIES) as client,
        WiredWorker(serving.address, "d0", Pool.DECODE) as silent,
    ):
        serve = asyncio.create_task(serve_until_signal(serving))
        answer = asyncio.create_task(collect(client))
        await silent.job()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(Unavailable, match="silent"):
                await answer
            await serve


# Operators ----------------------------------------------------------------------------------------------------------
async def test_an_operator_sees_who_serves_and_what_each_holds(client: AsyncClient, worker: WiredWorker) -> None:
    answer = asyncio.create_task(collect(client))
    job = await worker.job()
    fleet = await client.fleet()
    (status,) = fleet.workers
    assert (fleet.model, fleet.running_requests, fleet.waiting_requests) == ("model", 1, 0)
    assert (status.worker, status.pool, status.health) == (worker.info, Pool.DECODE, Health.READY)
    assert (status.prefills, status.decodes) == (0, 1)
    worker.say(job, 10, outcome=STOPPED)
    await answer


async def test_a_worker_changes_its_pool_while_it_runs(client: AsyncClient, worker: WiredWorker) -> None:
    status = await client.set_pool("d0", Pool.PREFILL)
    assert status.pool is Pool.PREFILL
    assert (await worker.told("set_pool")).set_pool.pool == 1


async def test_draining_a_worker_waits_until_it_has_left(serving: Router, client: AsyncClient) -> None:
    async with WiredWorker(serving.address, "d0", Pool.DECODE) as leaving:
        answer = asyncio.create_task(collect(client))
        job = await leaving.job()
        drained = asyncio.create_task(client.drain("d0"))
        await leaving.told("drain")
        assert (await client.fleet()).workers[0].health is Health.DRAINING
        with pytest.raises(Unavailable):
            await collect(client)
        leaving.say(job, 10, outcome=STOPPED)
        await answer
        assert not drained.done()
    assert await drained == Drained(finished_requests=1, migrated_requests=0)


async def test_a_drain_that_takes_too_long_says_that_it_goes_on(client: AsyncClient, worker: WiredWorker) -> None:
    with pytest.raises(DeadlineExceeded, match="goes on draining"):
        await client.drain(worker.info.uuid, timeout_s=0.05)


async def test_an_unknown_worker_is_named_along_with_the_known(client: AsyncClient, worker: WiredWorker) -> None:
    with pytest.raises(UnknownWorker, match=r"'d9'.*d0"):
        await client.drain("d9")
    with pytest.raises(UnknownWorker, match="'d9'"):
        await client.set_pool("d9", Pool.DECODE)


async def _last(client: AsyncClient, prompt: str, sampling: SamplingParams = FOUR) -> Chunk:
    return [chunk async for chunk in client.generate(prompt, sampling)][-1]


async def _until_waiting(client: AsyncClient, count: int) -> None:
    async with asyncio.timeout(WITHIN_S):
        while (await client.fleet()).waiting_requests != count:
            continue


async def _until_full(client: AsyncClient) -> None:
    """Until the worker's report has come."""
    async with asyncio.timeout(WITHIN_S):
        while (await client.fleet()).workers[0].load.free_sequences:
            continue
