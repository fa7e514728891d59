"""A node that follows: when it begins, and how it ends. The channel is real, its ranks are not."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from splitserve.core.config import NodesSettings
from splitserve.core.errors import EngineError
from splitserve.engine.nodes.follower import FollowerEnd
from splitserve.engine.nodes.leader import LeaderEnd
from splitserve.worker.follower import Follower

WAIT_S = 30.0


class Ranks:
    """They run until they are stopped, or `fail` for a reason. The first `deaf` stops find nothing to stop."""

    def __init__(self, deaf: int = 0) -> None:
        self.uuid = ""
        self.stops = 0
        self._deaf = deaf
        self._ended = threading.Event()
        self._reason = "stopped"

    def run(self, uuid: str, end: FollowerEnd, on_started: Callable[[], None]) -> str:
        self.uuid = uuid
        on_started()
        assert self._ended.wait(WAIT_S)
        return self._reason

    def stop(self) -> None:
        self.stops += 1
        if self.stops > self._deaf:
            self._ended.set()

    def fail(self, reason: str) -> None:
        self._reason = reason
        self._ended.set()


@pytest.fixture
def settings() -> NodesSettings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return NodesSettings(count=2, leader="127.0.0.1", port=probe.getsockname()[1], wait_s=WAIT_S)


@pytest.fixture
def leader(settings: NodesSettings) -> Iterator[LeaderEnd]:
    with LeaderEnd(settings, "uuid", {}, None) as end:
        yield end


@pytest.fixture
def end(settings: NodesSettings) -> Iterator[FollowerEnd]:
    with FollowerEnd(settings.model_copy(update={"rank": 1}), "h", {}, None) as made:
        yield made


async def started(follower: Follower) -> "asyncio.Task[int]":
    ready = asyncio.Event()
    running = asyncio.create_task(follower.run(ready.set))
    await asyncio.wait_for(ready.wait(), WAIT_S)
    return running


async def test_it_holds_ranks_of_its_leaders_worker_and_ends_with_it(leader: LeaderEnd, end: FollowerEnd) -> None:
    ranks = Ranks(deaf=1)
    follower = Follower(end, ranks)
    assert "the leader is to be at" in follower.unready()
    running = await started(follower)
    assert (ranks.uuid, follower.unready()) == ("uuid", "")
    leader.close()
    assert await asyncio.wait_for(running, WAIT_S) == 0
    assert ranks.stops == 2


async def test_it_fails_with_its_leader(leader: LeaderEnd, end: FollowerEnd) -> None:
    running = await started(Follower(end, Ranks()))
    leader.close("its engine broke")
    with pytest.raises(EngineError, match="nodes: the worker ends: its engine broke"):
        await asyncio.wait_for(running, WAIT_S)


async def test_its_ranks_end_is_the_workers(leader: LeaderEnd, end: FollowerEnd) -> None:
    ranks = Ranks()
    running = await started(Follower(end, ranks))
    ranks.fail("vLLM could not start: RuntimeError: no device")
    lost = await asyncio.to_thread(leader.lost_within, WAIT_S)
    assert "node 1 (h): vLLM could not start: RuntimeError: no device" in lost
    leader.close()
    with pytest.raises(EngineError, match="no device; a worker's nodes end together"):
        await asyncio.wait_for(running, WAIT_S)


async def test_told_to_end_it_asks_its_leader_to_drain_and_ends_with_it(leader: LeaderEnd, end: FollowerEnd) -> None:
    asked = threading.Event()
    leader.on_leaving(asked.set)
    running = await started(Follower(end, Ranks()))
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.to_thread(asked.wait, WAIT_S)
    assert not running.done()
    leader.close()
    assert await asyncio.wait_for(running, WAIT_S) == 0


async def test_told_to_end_before_the_beginning_it_ends(end: FollowerEnd) -> None:
    """There is no leader."""
    ranks = Ranks()
    running = asyncio.create_task(Follower(end, ranks).run(lambda: None))
    await asyncio.sleep(0)  # it listens for signals from its first step on
    os.kill(os.getpid(), signal.SIGTERM)
    assert await asyncio.wait_for(running, WAIT_S) == 0
    assert ranks.uuid == ""
