"""An event loop whose time passes only when everyone waits, and then at once."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


def run_virtually(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Like asyncio.run, from second 1000 on."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Waiting moves its clock instead of waiting. Nothing outside it may be waited for."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_Selector(self))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Also for a test to have work take time."""
        self._now += seconds


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everyone waits for something that never comes"
        self._loop.advance(max(0.0, timeout))
        return super().select(0)
