"""Where one request's chunks go. Whoever speaks a protocol to clients has one; whoever serves requests fills it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from splitserve.core.request import Chunk

Send = Callable[[Chunk], Awaitable[None]]


class Sink(Protocol):
    """Takes chunks one at a time and in order, on one event loop. The first and the last are sent, not put."""

    def put(self, chunk: Chunk) -> bool:
        """Takes the chunk if that needs no waiting; False if it does, and then the chunk was not taken. For nearly
        every token this is the whole way, so it does as little as it can."""

    async def send(self, chunk: Chunk) -> None:
        """Takes the chunk, and returns once there is room for the next. Raises a SplitserveError if the client is
        gone."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """A sink of which every chunk must be awaited."""

    to: Send

    def put(self, chunk: Chunk) -> bool:
        return False

    async def send(self, chunk: Chunk) -> None:
        await self.to(chunk)
