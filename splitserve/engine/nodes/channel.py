"""The sockets between nodes of one worker. Where there is an API key, only who has it can listen or speak.

Both ends derive one CURVE key pair from the worker's API key, so that its public half is as secret as the key is:
without it nobody gets through a handshake, on either side, and nothing is readable on the way.
"""

import hashlib
from collections.abc import Iterator, Mapping

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from splitserve.core.config import NodesSettings
from splitserve.core.errors import ConfigError
from splitserve.kv.curve import Keys

BEAT_S = 1.0
NEWS_S = 10.0  # how often a node that waits says so
VERDICT_S = 2.0  # vLLM may notice before we do that a node is gone: its own errors wait so long for the reason
LINGER_MS = 500
MOST_AT_ONCE = 1000  # messages heard before the rest has its turn
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
HANDSHAKE_MS = 10_000

_SALT = b"splitserve nodes of one worker"


def keys_of(api_key: str | None) -> Keys | None:
    """None without an API key. Raises ConfigError where libzmq has no CURVE."""
    if api_key is None:
        return None
    if not zmq.has("curve"):
        raise ConfigError(
            "nodes", "there is an API key, but this libzmq has no CURVE to keep strangers out; install one"
        )
    secret = z85.encode(hashlib.scrypt(api_key.encode(), salt=_SALT, n=2**14, r=8, p=1, dklen=32))
    return Keys(zmq.curve_public(secret), secret)


def where(settings: NodesSettings) -> str:
    """The leader, for people."""
    return f"{settings.leader}:{settings.port}"


def prepare(socket: "zmq.Socket[bytes]", keys: Keys | None, *, listens: bool) -> None:
    """Before it is bound or connected."""
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    if keys is None:
        return
    socket.curve_secretkey = keys.secret
    if listens:
        socket.curve_server = True
    else:
        socket.curve_publickey = socket.curve_serverkey = keys.public


def events(monitor: "zmq.Socket[bytes]") -> Iterator[tuple[int, int]]:
    """What has happened to a socket's connections: event, and its value."""
    while monitor.poll(0):
        said = recv_monitor_message(monitor)
        yield int(said["event"]), int(said["value"])


def difference(leaders: Mapping[str, str], nodes: Mapping[str, str], node: int) -> tuple[str, str] | None:
    """The first setting that is not the same, and a sentence; None if all are."""
    for field in sorted({*leaders, *nodes}):
        ours, theirs = leaders.get(field, "not there"), nodes.get(field, "not there")
        if ours != theirs:
            return field, f"it is {theirs} on node {node} and {ours} on node 0; give all nodes of a worker the same"
    return None
