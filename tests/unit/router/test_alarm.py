"""One timer for a time that moves on."""

import asyncio
import time
from math import inf

from splitserve.router.alarm import Alarm

WITHIN_S = 5.0


class Bell:
    def __init__(self) -> None:
        self.due = inf
        self.rung = asyncio.Event()

    def alarm(self, patience_s: float) -> Alarm:
        return Alarm(lambda: self.due, self.rung.set, patience_s)


async def test_it_rings_when_the_time_has_passed() -> None:
    bell = Bell()
    bell.due = time.monotonic() + 0.01
    with bell.alarm(10.0):
        async with asyncio.timeout(WITHIN_S):
            await bell.rung.wait()
    assert time.monotonic() >= bell.due


async def test_a_time_that_moves_on_takes_the_ring_along() -> None:
    bell = Bell()
    bell.due = time.monotonic() + 0.02
    with bell.alarm(10.0):
        bell.due = moved = time.monotonic() + 0.06
        async with asyncio.timeout(WITHIN_S):
            await bell.rung.wait()
    assert time.monotonic() >= moved


async def test_a_time_that_was_not_known_is_found_within_the_patience() -> None:
    bell = Bell()
    with bell.alarm(0.01):
        bell.due = time.monotonic()
        async with asyncio.timeout(WITHIN_S):
            await bell.rung.wait()


async def test_it_rings_again_while_nobody_heeds_it() -> None:
    bell = Bell()
    bell.due = 0.0
    with bell.alarm(0.02):
        for _ in range(3):
            async with asyncio.timeout(WITHIN_S):
                await bell.rung.wait()
            bell.rung.clear()


async def test_left_it_rings_no_more() -> None:
    bell = Bell()
    bell.due = time.monotonic() + 0.01
    with bell.alarm(0.01):
        pass
    bell.rung.clear()
    await asyncio.sleep(0.05)
    assert not bell.rung.is_set()
