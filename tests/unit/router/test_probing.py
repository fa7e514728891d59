"""A worker that is there and serves nobody is found, left alone, and taken back."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from splitserve.core.fleet import Health
from splitserve.core.worker import Failure, Pool
from splitserve.router.probing import Probing
from tests.unit.router.scripted import WITHIN_S, ScriptedWorker, Stage, holds

AT_ONCE_S = -1.0  # every worker has been idle for longer
NEVER_S = 1e9


class Probed:
    """A stage whose workers are probed."""

    def __init__(self) -> None:
        self.stage = Stage()
        self._probing: asyncio.Task[None] | None = None

    def begin(self, after_s: float, within_s: float) -> None:
        stage = self.stage
        clock = asyncio.get_running_loop().time
        probing = Probing(stage.membership, after_s, within_s, stage.metrics, clock)
        self._probing = asyncio.create_task(probing.run())

    def health(self, worker: ScriptedWorker) -> Health:
        return next(each.health for each in self.stage.membership.statuses() if each.worker.uuid == worker.info.uuid)

    async def until(self, worker: ScriptedWorker, health: Health) -> None:
        await holds(lambda: self.health(worker) is health)

    def count(self, answer: str) -> float:
        return self.stage.registry.get_sample_value("splitserve_worker_probes_total", {"answer": answer}) or 0.0

    async def end(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})
        self.stage.close()


@pytest.fixture
async def probed() -> AsyncIterator[Probed]:
    probed = Probed()
    yield probed
    await probed.end()


async def test_an_idle_worker_is_asked_for_one_token_and_stays_if_it_makes_it(probed: Probed) -> None:
    worker = probed.stage.worker("d0", Pool.DECODE)
    probed.begin(AT_ONCE_S, WITHIN_S)
    job = await worker.decode_job()
    assert (len(job.prompt), job.sampling.max_tokens, job.ticket) == (1, 1, None)
    worker.finish(job, 5)
    await holds(lambda: probed.count("token") > 0)
    assert probed.health(worker) is Health.READY
    assert probed.stage.promised() == 0


async def test_a_worker_that_makes_none_gets_no_requests_until_it_does(probed: Probed) -> None:
    worker = probed.stage.worker("d0", Pool.DECODE)
    probed.begin(AT_ONCE_S, 0.05)
    unanswered = await worker.decode_job()
    await probed.until(worker, Health.FAILING)
    assert not probed.stage.membership.can_serve
    await worker.cancelled_job(unanswered)
    worker.obey()
    again = await worker.decode_job()
    worker.finish(again, 5)
    await probed.until(worker, Health.READY)


async def test_a_worker_that_answers_with_an_error_is_failing(probed: Probed) -> None:
    worker = probed.stage.worker("p0", Pool.PREFILL)
    probed.begin(AT_ONCE_S, WITHIN_S)
    worker.fail(await worker.decode_job(), Failure.ENGINE)
    await probed.until(worker, Health.FAILING)


async def test_a_worker_too_full_to_answer_is_left_as_it_is(probed: Probed) -> None:
    worker = probed.stage.worker("d0", Pool.DECODE)
    probed.begin(AT_ONCE_S, WITHIN_S)
    worker.fail(await worker.decode_job(), Failure.NOT_NOW)
    await asyncio.sleep(0)
    assert probed.health(worker) is Health.READY
    assert (probed.count("token"), probed.count("none")) == (0, 0)


async def test_a_worker_that_failed_a_request_is_asked_at_once(probed: Probed) -> None:
    worker = probed.stage.worker("d0", Pool.DECODE)
    spare = probed.stage.worker("d1", Pool.DECODE)
    probed.begin(NEVER_S, WITHIN_S)
    probed.stage.request()
    worker.fail(await worker.decode_job(), Failure.ENGINE)
    probe = await worker.decode_job()
    assert probe.request_id.startswith("probe/")
    worker.fail(probe, Failure.ENGINE)
    await probed.until(worker, Health.FAILING)
    assert (await spare.decode_job()).request_id == "r"


async def test_a_busy_worker_is_not_asked(probed: Probed) -> None:
    worker = probed.stage.worker("d0", Pool.DECODE)
    probed.begin(NEVER_S, WITHIN_S)
    await asyncio.sleep(0.05)
    assert worker.idle


async def test_a_request_is_refused_by_name_when_every_worker_fails(probed: Probed) -> None:
    worker = probed.stage.worker("d0", Pool.DECODE)
    probed.begin(AT_ONCE_S, 0.05)
    await probed.until(worker, Health.FAILING)
    call = probed.stage.request()
    async with asyncio.timeout(WITHIN_S):
        with pytest.raises(Exception, match="failing"):
            await call
