"""What routers are told of an engine's prefix cache."""

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.cached import CacheNews, Cleared, Removed, Stored
from splitserve.core.errors import Unavailable
from splitserve.core.model import ModelInfo
from splitserve.worker.cache_news import AGAIN_S, CacheReporter
from tests.unit.worker.fakes import ScriptedEngine, router_at, running

WHOLE = Stored((1, 2, 3), None, (10, 11, 20, 21, 30, 31), 2, (("s",), None, None))


class Reporter(CacheReporter):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(lambda: self.now)


def test_batches_are_counted() -> None:
    reporter = Reporter()
    assert reporter.news([WHOLE]) == CacheNews(0, (WHOLE,))
    assert reporter.news([Removed((3,)), Cleared()]) == CacheNews(1, (Removed((3,)), Cleared()))


def test_what_was_told_is_not_told_again() -> None:
    reporter = Reporter()
    reporter.news([Stored((1, 2), None, (10, 11, 20, 21), 2, (("s",), None))])
    assert reporter.news([WHOLE]) == CacheNews(1, (Stored((3,), 2, (30, 31), 2, (None,)),))
    assert reporter.news([WHOLE]) is None


def test_what_was_removed_is_told_when_it_comes_back() -> None:
    reporter = Reporter()
    reporter.news([WHOLE, Removed((2, 3))])
    assert reporter.news([WHOLE]) == CacheNews(1, (Stored((2, 3), 1, (20, 21, 30, 31), 2, (None, None)),))
    reporter.news([Cleared()])
    assert reporter.news([WHOLE]) == CacheNews(3, (WHOLE,))


def test_after_a_while_all_that_is_used_is_told_again() -> None:
    reporter = Reporter()
    reporter.news([WHOLE])
    reporter.now = 0.9 * AGAIN_S
    assert reporter.news([WHOLE]) is None
    reporter.now = AGAIN_S
    assert reporter.news([WHOLE]) == CacheNews(1, (WHOLE,))
    assert reporter.news([WHOLE]) is None


async def test_every_router_hears_of_it_and_one_that_comes_later_hears_it_again() -> None:
    engine = ScriptedEngine()
    async with router_at() as one, router_at() as other, running(engine, [one, other], ModelInfo.read(DEMO_MODEL)):
        streams = [await router.next_stream() for router in (one, other)]
        for stream in streams:
            await stream.next_load(lambda _: True)
        engine.cached([WHOLE])
        for stream in streams:
            await stream.until(lambda stream=stream: stream.cache_news == [CacheNews(0, (WHOLE,))])  # type: ignore[misc]
        streams[0].break_off(Unavailable("it is restarted"))
        back = await one.next_stream()
        await back.next_load(lambda _: True)
        engine.cached([WHOLE])
        await back.until(lambda: back.cache_news == [CacheNews(1, (WHOLE,))])
        await streams[1].until(lambda: streams[1].cache_news[1:] == [CacheNews(1, (WHOLE,))])
