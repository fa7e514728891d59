"""The generations that run in this gateway: counted, so that it can wait for them, and told to end when it can't.

Used on one event loop.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from splitserve.core.errors import Unavailable


class InFlight:
    def __init__(self) -> None:
        self._scopes: set[asyncio.Timeout] = set()
        self._none = asyncio.Event()
        self._none.set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._scopes)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Around one generation. Raises Unavailable if there are to be no new ones, or if it was told to end."""
        if self.draining:
            raise Unavailable("this gateway drains; send the request again")
        scope = asyncio.timeout(None)
        self._scopes.add(scope)
        self._none.clear()
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise Unavailable("this gateway stops; send the request again") from error
        finally:
            self._scopes.discard(scope)
            if not self._scopes:
                self._none.set()

    def drain(self) -> None:
        """There will be no new ones."""
        self.draining = True

    async def ended(self, within_s: float) -> bool:
        """Waits until none runs, or for so long; returns whether none does."""
        try:
            async with asyncio.timeout(within_s):
                await self._none.wait()
        except TimeoutError:
            return False
        return True

    def end(self) -> None:
        """Those that still run end now, with an error."""
        self.drain()
        now = asyncio.get_running_loop().time()
        for scope in tuple(self._scopes):
            if not scope.expired():
                scope.reschedule(now)
