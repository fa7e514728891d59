"""Client channels: one set of options for everything that calls a router.

An address is `host:port`, or several with commas between them: calls then go round those that are connected
(`spread.py`). Keepalive finds a peer whose machine is gone, where no FIN ever comes; it is far slower than the fleet's
own heartbeat.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from splitserve.core.config import ClientTls, RouterConfig
from splitserve.core.errors import ConfigError
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
    address: str, max_message_mib: int = DEFAULT_MAX_MESSAGE_MIB, access: Access = OPEN
) -> grpc.aio.Channel:
    """For asyncio. Connects at the first call. Raises ConfigError for files that can't be used."""
    if access.tls is None:
        channels = [grpc.aio.insecure_channel(one, _options(max_message_mib)) for one in addresses(address)]
    else:
        credentials, options = channel_credentials(access.tls), _tls_options(access.tls, max_message_mib)
        channels = [grpc.aio.secure_channel(one, credentials, options) for one in addresses(address)]
    return _keyed(channels[0] if len(channels) == 1 else AsyncSpread(channels), access)


def open_sync_channel(
    address: str, max_message_mib: int = DEFAULT_MAX_MESSAGE_MIB, access: Access = OPEN
) -> grpc.Channel:
    """For threads. Connects at the first call. Raises ConfigError for files that can't be used."""
    if access.tls is None:
        channels = [grpc.insecure_channel(one, _options(max_message_mib)) for one in addresses(address)]
    else:
        credentials, options = channel_credentials(access.tls), _tls_options(access.tls, max_message_mib)
        channels = [grpc.secure_channel(one, credentials, options) for one in addresses(address)]
    return _keyed(channels[0] if len(channels) == 1 else SyncSpread(channels), access)


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


def _tls_options(tls: ClientTls, max_message_mib: int) -> list[tuple[str, int | str]]:
    named = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return [*_options(max_message_mib), *named]


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


class _Keyed:
    """A channel, sync or async, whose every call shows the key. gRPC's own call credentials need TLS, which a router on
    loopback or behind a mesh's proxy has not; interceptors cost more than this."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def unary_unary(self, *method: Any, **options: Any) -> Any:
        return self._showing(self._channel.unary_unary(*method, **options))

    def unary_stream(self, *method: Any, **options: Any) -> Any:
        return self._showing(self._channel.unary_stream(*method, **options))

    def stream_unary(self, *method: Any, **options: Any) -> Any:
        return self._showing(self._channel.stream_unary(*method, **options))

    def stream_stream(self, *method: Any, **options: Any) -> Any:
        return self._showing(self._channel.stream_stream(*method, **options))

    def close(self, *grace: Any) -> Any:
        return self._channel.close(*grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def _showing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def with_key(*arguments: Any, metadata: Any = None, **options: Any) -> Any:
            return call(*arguments, metadata=(*(metadata or ()), *self._metadata), **options)

        return with_key
