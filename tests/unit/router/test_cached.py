"""Where a request goes whose beginning some worker has cached."""

from collections.abc import AsyncIterator

import pytest

from splitserve.core.cached import CacheNews, Stored
from splitserve.core.worker import Pool
from tests.unit.router.scripted import ScriptedWorker, Stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def caches(stage: Stage, worker: ScriptedWorker, prompt: tuple[int, ...], *first_keys: str) -> None:
    """All whole blocks of this prompt."""
    size = worker.info.kv.block_size
    blocks = len(prompt) // size
    extras = (first_keys, *[None] * (blocks - 1)) if first_keys else ()
    stored = Stored(tuple(range(blocks)), None, prompt[: blocks * size], size, extras)
    stage.membership.cached(worker.info.uuid, CacheNews(0, (stored,)))


async def test_a_prompt_is_read_where_its_beginning_is_cached(stage: Stage) -> None:
    _, cached, decode = (
        stage.worker(*each) for each in (("p0", Pool.PREFILL), ("p1", Pool.PREFILL), ("d0", Pool.DECODE))
    )
    prompt = tuple(range(5, 6 + 2 * decode.info.kv.block_size))
    caches(stage, cached, prompt)
    call = stage.request(prompt=prompt)
    assert (await cached.prefill_job()).prompt == prompt
    await decode.decode_job()
    call.cancel()


@pytest.mark.parametrize(("salt", "reader"), [("", "d0"), ("salt", "d1"), ("other", "d0")])
async def test_what_is_cached_for_others_is_no_reason(stage: Stage, salt: str, reader: str) -> None:
    workers = {name: stage.worker(name, Pool.DECODE) for name in ("d0", "d1")}
    prompt = tuple(range(5, 6 + 2 * workers["d1"].info.kv.block_size))
    caches(stage, workers["d1"], prompt, "salt")
    call = stage.request(prompt=prompt, cache_salt=salt)
    assert (await workers[reader].decode_job()).cache_salt == salt
    call.cancel()


async def test_a_prompt_that_is_to_have_logprobs_is_computed_wherever_there_is_room(stage: Stage) -> None:
    other, cached = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)
    prompt = tuple(range(5, 6 + 2 * other.info.kv.block_size))
    caches(stage, cached, prompt)
    call = stage.request(prompt=prompt, prompt_logprobs=1)
    await other.decode_job()
    call.cancel()
