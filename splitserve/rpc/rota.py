"""Which routers a client calls, and which of them a call goes to: the connected one with the fewest calls, in turn
among equals.

Names are due to be looked up when a call is made and the last answer is old, or a router is not there: whoever makes no
calls asks no resolver. A router that is gone from DNS is left when its connection is lost, and not before; it keeps the
calls that it still has. Pure, but that it opens a channel for each router.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from splitserve.rpc.names import LOOK_AGAIN_S, LOOK_SOON_S, Names, Place

READY = grpc.ChannelConnectivity.READY
IDLE = grpc.ChannelConnectivity.IDLE
_FAILED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


def next_of(states: Sequence[grpc.ChannelConnectivity], turn: int, calls: Sequence[int] = ()) -> int | None:
    """Which channel a call takes, counted round from `turn`: the connected one with the fewest `calls`; any, if all
    have failed; None: wait."""
    order = [(turn + step) % len(states) for step in range(len(states))]
    ready = [at for at in order if states[at] is READY]
    if ready:
        return min(ready, key=lambda at: calls[at] if calls else 0)
    return order[0] if order and all(state in _FAILED for state in states) else None


class Router:
    """One router's channel, and the calls that run on it."""

    def __init__(self, place: Place, channel: Any) -> None:
        self.place = place
        self.channel = channel
        self.calls = 0
        self.state = IDLE  # as a watching thread saw it; for threads
        self._methods: dict[tuple[str, Any], Callable[..., Any]] = {}

    def method(self, kind: str, method: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
        """The channel's own, made once."""
        key = (kind, method[0])
        if key not in self._methods:
            self._methods[key] = getattr(self.channel, kind)(*method, **options)
        return self._methods[key]


class Rota:
    """Which routers there are, by what names stand for."""

    def __init__(self, names: Names, opened: Callable[[Place], Any], clock: Callable[[], float]) -> None:
        self._opened = opened
        self._clock = clock
        self._looked_at = -math.inf
        self.names = names
        self.routers: list[Router] = [Router(place, opened(place)) for place in names.places]
        self.leaving: list[Router] = []  # with calls, and without a name

    def is_due(self, *, all_there: bool) -> bool:
        age_s = self._clock() - self._looked_at
        return bool(self.names.to_look_up) and age_s >= (LOOK_AGAIN_S if all_there else LOOK_SOON_S)

    def looking(self) -> None:
        self._looked_at = self._clock()

    def update(self, connected: Callable[[Router], bool]) -> list[Router]:
        """After a look: takes in who is new, and returns those that have left. A name without an address is left to
        gRPC, which says what is wrong with it."""
        wanted = {
            place.address: place for place in (*self.names.places, *(Place(name, name) for name in self.names.unknown))
        }
        here = {router.place.address: router for router in self.routers}
        gone = [router for router in self.routers if router.place.address not in wanted and not connected(router)]
        kept = [router for router in self.routers if router not in gone]
        new = [Router(place, self._opened(place)) for address, place in wanted.items() if address not in here]
        self.routers = [*kept, *new]
        self.leaving += gone
        return gone

    def over(self) -> list[Router]:
        """Of those that have left, whoever has no call any more; they are forgotten."""
        over = [router for router in self.leaving if not router.calls]
        self.leaving = [router for router in self.leaving if router.calls]
        return over

    @property
    def everybody(self) -> tuple[Router, ...]:
        return (*self.routers, *self.leaving)
