"""API keys: what a key file says, whose a key is, and how much of its limits a tenant has used. Pure; time is an
argument, in seconds on any one clock.

A tenant is one entry of the file. Its keys are held as SHA-256 digests and looked up by digest, so that neither a dump
of this process nor the time that a look-up takes tells anything of a key that is not known already.

Rates are leaky buckets: a minute's worth may come at once, and what was used comes back evenly. Tokens are charged as
they become known, the prompt's once it is tokenised and the output's when it has been made, not estimated beforehand:
an estimate would refuse requests that fit or let through those that don't, and `max_tokens` is far from what most
requests use. So a tenant is admitted while anything is left; its running requests may take it below zero, by no more
than they make, and it then waits until that is paid back.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field

from splitserve.core.config import Count, Settings, parse
from splitserve.core.errors import ConfigError

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
_SHORTEST_KEY = 16
_MINUTE_S = 60.0
_ROUNDING = 1e-6  # whoever comes back when told to is let in


class Scope(StrEnum):
    """What a key opens."""

    INFERENCE = "inference"  # generating, tokenising, models
    ADMIN = "admin"  # the fleet: looking at it, draining, moving
    WORKER = "worker"  # joining the fleet


@dataclass(frozen=True, slots=True)
class Limits:
    """None: unlimited."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrent_requests: int | None = None

    def share(self, routers: int) -> "Limits":
        """One router's of so many that serve the same tenants; at least one request at a time."""
        most = self.concurrent_requests
        return Limits(
            None if self.requests_per_minute is None else self.requests_per_minute / routers,
            None if self.tokens_per_minute is None else self.tokens_per_minute / routers,
            None if most is None else max(1, most // routers),
        )


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who calls. `cache_salt` keeps its prompts' cached KV apart from other tenants'; "" of whoever calls a router
    without keys."""

    name: str
    scopes: frozenset[Scope]
    limits: Limits = Limits()
    cache_salt: str = ""

    def salted(self, own: str) -> str:
        """The salt of a request that says `own`: shared with no other tenant's request, whatever that says."""
        return _digest(f"{len(self.cache_salt)}:{self.cache_salt}{own}") if self.cache_salt else own


ANYBODY = Tenant("", frozenset(Scope))


@dataclass(slots=True)
class Bucket:
    """How much of a rate is used. A change of the rate applies from now on."""

    used: float = 0.0
    at: float = 0.0

    def wait_s(self, amount: float, per_minute: float, now: float) -> float:
        """How long until so much fits; 0: now. At least `amount` fits into an unused bucket, however low the rate."""
        self._leak(per_minute, now)
        over = self.used + amount - max(per_minute, amount)
        return over * _MINUTE_S / per_minute if over > _ROUNDING else 0.0

    def add(self, amount: float, per_minute: float, now: float) -> None:
        """Whether or not it fits."""
        self._leak(per_minute, now)
        self.used += amount

    def _leak(self, per_minute: float, now: float) -> None:
        self.used = max(0.0, self.used - (now - self.at) * per_minute / _MINUTE_S)
        self.at = now


class KeyRing:
    """Whose each key is."""

    def __init__(self, tenants: Mapping[bytes, Tenant]) -> None:
        """By the keys' digests."""
        self._tenants = dict(tenants)

    @classmethod
    def of(cls, said: object, source: str) -> Self:
        """What a key file says. Raises ConfigError; `source` begins its path, and no key is quoted."""
        tenants: dict[bytes, Tenant] = {}
        names: set[str] = set()
        for index, entry in enumerate(parse(_KeyFile, said, source).keys):
            if entry.name in names:
                raise ConfigError(f"{source}: keys.{index}.name", f"{entry.name!r} comes twice; give it several keys")
            names.add(entry.name)
            for digest in entry.key:
                if digest in tenants:
                    raise ConfigError(f"{source}: keys.{index}.key", f"is a key of {tenants[digest].name!r}, too")
                tenants[digest] = _tenant(entry)
        return cls(tenants)

    def find(self, key: str) -> Tenant | None:
        return self._tenants.get(hashlib.sha256(key.encode()).digest())

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tenant.name for tenant in self._tenants.values())


def _digests(said: object) -> tuple[bytes, ...]:
    """Of one key or several. What is wrong is said without quoting it."""
    given = said if isinstance(said, list) else [said]
    if not given:
        raise ValueError("needs at least one")
    return tuple(_digest_of(key) for key in given)


def _digest_of(key: object) -> bytes:
    if not isinstance(key, str):
        raise ValueError("must be text; put it between quotes")
    if hashed := _HASHED.fullmatch(key):
        return bytes.fromhex(hashed[1])
    if key.startswith("sha256:"):
        raise ValueError("must have 64 hexadecimal digits in lower case after sha256:")
    if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"must be at least {_SHORTEST_KEY} printable ASCII characters, none of them a space")
    return hashlib.sha256(key.encode()).digest()


def _something(name: str) -> str:
    if not name:
        raise ValueError("must not be empty")
    return name


class _Entry(Settings):
    name: Annotated[str, AfterValidator(_something)] = Field(description="the tenant, as logs name it")
    key: Annotated[tuple[bytes, ...], BeforeValidator(_digests)] = Field(
        description="text, or sha256: and its digest in hexadecimal; several while one replaces another"
    )
    scopes: frozenset[Scope] = Field(frozenset({Scope.INFERENCE}), min_length=1)
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="prompt and output together"
    )
    concurrent_requests: Count | None = None
    cache_salt: str = Field("", description="default: made of the name; tenants with one salt share cached prompts")


class _KeyFile(Settings):
    keys: list[_Entry] = Field(min_length=1)


def _tenant(entry: _Entry) -> Tenant:
    limits = Limits(entry.requests_per_minute, entry.tokens_per_minute, entry.concurrent_requests)
    return Tenant(entry.name, entry.scopes, limits, entry.cache_salt or _digest(f"splitserve tenant {entry.name}"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
