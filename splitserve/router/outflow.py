"""One request's output on its way to its client: what goes out at once, what gathers, what has to wait.

Most tokens take the short way: from the worker's message to the client's sink in one call chain, and no task wakes.
What comes within `gap_s` of the last message gathers and goes out together. What the sink does not take at once is
sent by the request's task, which is woken for it. Used on the router's event loop only.
"""

import asyncio
import time
from collections.abc import Callable
from math import inf

from splitserve.core.request import Chunk
from splitserve.core.sink import Sink
from splitserve.core.worker import Delta
from splitserve.router.output import Output


class Outflow:
    """`wake`: something waits that `flush` must send; whoever runs the request sets it. `sending_since` is when the
    send under way began, on the monotonic clock; inf without one."""

    def __init__(self, output: Output, sink: Sink, request_id: str, gap_s: float) -> None:
        self._output = output
        self._sink = sink
        self._request_id = request_id
        self._gap_s = gap_s
        self._passed_at = -inf
        self._gathering: asyncio.TimerHandle | None = None
        self.wake: Callable[[], None] = lambda: None
        self.sending_since = inf

    @property
    def sending(self) -> bool:
        """Whether the client is being waited for."""
        return self.sending_since != inf

    def pass_on(self, delta: Delta, now: float) -> None:
        """The short way, for a delta that follows what is known; not while a send is under way."""
        self._output.accept(delta)
        if self.is_due(now):
            self._pass_all(now)

    def is_due(self, now: float) -> bool:
        """Whether the last message was long enough ago; if not, what gathers is passed on when it was."""
        wait_s = self._passed_at + self._gap_s - now
        if wait_s > 0 and self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(wait_s, self._pass_gathered)
        return wait_s <= 0

    async def flush(self) -> None:
        """Sends what is there."""
        if self._output.has_unsent:
            await self.send(self._output.take_chunk(self._request_id))

    async def send(self, chunk: Chunk) -> None:
        self._passed_at = self.sending_since = time.monotonic()
        await self._sink.send(chunk)
        self.sending_since = inf

    def rest(self) -> None:
        """Nothing is passed on before the next call."""
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None

    def _pass_gathered(self) -> None:
        self._gathering = None
        if self._output.has_unsent and not self.sending:
            self._pass_all(time.monotonic())

    def _pass_all(self, now: float) -> None:
        if self._sink.put(self._output.chunk(self._request_id)):
            self._output.note_sent()
            self._passed_at = now
        else:
            self.wake()
