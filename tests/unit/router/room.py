"""Requests that wait in a fleet whose workers grant what a test says, on a clock that the test moves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from splitserve.core.worker import Load, WorkerInfo
from splitserve.router.waiting import Ask, Binding, WaitingRequests
from splitserve.routing.fleet import Fleet
from splitserve.routing.route import Need
from tests.unit.router.scripted import WITHIN_S, load_of


class Room:
    """`bound`: who got in, in order."""

    def __init__(self, limit: int = 100) -> None:
        self.now = 0.0
        self.fleet = Fleet(silent_after_s=1e9)
        self.waiting = WaitingRequests(self.fleet, limit, lambda: self.now)
        self.bound: list[str] = []
        self.tasks: list[asyncio.Task[Binding]] = []
        self._leave = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def open(cls, limit: int = 100) -> AsyncIterator["Room"]:
        room = cls(limit)
        try:
            yield room
        finally:
            for task in room.tasks:
                task.cancel()
            await asyncio.gather(*room.tasks, return_exceptions=True)

    def grant(self, info: WorkerInfo, **changes: object) -> None:
        if info.uuid not in self.fleet:
            self.fleet.join(info, self.now)
        load: Load = load_of(info, **changes)
        self.fleet.report(info.uuid, load, self.now)
        self.waiting.pump()

    async def ask(self, name: str, priority: int = 0, arrived_at: float = 0.0, **others: object) -> None:
        ask = Ask(Need(40), name, priority, arrived_at)
        self.tasks.append(asyncio.create_task(self._hold(replace(ask, **others))))  # type: ignore[arg-type]
        await asyncio.sleep(0)

    async def moves_on(self, info: WorkerInfo, gap_s: float, requests: int) -> None:
        """So many are bound to this worker one after the other, each with another one behind it; then nobody waits, and
        it takes none."""
        self.grant(info, free_sequences=0)
        await self.ask("first")
        for number in range(requests):
            await self.ask(f"behind {number}")
            self.now += gap_s
            self.grant(info, free_sequences=1)
            await settled()
            self.grant(info, free_sequences=0)
            await self.leave()
        self.tasks[-1].cancel()
        await settled()
        assert len(self.waiting) == 0
        assert len(self.bound) == requests

    async def ended(self, place: int = -1) -> Binding:
        async with asyncio.timeout(WITHIN_S):
            return await self.tasks[place]

    async def leave(self) -> None:
        """Everybody who is bound goes."""
        self._leave.set()
        self._leave = asyncio.Event()
        await settled()

    async def _hold(self, ask: Ask) -> Binding:
        async with self.waiting.bound(ask) as binding:
            self.bound.append(ask.job_prefix)
            await self._leave.wait()
            return binding


async def settled() -> None:
    """Lets every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)
