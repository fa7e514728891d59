"""Calls to several routers: each goes to the next in turn of those that are connected.

One gRPC channel per address, so that each name is resolved anew and checked against its own certificate, which gRPC's
round robin over a list of addresses does for neither. A call that finds none connected waits until one is, or until
all have failed, for `CONNECT_WITHIN_S` at most; it then fails like any call to a router that is not there. `next_of` is
pure.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Self

import grpc

CONNECT_WITHIN_S = 5.0
_WATCH_S = 0.5  # a watching thread looks up every 0.2 s, and once more if it was to connect
_FAILED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
_READY = grpc.ChannelConnectivity.READY
_IDLE = grpc.ChannelConnectivity.IDLE


def next_of(states: Sequence[grpc.ChannelConnectivity], turn: int) -> int | None:
    """Which channel a call takes, counted round from `turn`: a connected one; any, if all have failed; None: wait."""
    order = [(turn + step) % len(states) for step in range(len(states))]
    ready = [at for at in order if states[at] is _READY]
    if ready:
        return ready[0]
    return order[0] if all(state in _FAILED for state in states) else None


class AsyncSpread:
    """For asyncio: a channel over channels. Used on one event loop."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self._channels = tuple(channels)
        self._turn = 0

    def unary_unary(self, *method: Any, **options: Any) -> Callable[..., Any]:
        calls = [channel.unary_unary(*method, **options) for channel in self._channels]

        async def call(*arguments: Any, **said: Any) -> Any:
            return await calls[await self._next()](*arguments, **said)

        return call

    def unary_stream(self, *method: Any, **options: Any) -> Callable[..., "SpreadStream"]:
        calls = [channel.unary_stream(*method, **options) for channel in self._channels]

        def call(*arguments: Any, **said: Any) -> SpreadStream:
            return SpreadStream(self._next, [partial(one, *arguments, **said) for one in calls])

        return call

    def stream_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        """Its call is there at once, and so can't wait for a connection: it takes a router that is connected now."""
        calls = [channel.stream_stream(*method, **options) for channel in self._channels]

        def call(*arguments: Any, **said: Any) -> Any:
            found = next_of(self._states(), self._turn)
            return calls[self._taken(self._turn if found is None else found)](*arguments, **said)

        return call

    async def close(self, grace: float | None = None) -> None:
        for channel in self._channels:
            await channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _next(self) -> int:
        at: int | None = None
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                while (at := next_of(states := self._states(), self._turn)) is None:
                    await self._change(states)
        except TimeoutError:
            at = self._turn
        return self._taken(at)

    def _taken(self, at: int) -> int:
        self._turn = (at + 1) % len(self._channels)
        return at

    def _states(self) -> list[grpc.ChannelConnectivity]:
        return [channel.get_state(try_to_connect=True) for channel in self._channels]

    async def _change(self, states: Sequence[grpc.ChannelConnectivity]) -> None:
        waits = [
            asyncio.ensure_future(channel.wait_for_state_change(state))
            for channel, state in zip(self._channels, states, strict=True)
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class SpreadStream:
    """One call with a stream of answers, once it is read; which router it goes to is chosen then."""

    def __init__(self, choose: Callable[[], Any], calls: Sequence[Callable[[], Any]]) -> None:
        self._choose = choose
        self._calls = calls
        self._call: Any = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._call = self._calls[await self._choose()]()
        async for answer in self._call:
            yield answer

    def cancel(self) -> bool:
        return self._call is not None and bool(self._call.cancel())


class SyncSpread:
    """For threads: a channel over channels. Thread-safe."""

    def __init__(self, channels: Sequence[grpc.Channel]) -> None:
        self._channels = tuple(channels)
        self._states = [_IDLE] * len(self._channels)
        self._turn = 0
        self._changed = threading.Condition()
        self._watchers = [partial(self._on_state, at) for at in range(len(self._channels))]
        for channel, watcher in zip(self._channels, self._watchers, strict=True):
            channel.subscribe(watcher, try_to_connect=True)

    def unary_unary(self, *method: Any, **options: Any) -> Callable[..., Any]:
        calls = [channel.unary_unary(*method, **options) for channel in self._channels]
        return lambda *arguments, **said: calls[self._next()](*arguments, **said)

    def unary_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        calls = [channel.unary_stream(*method, **options) for channel in self._channels]
        return lambda *arguments, **said: calls[self._next()](*arguments, **said)

    def stream_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        calls = [channel.stream_stream(*method, **options) for channel in self._channels]
        return lambda *arguments, **said: calls[self._next()](*arguments, **said)

    def close(self) -> None:
        """gRPC's watching threads stumble over a channel that is closed under them: they get time to end."""
        for channel, watcher in zip(self._channels, self._watchers, strict=True):
            channel.unsubscribe(watcher)
        time.sleep(_WATCH_S)
        for channel in self._channels:
            channel.close()

    def _next(self) -> int:
        self._connect_idle()
        with self._changed:
            self._changed.wait_for(lambda: next_of(self._states, self._turn) is not None, CONNECT_WITHIN_S)
            found = next_of(self._states, self._turn)
            at = self._turn if found is None else found
            self._turn = (at + 1) % len(self._channels)
        return at

    def _connect_idle(self) -> None:
        """A channel that lost its router stays idle until it is asked to connect again."""
        for at, state in enumerate(tuple(self._states)):
            if state is _IDLE:
                self._channels[at].unsubscribe(self._watchers[at])
                self._channels[at].subscribe(self._watchers[at], try_to_connect=True)

    def _on_state(self, at: int, state: grpc.ChannelConnectivity) -> None:
        with self._changed:
            self._states[at] = state
            self._changed.notify_all()
