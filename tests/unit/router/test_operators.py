"""What an operator meets who moves requests and drains workers, over a real port."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from splitserve.client import AsyncClient, Drained, Retries
from splitserve.core.errors import DeadlineExceeded, InvalidRequest, SplitserveError, Unavailable, UnknownWorker
from splitserve.core.request import Chunk, FinishReason, SamplingParams
from splitserve.core.worker import DecodeJob, Failure, KvMode, Outcome, Pool
from tests.unit.router.scripted import WITHIN_S
from tests.unit.router.wired import WiredWorker, router

PROMPT = list(range(5, 45))
STOPPED = Outcome(FinishReason.STOP)
HANDED_OVER = Outcome(failure=Failure.MIGRATED, message="handed over")


@dataclass
class Site:
    """A router with the workers d0 and d1, and request "r" that decodes on d0."""

    client: AsyncClient
    source: WiredWorker
    target: WiredWorker
    registry: CollectorRegistry

    async def begin(self, **sampling: object) -> None:
        self.call = asyncio.create_task(self._collect(SamplingParams(max_tokens=4, **sampling)))  # type: ignore[arg-type]
        self.job = await self.source.job()

    async def decode(self) -> None:
        """The first token is out."""
        self.source.say(self.job, 10)
        async with asyncio.timeout(WITHIN_S):
            await self._first.wait()

    async def hand_over(self) -> DecodeJob:
        """Both workers do as they are told; the request is then the target's."""
        copy = await self.target.job()
        self.target.say(copy, 99, outcome=Outcome(FinishReason.LENGTH))
        await self.source.until(lambda: [order.at_end for order in self.source.hand_overs] == [False, True])
        self.source.say(self.job, 11, index=1, outcome=HANDED_OVER)
        return await self.target.job()

    async def finish(self, worker: WiredWorker, job: DecodeJob, index: int) -> Chunk:
        """The rest comes from this worker; the client then has every token once."""
        worker.say(job, *range(10 + index, 14), index=index, outcome=STOPPED)
        async with asyncio.timeout(WITHIN_S):
            chunks = await self.call
        assert [token for chunk in chunks for token in chunk.token_ids] == [10, 11, 12, 13]
        return chunks[-1]

    async def refused(self, kind: type[SplitserveError], says: str, request_id: str = "r", worker: str = "") -> None:
        with pytest.raises(kind, match=says):
            await self.client.migrate(request_id, worker)

    async def _collect(self, sampling: SamplingParams) -> list[Chunk]:
        self._first = asyncio.Event()
        chunks: list[Chunk] = []
        async for chunk in self.client.generate(PROMPT, sampling, request_id="r"):
            chunks.append(chunk)
            self._first.set()
        return chunks


@pytest.fixture
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """Parametrised indirectly with what is different about the workers."""
    changes: dict[str, Any] = getattr(request, "param", {})
    registry = CollectorRegistry()
    async with AsyncExitStack() as stack:
        serving = await stack.enter_async_context(router(registry))
        client = await stack.enter_async_context(AsyncClient(serving.address, Retries(most=0)))
        source, target = [
            await stack.enter_async_context(WiredWorker(serving.address, name, Pool.DECODE, **changes))
            for name in ("d0", "d1")
        ]
        for worker in (source, target):
            await worker.told("peers")
        yield Site(client, source, target, registry)


# One request --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("worker", ["", "d1", "uuid-d1"])
async def test_a_request_is_moved_by_name_and_its_stream_goes_on(site: Site, worker: str) -> None:
    await site.begin()
    await site.decode()
    migration = asyncio.create_task(site.client.migrate("r", worker))
    job = await site.hand_over()
    site.target.say(job, 12, index=2)
    moved = await migration
    assert (moved.from_worker, moved.to_worker) == ("d0", "d1")
    assert moved.stall_s > 0
    last = await site.finish(site.target, job, 3)
    assert last.timings is not None
    assert (last.timings.decode_worker, last.timings.attempts) == ("d1", 1)
    assert site.registry.get_sample_value("splitserve_migrations_total", {"outcome": "moved"}) == 1
    assert site.registry.get_sample_value("splitserve_migration_stall_seconds_count") == 1
    assert site.registry.get_sample_value("splitserve_resumed_requests_total") == 0


