"""One worker as a target, over real gRPC; the worker does what a test says."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from splitserve.bench.open_loop import run
from splitserve.bench.run import Ending
from splitserve.bench.targets.address import Opened, Options, opened, parse
from splitserve.core.config import RouterConfig
from splitserve.core.errors import ConfigError, JoinRefused, Unavailable
from splitserve.core.worker import Pool
from splitserve.rpc import convert
from splitserve.rpc.status import from_rpc_error
from splitserve.workload.requests import Requests
from tests.unit.bench.targets.answering import answer, answering
from tests.unit.router.wired import WiredWorker

WITHIN_S = 10.0
REQUESTS = Requests(np.zeros(3), np.array([70, 50, 40]), np.array([4, 5, 6]))
ANYWHERE = parse("worker://127.0.0.1:0")


class Bench:
    """A target that waits for its worker beside the test. `said` is what its user was told."""

    def __init__(self, **options: float) -> None:
        self.said: list[str] = []
        self.target: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self._listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._leave = asyncio.Event()
        self._options = Options(vocabulary=100, say=self._say, **options)  # type: ignore[arg-type]
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Bench":
        self._task = asyncio.create_task(self._open())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._leave.set()
        if not self.target.done():
            self._task.cancel()
        async with asyncio.timeout(WITHIN_S):
            await asyncio.wait({self._task})
        assert self._task.cancelled() or self._task.exception() is None

    async def address(self) -> str:
        async with asyncio.timeout(WITHIN_S):
            return await self._listening

    async def opened(self) -> Opened:
        async with asyncio.timeout(WITHIN_S):
            return await self.target

    def _say(self, text: str) -> None:
        self.said.append(text)
        if not self._listening.done():
            self._listening.set_result(text.rpartition("--router ")[2].rstrip("`"))

    async def _open(self) -> None:
        async with opened(ANYWHERE, self._options) as target:
            self.target.set_result(target)
            await self._leave.wait()


async def test_a_worker_that_attaches_is_asked_directly() -> None:
    async with Bench() as bench, answering(await bench.address()) as worker:
        target = await bench.opened()
        found = await run(REQUESTS, target.send(REQUESTS, seed=3))
        address = await bench.address()
    assert target.name == f"worker://{address}"
    assert target.facts == {"kind": "worker", "server": address, "model": "model", "worker": "d0", "engine": "sim"}
    assert found.count(Ending.DONE) == 3, found.errors
    assert found.tokens.tolist() == [4, 5, 6]
    assert sorted(len(job.prompt) for job in worker.jobs[1:]) == [40, 50, 70]
    assert all(job.ticket is None for job in worker.jobs)
    assert worker.orders[0].welcome.heartbeat_interval_s == RouterConfig().heartbeat_interval_s
    assert bench.said[1:] == ["d0 has attached: model on sim", "d0 has left: it ended its stream"]


async def test_requests_beyond_its_grants_wait_and_count_from_when_they_were_due() -> None:
    async with Bench() as bench, WiredWorker(await bench.address(), "d0", Pool.PREFILL) as worker:
        answer(worker, await worker.job())
        target = await bench.opened()
        worker.report(free_sequences=1)
        running = asyncio.create_task(run(REQUESTS, target.send(REQUESTS)))
        for _ in range(3):
            job = await worker.job()
            worker.report(free_sequences=0)
            answer(worker, job)  # and grants none
            worker.report(free_sequences=1)
        async with asyncio.timeout(WITHIN_S):
            found = await running
    assert found.tokens.tolist() == [4, 5, 6]
    first_s, second_s, third_s = found.timelines.ttft_s
    assert 0 < first_s < second_s < third_s


async def test_a_stream_left_early_cancels_its_job() -> None:
    async with Bench() as bench, WiredWorker(await bench.address(), "d0", Pool.DECODE) as worker:
        answer(worker, await worker.job())
        chunks = (await bench.opened()).ask([1, 2], 8)
        reading = asyncio.ensure_future(anext(chunks))
        job = await worker.job()
        worker.say(job, 1)
        async with asyncio.timeout(WITHIN_S):
            assert await reading == 1
        await chunks.aclose()
        await worker.told("cancel")
        assert worker.cancelled == [job.job_id]


async def test_a_second_worker_is_refused_and_the_first_stays() -> None:
    async with Bench() as bench, answering(await bench.address()) as first:
        target = await bench.opened()
        for _ in range(2):
            async with WiredWorker(await bench.address(), "d1", Pool.DECODE) as second:
                error = await second.ended()
            assert error is not None
            assert isinstance(from_rpc_error(error), Unavailable)
            assert "one worker is measured here, and that is d0: d1 can't attach" in str(error.details())
        found = await run(REQUESTS, target.send(REQUESTS))
        assert found.count(Ending.DONE) == 3
        assert len(first.jobs) == 4
    assert sum(said.startswith("worker refused: one worker is measured") for said in bench.said) == 1


async def test_a_worker_of_another_version_is_refused_by_field() -> None:
    async with Bench() as bench:
        version = convert.PROTOCOL_VERSION + 1
        async with WiredWorker(await bench.address(), "d0", Pool.DECODE, protocol_version=version) as misfit:
            error = await misfit.ended()
        assert error is not None
        refusal = from_rpc_error(error)
        assert isinstance(refusal, JoinRefused)
        assert refusal.field == "protocol_version"
        assert any("protocol_version" in said for said in bench.said)
        async with answering(await bench.address()):  # the seat is free
            await bench.opened()


async def test_a_worker_that_goes_away_fails_what_it_ran() -> None:
    async with Bench() as bench:
        async with WiredWorker(await bench.address(), "d0", Pool.DECODE) as worker:
            answer(worker, await worker.job())
            target = await bench.opened()
            running = asyncio.create_task(run(REQUESTS, target.send(REQUESTS)))
            await worker.job()
        async with asyncio.timeout(WITHIN_S):
            found = await running
    assert found.count(Ending.FAILED) == 3
    assert found.errors == ("Unavailable: d0 is gone: it ended its stream",)


async def test_a_worker_that_has_fallen_silent_is_given_up_and_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitserve.bench.targets.worker._SILENT_S", 0.3)
    async with Bench() as bench, WiredWorker(await bench.address(), "d0", Pool.DECODE) as worker:
        answer(worker, await worker.job())
        target = await bench.opened()
        found = asyncio.create_task(run(REQUESTS, target.send(REQUESTS)))
        error = await worker.ended()
        async with asyncio.timeout(WITHIN_S):
            assert (await found).errors == ("Unavailable: d0 is gone: it was silent for 0.3 s",)
    assert error is not None
    assert isinstance(from_rpc_error(error), Unavailable)


async def test_other_routers_of_its_worker_are_told_of() -> None:
    async with Bench() as bench:
        shared = WiredWorker(await bench.address(), "d0", Pool.DECODE)
        shared.grants = replace(shared.grants, routers=3)
        async with shared as worker:
            answer(worker, await worker.job())
            await bench.opened()
    assert any("d0 serves 2 other routers too" in said for said in bench.said)


async def test_no_worker_in_time_is_told_with_how_to_start_one() -> None:
    with pytest.raises(Unavailable, match=r"no worker has attached to 127.0.0.1:\d+ within 0.1 s; start one with"):
        async with opened(ANYWHERE, Options(vocabulary=100, attach_within_s=0.1)):
            pass


async def test_listening_where_strangers_reach_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^worker://0.0.0.0:0: listen: .* can be reached from other machines"):
        async with opened(parse("worker://0.0.0.0:0"), Options(vocabulary=100)):
            pass


async def test_an_address_that_is_taken_is_named() -> None:
    async with Bench() as bench:
        taken = await bench.address()
        with pytest.raises(ConfigError, match=f"^worker://{taken}: {taken}: can't listen here"):
            async with opened(parse(f"worker://{taken}"), Options(vocabulary=100)):
                pass
        async with answering(taken):
            await bench.opened()
