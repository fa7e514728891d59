"""Most tokens go from the worker's message to the client's sink in one call, and wake no task."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from splitserve.core.config import RouterConfig
from splitserve.core.request import Chunk
from splitserve.core.worker import DecodeJob, Pool
from tests.unit.router.scripted import WITHIN_S, ScriptedWorker, Stage, holds

AT_ONCE = RouterConfig(chunk_gap_s=0.0)
NEVER_S = 1e6


class Recorded:
    """A sink. `ready`: whether it takes chunks without waiting."""

    def __init__(self) -> None:
        self.put_chunks: list[Chunk] = []
        self.sent_chunks: list[Chunk] = []
        self.ready = True

    def put(self, chunk: Chunk) -> bool:
        if self.ready:
            self.put_chunks.append(chunk)
        return self.ready

    async def send(self, chunk: Chunk) -> None:
        self.sent_chunks.append(chunk)
        self.ready = True

    @property
    def tokens(self) -> list[int]:
        chunks = sorted([*self.put_chunks, *self.sent_chunks], key=lambda chunk: (chunk.index, len(chunk.token_ids)))
        return [token for chunk in chunks for token in chunk.token_ids]


class Streaming:
    """A request that has its first token, on a worker."""

    def __init__(self, config: RouterConfig) -> None:
        self.stage = Stage(config)
        self.sink = self.stage.sink = Recorded()
        self.worker: ScriptedWorker = self.stage.worker("d0", Pool.DECODE)

    async def begin(self) -> "Streaming":
        self.call = self.stage.request(max_tokens=50)
        self.job: DecodeJob = await self.worker.decode_job()
        self.worker.say(self.job, 10)
        await holds(lambda: bool(self.sink.sent_chunks))
        await asyncio.sleep(0)  # until the request's task waits again
        return self

    async def close(self) -> None:
        self.call.cancel()
        await asyncio.wait({self.call})
        self.stage.close()

    async def end(self, *token_ids: int, index: int) -> Chunk:
        self.worker.finish(self.job, *token_ids, index=index, stop=True)
        async with asyncio.timeout(WITHIN_S):
            return await self.call


@pytest.fixture
async def streaming() -> AsyncIterator[Streaming]:
    streaming = await Streaming(AT_ONCE).begin()
    yield streaming
    await streaming.close()


async def test_a_token_in_mid_stream_is_put_before_any_task_runs(streaming: Streaming) -> None:
    streaming.worker.say(streaming.job, 11, index=1)
    assert [chunk.token_ids for chunk in streaming.sink.put_chunks] == [(11,)]


async def test_the_first_and_the_last_are_sent(streaming: Streaming) -> None:
    streaming.worker.say(streaming.job, 11, index=1)
    last = await streaming.end(12, index=2)
    assert [chunk.token_ids for chunk in streaming.sink.sent_chunks] == [(10,), (12,)]
    assert last.finish_reason is not None
    assert streaming.sink.tokens == [10, 11, 12]


async def test_what_a_sink_does_not_take_at_once_is_sent_and_nothing_twice(streaming: Streaming) -> None:
    streaming.sink.ready = False
    streaming.worker.say(streaming.job, 11, index=1)
    streaming.worker.say(streaming.job, 12, index=2)
    assert streaming.sink.put_chunks == []
    await holds(lambda: len(streaming.sink.sent_chunks) == 2)
    assert streaming.sink.sent_chunks[-1].token_ids == (11, 12)
    await streaming.end(13, index=3)
    assert streaming.sink.tokens == [10, 11, 12, 13]


async def test_what_is_repeated_is_not_put_again(streaming: Streaming) -> None:
    streaming.worker.say(streaming.job, 11, index=1)
    streaming.worker.say(streaming.job, 11, index=1)
    await streaming.end(12, index=2)
    assert streaming.sink.tokens == [10, 11, 12]


async def test_a_gap_on_the_short_way_is_found_too(streaming: Streaming) -> None:
    streaming.worker.say(streaming.job, 15, index=5)
    assert streaming.sink.put_chunks == []
    again = await streaming.worker.decode_job()  # the worker is not trusted with it, but it is the only one
    assert again.output == (10,)


async def test_tokens_close_to_the_last_message_gather_and_go_out_together() -> None:
    streaming = await Streaming(RouterConfig(chunk_gap_s=0.02)).begin()
    for index in range(1, 6):
        streaming.worker.say(streaming.job, 10 + index, index=index)
    assert streaming.sink.put_chunks == []
    await holds(lambda: bool(streaming.sink.put_chunks))
    assert [chunk.token_ids for chunk in streaming.sink.put_chunks] == [(11, 12, 13, 14, 15)]
    await streaming.close()


async def test_the_end_does_not_wait_for_the_gap_and_takes_along_what_has_gathered() -> None:
    streaming = await Streaming(RouterConfig(chunk_gap_s=NEVER_S)).begin()
    streaming.worker.say(streaming.job, 11, index=1)
    last = await streaming.end(12, index=2)
    assert last.token_ids == (11, 12)
    assert streaming.sink.put_chunks == []
    await streaming.close()


async def test_a_lost_worker_does_not_wait_for_the_gap_either() -> None:
    streaming = await Streaming(RouterConfig(chunk_gap_s=NEVER_S)).begin()
    spare = streaming.stage.worker("d1", Pool.DECODE)
    streaming.worker.say(streaming.job, 11, index=1)
    streaming.worker.die()
    resumed = await spare.decode_job()
    assert resumed.output == (10, 11)
    assert streaming.sink.tokens == [10, 11]
    await streaming.close()