async def test_what_is_not_there_is_named(site: Site) -> None:
    await site.refused(InvalidRequest, "request_id: no request 'r' runs")
    await site.begin()
    await site.decode()
    await site.refused(UnknownWorker, r"'d9'.*d0, d1", worker="d9")
    await site.finish(site.source, site.job, 1)
    await site.refused(InvalidRequest, "request_id: no request 'r' runs")


async def test_a_request_that_can_not_move_now_goes_on_where_it_is(site: Site) -> None:
    await site.begin()
    await site.refused(Unavailable, "r has not moved: it has not begun to decode")
    await site.decode()
    await site.refused(Unavailable, "on worker d0 already", worker="d0")
    site.target.report(free_sequences=0)
    await _until_full(site.client)
    await site.refused(Unavailable, "no other worker can take over 41 tokens of KV now")
    await site.refused(Unavailable, "worker d1 can't take over 41 tokens of KV now", worker="d1")
    assert not site.source.hand_overs
    assert site.registry.get_sample_value("splitserve_migrations_total", {"outcome": "refused"}) == 4
    await site.finish(site.source, site.job, 1)


@pytest.mark.parametrize("site", [{"mode": KvMode.PULL}], indirect=True)
async def test_pulled_kv_is_not_moved(site: Site) -> None:
    await site.begin()
    await site.decode()
    await site.refused(Unavailable, r"kv_transfer\.mode is pull")
    await site.finish(site.source, site.job, 1)


@pytest.mark.parametrize("site", [{"restores": ("seed",)}], indirect=True)
async def test_a_sampler_state_that_would_be_lost_is_named(site: Site) -> None:
    await site.begin(temperature=0.0, presence_penalty=0.5)
    await site.decode()
    await site.refused(Unavailable, r"sampling\.presence_penalty: the other worker's engine can't take up")
    await site.finish(site.source, site.job, 1)


async def test_whoever_waits_too_short_hears_that_it_may_still_move(site: Site) -> None:
    await site.begin()
    await site.decode()
    with pytest.raises(DeadlineExceeded, match="may still"):
        await site.client.migrate("r", timeout_s=0.05)
    await site.finish(site.target, await site.hand_over(), 2)
    with pytest.raises(InvalidRequest, match="timeout_s"):
        await site.client.migrate("r", timeout_s=0.0)


# All of a worker's --------------------------------------------------------------------------------------------------
async def test_a_drained_workers_requests_move_and_are_counted(site: Site) -> None:
    await site.begin()
    await site.decode()
    drained = asyncio.create_task(site.client.drain("d0"))
    await site.source.told("drain")
    await site.finish(site.target, await site.hand_over(), 2)
    assert not drained.done()
    await site.source.__aexit__()
    async with asyncio.timeout(WITHIN_S):
        assert await drained == Drained(finished_requests=0, migrated_requests=1)


async def test_without_another_worker_a_drained_workers_requests_are_finished(site: Site) -> None:
    await site.target.__aexit__()
    await site.begin()
    await site.decode()
    drained = asyncio.create_task(site.client.drain("d0"))
    await site.source.told("drain")
    await site.refused(Unavailable, "no other worker")
    await site.finish(site.source, site.job, 1)
    await site.source.__aexit__()
    async with asyncio.timeout(WITHIN_S):
        assert await drained == Drained(finished_requests=1, migrated_requests=0)


async def test_a_worker_that_drains_of_its_own_accord_is_helped(site: Site) -> None:
    """It had a SIGTERM: its load says so."""
    await site.begin()
    await site.decode()
    site.source.report(draining=True)
    await site.finish(site.target, await site.hand_over(), 2)
    assert site.registry.get_sample_value("splitserve_migrations_total", {"outcome": "moved"}) == 1


async def _until_full(client: AsyncClient) -> None:
    """Until d1's report has come."""
    async with asyncio.timeout(WITHIN_S):
        while (await client.fleet()).workers[1].load.free_sequences:
            continue
