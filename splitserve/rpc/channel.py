"""Client channels: one set of options for everything that calls a router.

Keepalive finds a peer whose machine is gone, where no FIN ever comes; it is far slower than the fleet's own heartbeat.
"""

import grpc

from splitserve.core.config import RouterConfig

DEFAULT_MAX_MESSAGE_MIB: int = RouterConfig().max_message_mib
_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 10_000
_LONGEST_RECONNECT_MS = 1_000


def open_channel(address: str, max_message_mib: int = DEFAULT_MAX_MESSAGE_MIB) -> grpc.aio.Channel:
    """For asyncio. Connects at the first call."""
    return grpc.aio.insecure_channel(address, options=_options(max_message_mib))


def open_sync_channel(address: str, max_message_mib: int = DEFAULT_MAX_MESSAGE_MIB) -> grpc.Channel:
    """For threads. Connects at the first call."""
    return grpc.insecure_channel(address, options=_options(max_message_mib))


def message_limits(max_message_mib: int) -> list[tuple[str, int]]:
    size = max_message_mib * 1024 * 1024
    return [("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)]


def _options(max_message_mib: int) -> list[tuple[str, int]]:
    return [
        *message_limits(max_message_mib),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),  # what a stopped peer meets; a minute unless said
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_reconnect_backoff_ms", _LONGEST_RECONNECT_MS),
        ("grpc.enable_http_proxy", 0),
    ]
