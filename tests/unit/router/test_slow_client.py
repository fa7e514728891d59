"""A client that reads slowly costs no worker anything, and no memory; one that does not read at all is ended."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from splitserve.core.config import RequestLimits, RouterConfig
from splitserve.core.errors import Limit, Overloaded
from splitserve.core.request import Chunk
from splitserve.core.worker import DecodeJob, Pool
from tests.unit.router.scripted import WITHIN_S, ScriptedWorker, Stage

KEPT = 8  # tokens
CONFIG = RouterConfig(limits=RequestLimits(client_buffer_tokens=KEPT), chunk_gap_s=0.0)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage(CONFIG)
    yield stage
    stage.close()


async def ending(call: "asyncio.Task[Chunk]") -> Chunk:
    async with asyncio.timeout(WITHIN_S):
        return await call


async def stuck(stage: Stage, decode: ScriptedWorker, tokens: int) -> "tuple[asyncio.Task[Chunk], DecodeJob]":
    """The client has one token, takes no second one, and so many more have come."""
    call = stage.request(max_tokens=100)
    job = await decode.decode_job()
    decode.say(job, 0)
    await stage.seen(1)
    stage.writable.clear()
    for index in range(1, tokens + 1):
        decode.say(job, index, index=index)
        await asyncio.sleep(0)
    return call, job


async def test_what_fits_the_buffer_goes_out_when_the_client_reads_on(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call, job = await stuck(stage, decode, KEPT)
    assert decode.cancelled == []
    stage.writable.set()
    decode.finish(job, KEPT + 1, index=KEPT + 1, stop=True)
    await ending(call)
    assert stage.token_ids == list(range(KEPT + 2))


async def test_beyond_the_buffer_the_request_is_stopped_and_resumed_when_the_client_reads_on(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call, job = await stuck(stage, decode, KEPT + 5)
    await decode.cancelled_job(job)
    decode.obey()
    assert stage.promised() == 0
    stage.writable.set()
    again = await decode.decode_job()
    assert list(again.output) == stage.token_ids == list(range(len(again.output)))
    decode.finish(again, 99, index=len(again.output), stop=True)
    last = await ending(call)
    assert stage.token_ids == [*range(len(again.output)), 99]
    assert last.timings is not None


async def test_stopping_for_a_slow_client_counts_against_no_worker_and_no_attempt() -> None:
    stage = Stage(CONFIG.model_copy(update={"max_attempts": 1}))
    decode = stage.worker("d0", Pool.DECODE)
    call, _ = await stuck(stage, decode, KEPT + 5)
    stage.writable.set()
    again = await decode.decode_job()
    decode.finish(again, 99, index=len(again.output), stop=True)
    await ending(call)
    stage.close()


async def test_a_prefill_that_the_client_does_not_wait_for_is_stopped_too(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request(max_tokens=100)
    job, reading = await decode.decode_job(), await prefill.prefill_job()
    stage.writable.clear()
    for index in range(KEPT + 5):
        decode.say(job, index, index=index)
        await asyncio.sleep(0)
    await prefill.cancelled_job(reading)
    call.cancel()


async def test_a_client_that_takes_nothing_is_ended_with_the_reason() -> None:
    stage = Stage(RouterConfig(limits=RequestLimits(client_stall_s=0.05)))
    decode = stage.worker("d0", Pool.DECODE)
    call, job = await stuck(stage, decode, 2)
    with pytest.raises(Overloaded, match=r"took nothing for 0\.05 s") as ended:
        await ending(call)
    assert ended.value.limit is Limit.SLOW_CLIENT
    await decode.cancelled_job(job)
    stage.close()
