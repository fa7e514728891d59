"""Calls to several routers: a channel over channels, one for each address that names stand for.

Each channel is checked against the certificate of its name. gRPC's own round robin over a name's addresses does not
find those that are added, and gives nobody its share of calls that last. A call that finds no router connected waits
until one is, or until all have failed, for `CONNECT_WITHIN_S` at most; it then fails like any call to a router that is
not there. Who there is and whose turn it is: `rota`.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self

import grpc

from splitserve.core.errors import Unavailable
from splitserve.rpc.names import Names, Place, Resolve, resolved, resolved_here
from splitserve.rpc.rota import IDLE, READY, Rota, Router, next_of

CONNECT_WITHIN_S = 5.0
_WATCH_S = 0.5  # a watching thread looks up every 0.2 s, and once more if it was to connect


class AsyncSpread:
    """For asyncio: a channel over channels. Used on one event loop."""

    def __init__(
        self,
        names: Names,
        opened: Callable[[Place], grpc.aio.Channel],
        resolve: Resolve | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rota = Rota(names, opened, clock)
        self._resolve = resolve or resolved
        self._looking: asyncio.Task[None] | None = None
        self._turn = 0

    def places(self) -> tuple[Place, ...]:
        """The routers, as far as they are known; looks for others where that is due."""
        self._look_if_due()
        return tuple(router.place for router in self._rota.routers)

    def connected(self) -> int:
        """How many routers can be called now; looks for others where that is due."""
        self._look_if_due()
        return sum(router.channel.get_state(try_to_connect=True) is READY for router in self._rota.routers)

    def unary_unary(self, *method: Any, **options: Any) -> Callable[..., Any]:
        async def call(*arguments: Any, **said: Any) -> Any:
            router = await self._next()
            router.calls += 1
            try:
                return await router.method("unary_unary", method, options)(*arguments, **said)
            finally:
                router.calls -= 1

        return call

    def unary_stream(self, *method: Any, **options: Any) -> Callable[..., "SpreadStream"]:
        return self._streams("unary_stream", method, options)

    def stream_stream(self, *method: Any, **options: Any) -> Callable[..., "SpreadStream"]:
        """Its requests come from an iterator."""
        return self._streams("stream_stream", method, options)

    async def close(self, grace: float | None = None) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        for router in self._rota.everybody:
            await router.channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _streams(self, kind: str, method: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., "SpreadStream"]:
        def call(*arguments: Any, **said: Any) -> SpreadStream:
            return SpreadStream(self._next, lambda router: router.method(kind, method, options)(*arguments, **said))

        return call

    async def _next(self) -> Router:
        """The router of a call that begins now."""
        self._look_if_due()
        await self._know_somebody()
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_WITHIN_S):
                while (router := self._found()) is None:
                    await self._change()
                return router
        return self._taken(self._turn % len(self._rota.routers))

    def _found(self) -> Router | None:
        routers = self._rota.routers
        at = next_of(self._states(), self._turn, [router.calls for router in routers])
        return self._taken(at) if at is not None else None

    def _taken(self, at: int) -> Router:
        self._turn = (at + 1) % len(self._rota.routers)
        return self._rota.routers[at]

    def _states(self) -> list[grpc.ChannelConnectivity]:
        return [router.channel.get_state(try_to_connect=True) for router in self._rota.routers]

    async def _change(self) -> None:
        """Of a router's state, or of who there is."""
        waits = [
            asyncio.ensure_future(router.channel.wait_for_state_change(state))
            for router, state in zip(self._rota.routers, self._states(), strict=True)
        ]
        looking = [self._looking] if self._looking is not None and not self._looking.done() else []
        try:
            await asyncio.wait([*waits, *looking], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    # Names -----------------------------------------------------------------------------------------------------------
    def _look_if_due(self) -> None:
        busy = self._looking is not None and not self._looking.done()
        if not busy and self._rota.is_due(all_there=all(state is READY for state in self._states())):
            self._rota.looking()
            self._looking = asyncio.create_task(self._look(), name="look up routers")

    async def _know_somebody(self) -> None:
        """Only who knows no router at all waits for the resolver."""
        if not self._rota.routers and self._looking is not None:
            await asyncio.wait({self._looking}, timeout=CONNECT_WITHIN_S)
            if not self._rota.routers:
                self._rota.update(_is_ready)

    async def _look(self) -> None:
        await asyncio.gather(*(self._look_up(name) for name in self._rota.names.to_look_up))
        self._rota.update(_is_ready)
        for router in self._rota.over():
            await router.channel.close()

    async def _look_up(self, name: str) -> None:
        with suppress(Unavailable):
            self._rota.names.heard(name, await self._resolve(name))


class SpreadStream:
    """One call with a stream of answers, once it is read; which router it goes to is chosen then."""

    def __init__(self, choose: Callable[[], Any], begin: Callable[[Router], Any]) -> None:
        self._choose = choose
        self._begin = begin
        self._call: Any = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        router = await self._choose()
        router.calls += 1
        try:
            self._call = self._begin(router)
            async for answer in self._call:
                yield answer
        finally:
            router.calls -= 1

    def cancel(self) -> bool:
        return self._call is not None and bool(self._call.cancel())


def _is_ready(router: Router) -> bool:
    return bool(router.channel.get_state() is READY)


class SyncSpread:
    """For threads: a channel over channels. Thread-safe."""

    def __init__(
        self,
        names: Names,
        opened: Callable[[Place], grpc.Channel],
        resolve: Callable[[str], Sequence[Place]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rota = Rota(names, opened, clock)
        self._resolve = resolve or resolved_here
        self._looking: threading.Thread | None = None
        self._turn = 0
        self._changed = threading.Condition()
        self._watchers: dict[Router, Callable[[grpc.ChannelConnectivity], None]] = {}
        with self._changed:
            self._watch()

    def places(self) -> tuple[Place, ...]:
        """The routers, as far as they are known."""
        with self._changed:
            return tuple(router.place for router in self._rota.routers)

    def unary_unary(self, *method: Any, **options: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **said: Any) -> Any:
            router = self._next()
            try:
                return router.method("unary_unary", method, options)(*arguments, **said)
            finally:
                self._ended(router)

        return call

    def unary_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._streams("unary_stream", method, options)

    def stream_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._streams("stream_stream", method, options)

    def close(self) -> None:
        """gRPC's watching threads stumble over a channel that is closed under them: they get time to end."""
        looking = self._looking
        if looking is not None:
            looking.join(CONNECT_WITHIN_S)
        with self._changed:
            everybody, watched = self._rota.everybody, bool(self._watchers)
            self._unwatch(everybody)
        if watched:
            time.sleep(_WATCH_S)
        for router in everybody:
            router.channel.close()

    def _streams(self, kind: str, method: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **said: Any) -> Any:
            router = self._next()
            begun = router.method(kind, method, options)(*arguments, **said)
            if not begun.add_callback(lambda: self._ended(router)):  # it is over already
                self._ended(router)
            return begun

        return call

    def _next(self) -> Router:
        self._look_if_due()
        with self._changed:
            self._watch()
            self._changed.wait_for(lambda: self._found() is not None, CONNECT_WITHIN_S)
            found = self._found()
            at = self._turn % len(self._rota.routers) if found is None else found
            self._turn = (at + 1) % len(self._rota.routers)
            router = self._rota.routers[at]
            router.calls += 1
        return router

    def _found(self) -> int | None:
        routers = self._rota.routers
        if len(routers) == 1:
            return 0
        return next_of([router.state for router in routers], self._turn, [router.calls for router in routers])

    def _ended(self, router: Router) -> None:
        with self._changed:
            router.calls -= 1

    def _watch(self) -> None:
        """Where there is a choice. A channel that is new, or has lost its router, stays idle until it is asked to
        connect."""
        for router in self._rota.routers if len(self._rota.routers) > 1 else ():
            if router.state is IDLE:
                watcher = self._watchers.setdefault(router, partial(self._on_state, router))
                router.channel.unsubscribe(watcher)
                router.channel.subscribe(watcher, try_to_connect=True)

    def _unwatch(self, routers: Iterable[Router]) -> None:
        for router in routers:
            if (watcher := self._watchers.pop(router, None)) is not None:
                router.channel.unsubscribe(watcher)

    def _on_state(self, router: Router, state: grpc.ChannelConnectivity) -> None:
        with self._changed:
            router.state = state
            self._changed.notify_all()

    # Names -----------------------------------------------------------------------------------------------------------
    def _look_if_due(self) -> None:
        """On a thread of its own: only who knows no router at all waits for the resolver."""
        with self._changed:
            busy = self._looking is not None and self._looking.is_alive()
            if not busy and self._rota.is_due(all_there=all(each.state is READY for each in self._rota.routers)):
                self._rota.looking()
                self._looking = threading.Thread(target=self._look, name="look up routers", daemon=True)
                self._looking.start()
            if not self._changed.wait_for(lambda: bool(self._rota.routers), CONNECT_WITHIN_S):
                self._rota.update(_was_ready)

    def _look(self) -> None:
        found: dict[str, Sequence[Place]] = {}
        for name in self._rota.names.to_look_up:
            with suppress(Unavailable):
                found[name] = self._resolve(name)
        with self._changed:
            for name, places in found.items():
                self._rota.names.heard(name, places)
            over = self._rota.over()  # those who left at the last look: watching threads have had time to end
            self._unwatch(self._rota.update(_was_ready))
            self._watch()
            self._changed.notify_all()
        for router in over:
            router.channel.close()


def _was_ready(router: Router) -> bool:
    return router.state is READY
