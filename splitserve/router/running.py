"""Which requests run in this router, so that ids are unique among them and a drain knows when they have ended.

One object on the router's event loop; only `ended` awaits.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from splitserve.core.errors import InvalidRequest, Unavailable


class Running:
    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._draining = False
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def draining(self) -> bool:
        return self._draining

    @contextmanager
    def admitted(self, request_id: str) -> Iterator[None]:
        """Holds the id until the block is left. Raises Unavailable while draining, InvalidRequest for an id in use."""
        if self._draining:
            raise Unavailable("this router is draining; send the request to another one, or again later")
        if request_id in self._ids:
            raise InvalidRequest("request_id", f"{request_id!r} is running already; choose another, or leave it empty")
        self._ids.add(request_id)
        self._none.clear()
        try:
            yield
        finally:
            self._ids.discard(request_id)
            if not self._ids:
                self._none.set()

    def drain(self) -> None:
        """From now on nothing is admitted."""
        self._draining = True

    async def ended(self, within_s: float) -> bool:
        """Waits until nothing runs; False if something still does then."""
        try:
            async with asyncio.timeout(within_s):
                await self._none.wait()
        except TimeoutError:
            return False
        return True
