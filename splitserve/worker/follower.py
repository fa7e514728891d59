"""One process of a worker that spans machines, on any node but the first: it joins its leader and holds ranks.

It joins no router. Ends: with the worker, 0 if that was meant to end, else EngineError with the reason. SIGTERM before
the worker has begun: 0. Afterwards it asks the leader to drain, and ends with it; a second SIGTERM: 143, at once.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Protocol

from splitserve.core.errors import EngineError
from splitserve.engine.nodes.channel import VERDICT_S
from splitserve.engine.nodes.follower import FollowerEnd
from splitserve.engine.nodes.messages import Over
from splitserve.telemetry.logs import Logger
from splitserve.worker.serve import DRAINED, KILLED

STOP_AGAIN_S = 0.5
ANSWER_S = 5.0

OnStarted = Callable[[], None]


class Ranks(Protocol):
    """A node's part of an engine. Both methods are called on threads that may wait."""

    def run(self, uuid: str, end: FollowerEnd, on_started: OnStarted) -> str:
        """Until they end, for the reason that is returned."""

    def stop(self) -> None: ...


class Follower:
    def __init__(self, end: FollowerEnd, ranks: Ranks) -> None:
        self._end = end
        self._ranks = ranks
        self._logger = Logger("worker")
        self._joined = False
        self._started = False
        self._told_to_end = False

    async def run(self, on_ready: OnStarted) -> int:
        """Until the worker ends. Raises ConfigError if the leader refuses this node, EngineError if it does not come,
        or the worker ends otherwise than by draining."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

        def on_started() -> None:
            self._started = True
            loop.call_soon_threadsafe(on_ready)

        uuid = await asyncio.to_thread(self._end.join)
        if not uuid:
            return DRAINED
        self._joined = True
        self._logger.info("all nodes have joined; the ranks start", worker=uuid)
        ranks = asyncio.create_task(asyncio.to_thread(self._ranks.run, uuid, self._end, on_started))
        over = asyncio.create_task(asyncio.to_thread(self._end.over_within, None))
        try:
            await asyncio.wait((ranks, over), return_when=asyncio.FIRST_COMPLETED)
            if not over.done():  # perhaps because the leader is gone, which is heard of a moment later
                await asyncio.wait((over,), timeout=VERDICT_S)
            if over.done():
                return await self._end_with(ranks, over.result())
            return await self._tell_of(ranks.result(), over)
        finally:
            await asyncio.to_thread(self._end.close)

    def unready(self) -> str:
        """Why this node is of no use now."""
        return self._end.waits or ("" if self._started else "its ranks are loading")

    async def _end_with(self, ranks: "asyncio.Task[str]", over: Over | None) -> int:
        while not ranks.done():  # those that were not there yet, too
            await asyncio.to_thread(self._ranks.stop)
            await asyncio.wait((ranks,), timeout=STOP_AGAIN_S)
        if over is not None and over.failed:
            raise EngineError(f"nodes: {over.reason}")
        return DRAINED

    async def _tell_of(self, reason: str, over: "asyncio.Task[Over | None]") -> int:
        self._end.broke(reason)
        await asyncio.to_thread(self._ranks.stop)
        await asyncio.wait((over,), timeout=ANSWER_S)  # that the leader has heard it
        raise EngineError(f"nodes: {reason}; a worker's nodes end together")

    def _on_signal(self) -> None:
        if self._told_to_end:
            os._exit(KILLED)
        self._told_to_end = True
        if self._joined:
            self._logger.info("told to end; the leader is asked to drain")
            self._end.leave()
        else:
            self._end.close()
