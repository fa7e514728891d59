"""The address that a KV control channel listens on: one that peers can reach."""

import ipaddress
import socket

from splitserve.core.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Raises ConfigError like `numeric_host`."""
    return ipaddress.ip_address(numeric_host(host).strip("[]")).is_loopback


def numeric_host(host: str) -> str:
    """The address to bind, as ZeroMQ wants it. Raises ConfigError for one that peers could not reach."""
    try:
        address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ConfigError("kv_transfer.host", f"can't resolve {host!r}: {error.strerror}") from error
    parsed = ipaddress.ip_address(str(address).partition("%")[0])
    if parsed.is_unspecified:
        raise ConfigError("kv_transfer.host", f"{host!r} is no address that peers can reach; name this machine's own")
    return f"[{address}]" if parsed.version == 6 else str(address)
