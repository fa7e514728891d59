"""Which requests run in this router: ids are unique among them, an operator names one, a drain knows when all have
ended.

One object on the router's event loop; only `ended` awaits.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from splitserve.core.errors import InvalidRequest, Unavailable
from splitserve.router.move import Move


class Traveller(Protocol):
    """A request on its way: its journey."""

    @property
    def decode_worker(self) -> str: ...

    def move(self, move: Move) -> None: ...


class Running:
    def __init__(self) -> None:
        self._requests: dict[str, Traveller | None] = {}
        self._draining = False
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def draining(self) -> bool:
        return self._draining

    @contextmanager
    def admitted(self, request_id: str) -> Iterator[None]:
        """Holds the id until the block is left. Raises Unavailable while draining, InvalidRequest for an id in use."""
        if self._draining:
            raise Unavailable("this router is draining; send the request to another one, or again later")
        if request_id in self._requests:
            raise InvalidRequest("request_id", f"{request_id!r} is running already; choose another, or leave it empty")
        self._requests[request_id] = None
        self._none.clear()
        try:
            yield
        finally:
            del self._requests[request_id]
            if not self._requests:
                self._none.set()

    def travels(self, request_id: str, traveller: Traveller) -> None:
        """An admitted request is on its way."""
        self._requests[request_id] = traveller

    def get(self, request_id: str) -> Traveller | None:
        return self._requests.get(request_id)

    def decoding_at(self, worker: str) -> dict[str, Traveller]:
        """The requests whose decode worker this is, or will be."""
        there = {name: each for name, each in self._requests.items() if each is not None}
        return {name: each for name, each in there.items() if each.decode_worker == worker}

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
