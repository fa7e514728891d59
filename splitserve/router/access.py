"""Who may call this router, for what, and how much at once: the state behind API keys.

One object on the router's event loop, shared by gRPC and HTTP and known to neither; only `watch` awaits. What a key
file says and how rates are counted is `keys.py`. Without a key file everybody may do everything.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from splitserve.core.config import read
from splitserve.core.errors import ConfigError, Limit, Overloaded, PermissionDenied, Unauthenticated
from splitserve.core.files import Watched
from splitserve.router.keys import ANYBODY, Bucket, KeyRing, Limits, Scope, Tenant
from splitserve.telemetry.logs import Logger

LOOK_S = 1.0
_ENDS_SOON_S = 1.0  # when a running request ends nobody knows

SCOPES: Mapping[str, Scope] = {
    "splitserve.v1.Inference": Scope.INFERENCE,
    "inference.GRPCInferenceService": Scope.INFERENCE,
    "splitserve.v1.Admin": Scope.ADMIN,
    "splitserve.v1.Fleet": Scope.WORKER,
}


@dataclass(slots=True)
class _Account:
    """What one tenant has used here."""

    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    running: int = 0


class AccessControl:
    """`routers` is how many share the tenants' limits; whoever watches the fleet sets it."""

    def __init__(self, keys: KeyRing | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """None: no key is asked for."""
        self.routers = 1
        self._keys = keys
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @property
    def asks_for_keys(self) -> bool:
        return self._keys is not None

    def identify(self, key: str | None, scope: Scope) -> Tenant:
        """Whose the key is. Raises Unauthenticated, or PermissionDenied for a key without this scope."""
        if self._keys is None:
            return ANYBODY
        if not key:
            raise Unauthenticated("no API key; send one as `authorization: Bearer KEY`")
        tenant = self._keys.find(key)
        if tenant is None:
            raise Unauthenticated("this API key is not known here; it may have been taken back")
        if scope not in tenant.scopes:
            has = ", ".join(sorted(tenant.scopes))
            raise PermissionDenied(f"the API key of {tenant.name!r} has no scope {scope}, only {has}; use another")
        return tenant

    def check(self, service: str, key: str | None) -> None:
        """Whether a gRPC service may be called. Raises as `identify`; a service that is not listed is nobody's."""
        if service not in SCOPES:
            raise PermissionDenied(f"no API key opens {service or 'this call'}")
        self.identify(key, SCOPES[service])

    @contextmanager
    def admitted(self, tenant: Tenant) -> Iterator[None]:
        """One request, until the block is left. Raises Overloaded, with the time after which it would be admitted."""
        if tenant.limits == Limits():
            yield
            return
        account = self._accounts.setdefault(tenant.name, _Account())
        self._admit(tenant, account, tenant.limits.share(self.routers))
        account.running += 1
        try:
            yield
        finally:
            account.running -= 1

    def charge(self, tenant: Tenant, tokens: int) -> None:
        """Prompt or output tokens, once they are known. Never refuses: the next request meets what is left."""
        account, per_minute = self._accounts.get(tenant.name), tenant.limits.share(self.routers).tokens_per_minute
        if account is not None and per_minute is not None and tokens:
            account.tokens.add(tokens, per_minute, self._clock())

    def replace(self, keys: KeyRing) -> None:
        """From now on these. What their tenants have used stays; what runs goes on."""
        self._keys = keys
        kept = keys.names
        self._accounts = {name: account for name, account in self._accounts.items() if name in kept or account.running}

    def _admit(self, tenant: Tenant, account: _Account, limits: Limits) -> None:
        now = self._clock()
        if limits.concurrent_requests is not None and account.running >= limits.concurrent_requests:
            what = f"{account.running} requests of {tenant.name!r} run already, its limit here"
            raise Overloaded(
                f"{what}; send this one when one of them has ended", _ENDS_SOON_S, Limit.KEY_CONCURRENT_REQUESTS
            )
        waits = {
            "tokens_per_minute": _wait_s(account.tokens, limits.tokens_per_minute, now),
            "requests_per_minute": _wait_s(account.requests, limits.requests_per_minute, now),
        }
        longest = max(waits, key=lambda name: waits[name])
        if waits[longest] > 0:
            raise Overloaded(
                f"{tenant.name!r} is over its {longest}; come back in {waits[longest]:.3g} s",
                waits[longest],
                _LIMITS[longest],
            )
        if limits.requests_per_minute is not None:
            account.requests.add(1, limits.requests_per_minute, now)


class KeyFile:
    """The file that tenants are read from. Raises ConfigError from the constructor."""

    def __init__(self, path: str) -> None:
        self._watched = Watched([path], lambda: KeyRing.of(_said(path), path))
        self._path = path
        self._logger = Logger("keys")
        self.first = self._watched.first

    async def watch(self, access: AccessControl) -> None:
        """Looks every second, for ever: what the file says new is in force at once, what is wrong with it is logged."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look(access)

    def look(self, access: AccessControl) -> None:
        try:
            keys = self._watched.look()
        except ConfigError as error:
            self._logger.warning("API keys not usable; the former ones stay", reason=str(error))
            return
        if keys is not None:
            access.replace(keys)
            self._logger.info("API keys read anew", file=self._path, tenants=len(keys.names))


def _said(path: str) -> dict[str, Any]:
    """Raises ConfigError that quotes nothing of the file: it goes into a log."""
    try:
        return read(path)
    except ConfigError as error:
        mark = getattr(error.__cause__, "problem_mark", None)
        if mark is None:
            raise
        raise ConfigError(path, f"not valid YAML; look at line {mark.line + 1}") from None


_LIMITS = {
    "tokens_per_minute": Limit.KEY_TOKENS_PER_MINUTE,
    "requests_per_minute": Limit.KEY_REQUESTS_PER_MINUTE,
}


def _wait_s(bucket: Bucket, per_minute: float | None, now: float) -> float:
    return 0.0 if per_minute is None else bucket.wait_s(1, per_minute, now)
