"""What an operator sees of requests and workers: where each is, by which workers, and for whose key."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from splitserve.client import AsyncClient
from splitserve.core.errors import PermissionDenied, Unauthenticated
from splitserve.core.fleet import FleetStatus, LinkStatus, Phase, RunningRequest, RunningRequests
from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.worker import Failure, Outcome, Pool, TransferStats
from splitserve.router.access import AccessControl
from splitserve.router.keys import KeyRing
from splitserve.router.oversight import MOST_REQUESTS, USUAL_REQUESTS, Oversight, listed
from splitserve.router.running import Running
from tests.unit.router.scripted import WITHIN_S, Stage
from tests.unit.router.wired import WiredWorker, router

READ = Outcome(FinishReason.LENGTH, transfer=TransferStats(bytes=4096, bytes_before_prefill_ended=3072))
STOPPED = Outcome(FinishReason.STOP)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    made = Stage()
    yield made
    made.close()


def status(stage: Stage) -> RunningRequest:
    assert stage.journey is not None
    return stage.journey.status()


async def phase_is(stage: Stage, phase: Phase) -> RunningRequest:
    """Waits for it."""
    async with asyncio.timeout(WITHIN_S):
        while status(stage).phase is not phase:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)
    return status(stage)


# One request ---------------------------------------------------------------------------------------------------------
async def test_without_a_worker_that_takes_it_a_request_waits(stage: Stage) -> None:
    worker = stage.worker("d0", Pool.DECODE)
    worker.report(free_sequences=0)
    call = stage.request()
    async with asyncio.timeout(WITHIN_S):
        while not len(stage.waiting):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)
    waiting = status(stage)
    assert (waiting.request_id, waiting.phase, waiting.prompt_tokens) == ("r", Phase.WAITING, 4)
    assert (waiting.prefill_worker, waiting.decode_worker) == ("", "")
    call.cancel()
    await asyncio.wait([call])


async def test_a_request_is_read_handed_over_and_decoded(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request(slo_class="interactive")
    decoding, reading = await decode.decode_job(), await prefill.prefill_job()
    read = status(stage)
    assert (read.phase, read.prefill_worker, read.decode_worker) == (Phase.PREFILL, "p0", "d0")
    assert (read.slo_class, read.prompt_tokens, read.output_tokens) == ("interactive", 4, 0)
    prefill.say(reading, outcome=READ)
    await phase_is(stage, Phase.TRANSFER)
    decode.say(decoding, 10, 11)
    assert (await phase_is(stage, Phase.DECODE)).output_tokens == 2
    decode.say(decoding, 12, 13, index=2, outcome=STOPPED)
    await call


async def test_a_decode_worker_that_reads_the_prompt_is_the_whole_route(stage: Stage) -> None:
    worker = stage.worker("d0", Pool.DECODE)
    call = stage.request()
    job = await worker.decode_job()
    read = status(stage)
    assert (read.phase, read.prefill_worker, read.decode_worker) == (Phase.PREFILL, "", "d0")
    worker.say(job, 10, 11, 12, 13, outcome=STOPPED)
    await call


# All of them ---------------------------------------------------------------------------------------------------------
class Passenger:
    decode_worker = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def move(self, move: object) -> None:
        raise AssertionError("nobody asks for it")

    def explain(self) -> object:
        raise AssertionError("nobody asks for it")

    def status(self) -> RunningRequest:
        return RunningRequest(self.name, "standard", Phase.WAITING, 1, 0, 0.0, "", "")


def names(told: RunningRequests) -> list[str]:
    return [each.request_id for each in told.requests]


def test_the_newest_are_told_of_first_and_all_are_counted() -> None:
    running = Running()
    with running.admitted("a"), running.admitted("b"), running.admitted("c"):
        for name, choice in (("a", 0), ("a", 1), ("b", 0), ("c", 0)):
            traveller = Passenger(f"{name}#{choice}" if choice else name)
            running.travels(name, choice, traveller)  # type: ignore[arg-type]
        assert (names(running.newest(10)), running.newest(10).total) == (["c", "b", "a", "a#1"], 4)
        assert (names(running.newest(2)), running.newest(2).total) == (["c", "b"], 4)
    assert running.newest(10) == RunningRequests()


def test_how_many_are_told_of_is_bounded() -> None:
    assert [listed(most) for most in (0, 1, 10**6)] == [USUAL_REQUESTS, 1, MOST_REQUESTS]


@pytest.mark.parametrize(("key", "error"), [("", Unauthenticated), ("no", Unauthenticated), ("chat", PermissionDenied)])
async def test_only_an_operators_key_may_look(key: str, error: type[Exception]) -> None:
    said = {"keys": [{"name": "chat", "key": "chat" * 8}, {"name": "ops", "key": "ops" * 8, "scopes": ["admin"]}]}
    oversight = Oversight(
        lambda: FleetStatus("demo", (), 0, 0, "router"), Running(), AccessControl(KeyRing.of(said, "keys.yaml"))
    )
    with pytest.raises(error):
        await oversight.fleet(key * 8)
    with pytest.raises(error):
        await oversight.requests(10, key * 8)
    assert (await oversight.fleet("ops" * 8)).model == "demo"
    assert await oversight.requests(10, "ops" * 8) == RunningRequests()


# Over the wire -------------------------------------------------------------------------------------------------------
async def test_an_operators_client_lists_requests_and_sees_what_moved() -> None:
    async with (
        router() as serving,
        AsyncClient(serving.address) as client,
        WiredWorker(serving.address, "p0", Pool.PREFILL) as prefill,
        WiredWorker(serving.address, "d0", Pool.DECODE) as decode,
    ):
        await asyncio.gather(prefill.told("peers"), decode.told("peers"))
        stream = client.generate((5, 6, 7, 8), SamplingParams(max_tokens=2), request_id="r")
        first = asyncio.create_task(anext(stream))
        job = await decode.job()
        await prefill.until(lambda: bool(prefill.jobs))
        prefill.say(prefill.jobs[0], outcome=READ)
        decode.say(job, 10)
        await first
        told = await client.requests(5)
        (request,) = told.requests
        assert told.total == 1
        assert (request.request_id, request.phase, request.output_tokens) == ("r", Phase.DECODE, 1)
        assert (request.prefill_worker, request.decode_worker) == ("p0", "d0")
        decode.say(job, 11, index=1, outcome=STOPPED)
        assert [chunk.finish_reason async for chunk in stream][-1] is FinishReason.STOP
        fleet = await client.fleet()
        assert fleet.links == (LinkStatus("p0", "d0", 1, 0, 4096, 3072),)
        (standard,) = [each for each in fleet.classes if each.name == "standard"]
        assert (standard.last_minute.ended, standard.last_minute.met) == (1, 1)
        assert standard.last_minute.ttft.p50_s == standard.last_minute.ttft.p99_s > 0
        assert await client.requests() == RunningRequests()


async def test_a_transfer_that_fails_is_the_links(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request()
    job, _ = await decode.decode_job(), await prefill.prefill_job()
    journey = stage.journey
    assert journey is not None
    transfers = journey._around.transfers
    decode.say(job, outcome=Outcome(failure=Failure.TRANSFER, message="it did not come"))
    async with asyncio.timeout(WITHIN_S):
        while not transfers.status():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)
    assert transfers.status() == (LinkStatus("p0", "d0", 0, 1, 0, 0),)
    call.cancel()
    await asyncio.wait([call])
