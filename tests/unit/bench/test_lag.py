"""A generator whose event loop stands still says that its run is invalid."""

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
import pytest
import uvloop

from splitserve.bench.lag import LoopLag, now_of
from splitserve.bench.open_loop import run
from splitserve.bench.run import Run
from splitserve.workload.requests import Requests
from tests.unit.bench.test_open_loop import requests, stand_still
from tests.unit.bench.virtual import VirtualLoop, run_virtually


def one(tokens: int) -> Requests:
    return requests([0.0], output_tokens=tokens)


class Stalling:
    """One token each 20 ms; at every so manieth token the reader computes for `stall_s`."""

    def __init__(self, stall_s: float, every: int) -> None:
        self.stall_s, self.every = stall_s, every

    async def send(self, index: int) -> AsyncGenerator[int, None]:
        for token in range(500):
            await asyncio.sleep(0.02)
            if token % self.every == 0:
                stand_still(self.stall_s)
            yield 1


def test_a_run_whose_loop_stalls_while_it_reads_is_invalid_though_all_was_sent_in_time() -> None:
    found = run_virtually(run(one(500), Stalling(0.05, every=50).send))
    assert found.share_late == 0.0
    assert found.lag_p99_s > found.late_s
    assert found.overloaded
    assert found.overload.startswith("tokens were read up to ")


def test_a_run_whose_loop_is_in_time_is_valid() -> None:
    found = run_virtually(run(one(500), Stalling(0.0005, every=1).send))
    assert found.lag_p99_s < found.late_s
    assert not found.overloaded
    assert found.overload == ""


def test_a_rare_stall_does_not_make_a_run_invalid() -> None:
    assert not run_virtually(run(one(500), Stalling(0.05, every=500).send)).overloaded


def test_of_a_stall_each_moment_in_it_counts_with_what_was_left() -> None:
    async def stalled() -> float:
        with LoopLag(asyncio.get_running_loop()) as lag:
            await asyncio.sleep(0.1)
            stand_still(0.9)
            await asyncio.sleep(0.0)
        return lag.p99_s

    waits_s = [*np.zeros(10), *np.arange(0.0, 0.9, 0.01)]
    assert run_virtually(stalled()) == pytest.approx(np.quantile(waits_s, 0.99), abs=0.011)


def test_it_leaves_no_timer_behind() -> None:
    async def timers() -> list[bool]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        with LoopLag(loop) as lag:
            await asyncio.sleep(0.05)
            timer = lag._timer
        return [timer.cancelled()]

    assert run_virtually(timers()) == [True]


def test_a_uvloop_is_timed_by_a_clock_of_less_than_milliseconds() -> None:
    async def read() -> list[float]:
        now = now_of(asyncio.get_running_loop())
        return [now() for _ in range(100)]

    assert any(abs(time_s * 1e3 - round(time_s * 1e3)) > 1e-3 for time_s in uvloop.run(read()))


def test_no_request_is_sent_early_on_a_uvloop() -> None:
    async def at_once(index: int) -> AsyncGenerator[int, None]:
        yield 1

    async def sent() -> Run:
        return await run(requests([0.0013 * number for number in range(20)], 1), at_once)

    assert uvloop.run(sent()).lateness_s.min() > -0.0002


def test_the_cpu_that_a_run_took_is_the_senders() -> None:
    async def computing(index: int) -> AsyncGenerator[int, None]:
        sum(range(200_000))
        yield 1

    assert run_virtually(run(one(1), computing)).cpu_s > 0.0
