"""What a request held is free once it has ended: a router collects garbage rarely, and prompts are long."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Iterator

import pytest

from splitserve.core.worker import Pool
from splitserve.router.attempt import Attempt
from splitserve.router.journey import Journey
from tests.unit.router.scripted import Stage

Held = list["weakref.ref[Journey] | weakref.ref[Attempt]"]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture
def nothing_collected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def held_by(stage: Stage) -> Held:
    """The latest request's journey and attempt, which nobody else holds from now on."""
    journey, stage.journey = stage.journey, None
    assert journey is not None
    assert journey._attempt is not None
    return [weakref.ref(journey), weakref.ref(journey._attempt)]


async def left(held: Held) -> list[object]:
    """What is not free once callbacks that were due have run."""
    for _ in range(3):
        await asyncio.sleep(0)
    return [each() for each in held if each() is not None]


@pytest.mark.usefixtures("nothing_collected")
async def test_of_a_request_that_has_ended_nothing_is_left(stage: Stage) -> None:
    prefill, decode = stage.pair()
    call = stage.request()
    job = await decode.decode_job()
    prefill.sent_kv(await prefill.prefill_job())
    decode.say(job, 10)
    held = held_by(stage)
    decode.finish(job, 11, index=1, stop=True)
    await call
    del call, job
    assert await left(held) == []


@pytest.mark.usefixtures("nothing_collected")
async def test_of_a_request_whose_client_hung_up_nothing_is_left(stage: Stage) -> None:
    decode = stage.worker("d0", Pool.DECODE)
    call = stage.request()
    await decode.decode_job()
    held = held_by(stage)
    call.cancel()
    await asyncio.wait({call})
    del call
    assert await left(held) == []


@pytest.mark.usefixtures("nothing_collected")
async def test_of_a_request_that_was_resumed_nothing_is_left(stage: Stage) -> None:
    lost, other = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    call = stage.request()
    lost.say(await lost.decode_job(), 10)
    await stage.seen(1)
    assert stage.journey is not None
    first = weakref.ref(stage.journey._attempt)
    lost.die()
    job = await other.decode_job()
    held: Held = [*held_by(stage), first]  # type: ignore[list-item]
    other.finish(job, 11, index=1, stop=True)
    await call
    del call, job
    assert await left(held) == []
