"""Moves the decodes of this router off workers that drain, a few at a time, so that a drain need not wait for them.

One task of the router. What can't move is finished where it is; what only can't move now is asked again.
"""

import asyncio
import time
from collections.abc import Callable, Iterable

from splitserve.router.move import Move, MoveRefused
from splitserve.router.running import Running, Traveller
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import RouterMetrics

LOOK_S = 0.1
AGAIN_S = 0.5  # after a refusal that may pass
AT_ONCE = 4  # moves under way; their targets must not be flooded

Draining = Callable[[], Iterable[str]]  # uuids of workers that drain


class Evacuation:
    def __init__(self, running: Running, draining: Draining, metrics: RouterMetrics) -> None:
        self._running = running
        self._draining = draining
        self._metrics = metrics
        self._logger = Logger("router")
        self._not_before: dict[str, float] = {}  # by request id: when to ask again

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            moving: dict[str, asyncio.Task[None]] = {}
            while True:
                moving = {name: task for name, task in moving.items() if not task.done()}
                for name, traveller in self._due():
                    if name not in moving and len(moving) < AT_ONCE:
                        moving[name] = tasks.create_task(self._move(name, traveller))
                await asyncio.sleep(LOOK_S)

    def _due(self) -> list[tuple[str, Traveller]]:
        now = time.monotonic()
        there = {name: each for worker in self._draining() for name, each in self._running.decoding_at(worker).items()}
        self._not_before = {name: at for name, at in self._not_before.items() if name in there}
        return [(name, each) for name, each in there.items() if self._not_before.get(name, 0.0) <= now]

    async def _move(self, name: str, traveller: Traveller) -> None:
        move = Move()
        traveller.move(move)
        try:
            moved = await move.result()
        except MoveRefused as refusal:
            self._metrics.move_refused()
            self._not_before[name] = time.monotonic() + AGAIN_S
            self._logger.info("request not moved", request_id=name, reason=str(refusal))
            return
        self._metrics.moved(moved.stall_s)
        self._logger.info(
            "request moved", request_id=name, source=moved.from_worker, target=moved.to_worker, stall_s=moved.stall_s
        )
