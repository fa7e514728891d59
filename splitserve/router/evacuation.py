"""Moves the decodes of this router off workers that drain, a few at a time, so that a drain need not wait for them.

One task of the router. What can't move now is asked again, in its turn, until it has moved or is finished where it is.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf

from splitserve.router.move import Move, MoveRefused
from splitserve.router.running import Running, Traveller
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import RouterMetrics

LOOK_S = 0.1
AGAIN_S = 0.5  # after a refusal
AT_ONCE = 4  # moves under way; their targets must not be flooded
WITHIN_S = 30.0  # then the next one's turn comes: a client that does not read, say, holds up its own move alone

Draining = Callable[[], Iterable[str]]  # uuids of workers that drain


@dataclass(frozen=True, slots=True)
class _Refused:
    reason: str
    asked_at: float


class Evacuation:
    def __init__(self, running: Running, draining: Draining, metrics: RouterMetrics) -> None:
        self._running = running
        self._draining = draining
        self._metrics = metrics
        self._logger = Logger("router")
        self._refused: dict[str, _Refused] = {}  # by request id

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
        """Those never asked come first: many that can't move must not keep the others waiting."""
        now = time.monotonic()
        there = {name: each for worker in self._draining() for name, each in self._running.decoding_at(worker).items()}
        self._refused = {name: refused for name, refused in self._refused.items() if name in there}
        asked = {name: refused.asked_at for name, refused in self._refused.items()}
        due = [name for name in there if asked.get(name, -inf) <= now - AGAIN_S]
        return [(name, there[name]) for name in sorted(due, key=lambda name: asked.get(name, -inf))]

    async def _move(self, name: str, traveller: Traveller) -> None:
        move = Move()
        traveller.move(move)
        try:
            async with asyncio.timeout(WITHIN_S):
                moved = await move.result()
        except (MoveRefused, TimeoutError) as error:
            self._note(name, str(error) or f"it has not moved within {WITHIN_S:g} s; it may still")
            return
        self._metrics.moved(moved.stall_s)
        self._logger.info(
            "request moved", request_id=name, source=moved.from_worker, target=moved.to_worker, stall_s=moved.stall_s
        )

    def _note(self, name: str, reason: str) -> None:
        """Said once, however often it is asked again."""
        before = self._refused.get(name)
        self._refused[name] = _Refused(reason, time.monotonic())
        if before is None or before.reason != reason:
            self._metrics.move_refused()
            self._logger.info("request not moved", request_id=name, reason=reason)
