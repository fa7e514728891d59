"""Names into addresses: the one place that asks the resolver.

A name is `host:port` as settings say it; it stands for every address that the host has, A and AAAA records alike, and
each of them is a router. `Names` is what was heard last: a resolver that fails, or that answers nothing, takes nothing
back. When to ask again, and what becomes of a router whose address is gone, is its caller's affair: a worker's
(`worker/routers`) or a client's (`spread`).
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from splitserve.core.errors import Unavailable

LOOK_AGAIN_S = 10.0  # scaled routers are found within so long; a cluster's DNS is asked that seldom by each process
LOOK_SOON_S = 1.0  # after a router was lost, and while a name has no address


@dataclass(frozen=True, slots=True)
class Place:
    """One router: where it is, and the name that it goes by, which its certificate is checked against."""

    name: str
    address: str  # host:port, the host in digits; the name itself where nobody has resolved it

    @property
    def is_named(self) -> bool:
        return self.name != self.address

    def __str__(self) -> str:
        return f"{self.name} ({self.address.rpartition(':')[0]})" if self.is_named else self.name


Resolve = Callable[[str], Awaitable[Sequence[Place]]]


class Names:
    """What names stand for, by the last answers. Pure."""

    def __init__(self, names: Iterable[str]) -> None:
        self._said: dict[str, tuple[Place, ...]] = {name: _in_digits(name) for name in names}
        self.to_look_up = tuple(name for name, places in self._said.items() if not places)

    def heard(self, name: str, places: Sequence[Place]) -> None:
        """An answer. An empty one says nothing."""
        if places:
            self._said[name] = tuple(places)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of which no address is known yet."""
        return tuple(name for name, places in self._said.items() if not places)

    @property
    def places(self) -> tuple[Place, ...]:
        """One for each address, by the first name that has it."""
        places: dict[str, Place] = {}
        for place in (place for said in self._said.values() for place in said):
            places.setdefault(place.address, place)
        return tuple(places.values())


async def resolved(name: str) -> tuple[Place, ...]:
    """All addresses of a name. Raises Unavailable if there is none."""
    host, port = _parts(name)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, **_OPTIONS)
    except OSError as error:
        raise _nobody(name, error) from error
    return _places(name, found)


def resolved_here(name: str) -> tuple[Place, ...]:
    """`resolved`, for threads."""
    try:
        found = socket.getaddrinfo(*_parts(name), **_OPTIONS)
    except OSError as error:
        raise _nobody(name, error) from error
    return _places(name, found)


# No AAAA where this machine has no IPv6 address: nobody could be reached there.
_OPTIONS: dict[str, Any] = {"type": socket.SOCK_STREAM, "flags": socket.AI_ADDRCONFIG}


def _places(name: str, found: Iterable[tuple[Any, ...]]) -> tuple[Place, ...]:
    return tuple(dict.fromkeys(Place(name, _written(*each[4][:2])) for each in found))


def _written(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _in_digits(name: str) -> tuple[Place, ...]:
    """The place of an address; nothing for a name."""
    host, _ = _parts(name)
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return ()
    return (Place(name, name),)


def _parts(name: str) -> tuple[str, str]:
    host, _, port = name.rpartition(":")
    return host.strip("[]"), port


def _nobody(name: str, error: OSError) -> Unavailable:
    reason = error.strerror or str(error)
    return Unavailable(f"{name} has no address ({reason}); check the name, or wait until its Service has a pod")
