"""Client channels: one set of options for everything that calls a router.

An address is `host:port`, or several with commas between them. A name stands for every address that it has; calls go
round all routers that are connected (`spread.py`). Keepalive finds a peer whose machine is gone, where no FIN ever
comes; it is far slower than the fleet's own heartbeat.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from splitserve.core.config import ClientTls, RouterConfig
from splitserve.core.errors import ConfigError
from splitserve.rpc.names import Names, Place
from splitserve.rpc.spread import AsyncSpread, SyncSpread
from splitserve.rpc.tls import channel_credentials, read_client

DEFAULT_MAX_MESSAGE_MIB: int = RouterConfig().max_message_mib
AUTHORIZATION = "authorization"
BEARER = "Bearer "
_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_LONGEST_RECONNECT_MS = 1_000


@dataclass(frozen=True, slots=True)
class Access:
    """How a router is called: without TLS unless `tls` is said, without a key unless `api_key` is."""

    tls: ClientTls | None = None
    api_key: str | None = field(default=None, repr=False)


OPEN = Access()


def open_channel(
    address: str | Place, max_message_mib: int = DEFAULT_MAX_MESSAGE_MIB, access: Access = OPEN
) -> grpc.aio.Channel:
    """For asyncio. Connects at the first call. Raises ConfigError for files that can't be used."""
    opened = _opener(grpc.aio.insecure_channel, grpc.aio.secure_channel, max_message_mib, access)
    return _keyed(_over(address, opened, AsyncSpread), access)


def open_sync_channel(
    address: str, max_message_mib: int = DEFAULT_MAX_MESSAGE_MIB, access: Access = OPEN
) -> grpc.Channel:
    """For threads. Connects at the first call. Raises ConfigError for files that can't be used."""
    opened = _opener(grpc.insecure_channel, grpc.secure_channel, max_message_mib, access)
    return _keyed(_over(address, opened, SyncSpread), access)


def routers_of(channel: Any) -> tuple[Place, ...]:
    """Who is behind a channel of `open_channel`, as far as names have been looked up; nobody for one address."""
    bare = _bare(channel)
    return bare.places() if isinstance(bare, AsyncSpread) else ()


def connected_to(channel: Any) -> int:
    """How many routers a channel of `open_channel` can call now, at least 1; looks for others where that is due."""
    bare = _bare(channel)
    return max(1, bare.connected()) if isinstance(bare, AsyncSpread) else 1


def check_access(access: Access, setting: str = "tls") -> None:
    """Raises ConfigError, as opening a channel would, for files that can't be used or a key that is none. `setting` is
    where the files are named."""
    if access.tls is not None:
        read_client(access.tls, setting)
    if access.api_key is not None:
        _check_key(access.api_key)


def addresses(address: str) -> list[str]:
    """Each router of a list with commas. Raises ConfigError if there is none."""
    said = [one.strip() for one in address.split(",") if one.strip()]
    if not said:
        raise ConfigError("router", "no address; say host:port, or several with commas between them")
    return list(dict.fromkeys(said))


def message_limits(max_message_mib: int) -> list[tuple[str, int]]:
    size = max_message_mib * 1024 * 1024
    return [("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)]


def _opener(
    insecure: Callable[..., Any], secure: Callable[..., Any], max_message_mib: int, access: Access
) -> Callable[[Place], Any]:
    """Opens the channel to one router. Its name is what it is called by, and what its certificate is for: gRPC checks
    that against the authority, unless `server_name` is said."""
    tls, options = access.tls, _options(max_message_mib)
    credentials = channel_credentials(tls) if tls is not None else None

    def opened(place: Place) -> Any:
        if tls is not None and tls.server_name:
            named = [("grpc.ssl_target_name_override", tls.server_name)]
        else:
            named = [("grpc.default_authority", place.name)] if place.is_named else []
        if credentials is None:
            return insecure(place.address, [*options, *named])
        return secure(place.address, credentials, [*options, *named])

    return opened


def _over(
    address: str | Place, opened: Callable[[Place], Any], spread: Callable[[Names, Callable[[Place], Any]], Any]
) -> Any:
    """One router's channel, or one over those of several."""
    if isinstance(address, Place):
        return opened(address)
    names = Names(addresses(address))
    return opened(names.places[0]) if len(names.places) == 1 and not names.to_look_up else spread(names, opened)


def _options(max_message_mib: int) -> list[tuple[str, int | str]]:
    return [
        *message_limits(max_message_mib),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),  # what a stopped peer meets; a minute unless said
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_reconnect_backoff_ms", _LONGEST_RECONNECT_MS),
        ("grpc.enable_http_proxy", 0),
    ]


def _keyed(channel: Any, access: Access) -> Any:
    if access.api_key is None:
        return channel
    _check_key(access.api_key)
    return _Keyed(channel, ((AUTHORIZATION, BEARER + access.api_key),))


def _check_key(key: str) -> None:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("api_key", "must be printable ASCII without spaces, and not empty")


def _bare(channel: Any) -> Any:
    return channel.bare if isinstance(channel, _Keyed) else channel


class _Keyed:
    """A channel, sync or async, whose every call shows the key. gRPC's own call credentials need TLS, which a router on
    loopback or behind a mesh's proxy has not; interceptors cost more than this."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self.bare = channel
        self._metadata = metadata

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        return self._showing(self.bare.unary_unary(*method, **options))

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return self._showing(self.bare.unary_stream(*method, **options))

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return self._showing(self.bare.stream_unary(*method, **options))

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return self._showing(self.bare.stream_stream(*method, **options))

    def close(self, *grace: Any) -> Any:
        return self.bare.close(*grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.bare.close()

    def _showing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def with_key(*arguments: Any, metadata: Any = None, **options: Any) -> Any:
            return call(*arguments, metadata=(*(metadata or ()), *self._metadata), **options)

        return with_key
