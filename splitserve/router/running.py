"""Which requests run in this router: ids are unique among them, an operator names one or looks at all, a drain knows
when all have ended.

One object on the router's event loop; only `ended` awaits.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

from splitserve.core.errors import InvalidRequest, Limit, Overloaded, Unavailable
from splitserve.core.fleet import Explanation, RunningRequest, RunningRequests
from splitserve.router.move import Move

_RETRY_S = 1.0


class Traveller(Protocol):
    """A request on its way: its journey."""

    @property
    def decode_worker(self) -> str: ...

    def move(self, move: Move) -> None: ...

    def explain(self) -> Explanation: ...

    def status(self) -> RunningRequest: ...


class Running:
    """`most`: requests at once."""

    def __init__(self, most: int = 10_000) -> None:
        self._requests: dict[str, dict[str, Traveller]] = {}  # each request's outputs by their names
        self._most = most
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
        """Holds the id until the block is left. Raises Unavailable while draining, InvalidRequest for an id in use,
        Overloaded if too many run."""
        if self._draining:
            raise Unavailable("this router is draining; send the request to another one, or again later")
        if request_id in self._requests:
            raise InvalidRequest("request_id", f"{request_id!r} is running already; choose another, or leave it empty")
        if len(self._requests) >= self._most:
            sentence = f"{self._most} requests run or wait here, the most this router takes"
            raise Overloaded(sentence, _RETRY_S, Limit.STREAMS)
        self._requests[request_id] = {}
        self._none.clear()
        try:
            yield
        finally:
            del self._requests[request_id]
            if not self._requests:
                self._none.set()

    def travels(self, request_id: str, choice: int, traveller: Traveller) -> None:
        """One output of an admitted request is on its way. The first is called as the request is, the others `id#1`
        and so on."""
        self._requests[request_id][f"{request_id}#{choice}" if choice else request_id] = traveller

    def get(self, name: str) -> Traveller:
        """Raises InvalidRequest if none is called so."""
        traveller = self._requests.get(name.rpartition("#")[0] or name, {}).get(name)
        if traveller is None:
            raise InvalidRequest("request_id", f"no request {name!r} runs in this router")
        return traveller

    def newest(self, most: int) -> RunningRequests:
        """Of all outputs, so many of those that came last."""
        outputs = (each for request in reversed(self._requests.values()) for each in request.values())
        total = sum(map(len, self._requests.values()))
        return RunningRequests(tuple(each.status() for each in islice(outputs, most)), total)

    def decoding_at(self, worker: str) -> dict[str, Traveller]:
        """What has, or will have, this decode worker."""
        everyone = [each for outputs in self._requests.values() for each in outputs.items()]
        return {name: each for name, each in everyone if each.decode_worker == worker}

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
