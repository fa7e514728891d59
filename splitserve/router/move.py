"""An order to move one decode to another worker, and what became of it: plain values of the router's event loop.

How it is carried out: `departure.py`.
"""

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Moved:
    """`stall_s`: between the last token of the one worker and the first of the other."""

    from_worker: str
    to_worker: str
    stall_s: float


class MoveRefused(Exception):
    """The request did not move; the sentence says why. Within the router: an operator hears Unavailable."""


class Move:
    """An order to move, and what became of it. `to`: a worker uuid, or None for whichever takes it."""

    def __init__(self, to: str | None = None) -> None:
        self.to = to
        self._result: asyncio.Future[Moved] = asyncio.get_running_loop().create_future()

    async def result(self) -> Moved:
        """Raises MoveRefused."""
        return await asyncio.shield(self._result)

    def done(self, moved: Moved) -> None:
        if not self._result.done():
            self._result.set_result(moved)

    def refuse(self, reason: str) -> None:
        """Does nothing once it has moved."""
        if not self._result.done():
            self._result.set_exception(MoveRefused(reason))
            self._result.exception()  # nobody need ask
