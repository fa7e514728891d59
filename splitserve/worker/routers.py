"""The routers that a worker belongs to: a link to every address that its routers' names stand for.

Names are looked up again every so often, and soon after a router was lost. A new address is joined; one that is gone
from DNS is left once its stream has ended, and not before: a router that serves stays, whatever a resolver says. Which
addresses a name has is `rpc/names`' to say, one router's stream is `link.py`.

Everything runs on the worker's event loop.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from splitserve.core.errors import Unavailable
from splitserve.rpc.names import LOOK_AGAIN_S, LOOK_SOON_S, Names, Place, Resolve, resolved
from splitserve.telemetry.logs import Logger
from splitserve.worker.link import RouterLink


class Routers:
    """`links` is by router, as logs call it: its name, and the address that this stands for. `run` lasts until
    `leave`."""

    def __init__(
        self, names: Iterable[str], link: Callable[[Place], RouterLink], resolve: Resolve | None = None
    ) -> None:
        self._names = Names(names)
        self._link = link
        self._resolve = resolve or resolved
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving = asyncio.Event()
        self._lost = {name: asyncio.Event() for name in self._names.to_look_up}
        self._complaints: dict[str, str] = {}
        self._logger = Logger("worker")
        self.links: dict[str, RouterLink] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self._group:
            self._update()
            follow = [self._group.create_task(self._follow(name)) for name in self._names.to_look_up]
            await self._leaving.wait()
            for task in follow:
                task.cancel()
            for link in self.links.values():
                link.leave()

    def leave(self) -> None:
        """Joins nobody any more; every link sends what is left and ends."""
        self._leaving.set()

    def look_again(self) -> None:
        """A router was lost: names may stand for others by now."""
        for event in self._lost.values():
            event.set()

    @property
    def refusals(self) -> dict[str, str]:
        """Why routers don't want this worker, by router."""
        return {router: link.refusal for router, link in tuple(self.links.items()) if link.refusal}

    @property
    def all_refuse(self) -> bool:
        """Whether there is nobody left to wait for: a name without an address may yet stand for somebody."""
        return not self._names.unknown and len(self.refusals) == len(self.links)

    async def look(self, name: str) -> None:
        """Asks what the name stands for now; joins and leaves."""
        try:
            self._names.heard(name, await self._resolve(name))
            self._complaints.pop(name, None)
        except Unavailable as error:
            self._complain(name, str(error))
        if not self._leaving.is_set():
            self._update()

    async def _follow(self, name: str) -> None:
        while True:
            looked_at = time.monotonic()
            await self.look(name)
            again_s = LOOK_SOON_S if name in self._names.unknown else LOOK_AGAIN_S
            with suppress(TimeoutError):
                async with asyncio.timeout(again_s * random.uniform(0.75, 1.25)):
                    await self._lost[name].wait()
            self._lost[name].clear()
            await asyncio.sleep(looked_at + LOOK_SOON_S - time.monotonic())

    def _update(self) -> None:
        wanted = {str(place): place for place in self._names.places}
        for router, link in self.links.items():
            if router not in wanted and not link.is_attached:
                self._logger.info("router left: its name stands for it no longer", router=router)
                self._tasks[router].cancel()
        for router, place in wanted.items():
            if router not in self.links:
                self.links[router] = self._link(place)
                self._tasks[router] = self._group.create_task(self._run(router))

    async def _run(self, router: str) -> None:
        try:
            await self.links[router].run()
        finally:
            del self.links[router], self._tasks[router]

    def _complain(self, name: str, reason: str) -> None:
        """Once for each reason: a resolver that is away is asked again and again."""
        if self._complaints.get(name) != reason:
            self._complaints[name] = reason
            self._logger.info("router not attached", router=name, reason=reason)
