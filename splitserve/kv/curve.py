"""CURVE for the KV control channel: a rank's keys, and who is let in. Owned by the control thread.

Every rank makes its keys when it starts; the public one travels in its `KvPeer` by way of the router, which is how a
rank knows whom to believe. ZeroMQ asks its authenticator (ZAP, RFC 27) about every connection; nothing but a key that
was told of is let in, and what comes in carries the uuid that was told with it, so that no peer can speak for another.

Two ranks may be told of each other in either order. A stranger's connection is therefore not refused, after which
libzmq would never try again, but left waiting: it is let in the moment its key is told, and otherwise ends with its
handshake's time, after which libzmq tries again.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from splitserve.core.worker import KvPeer

MOST_WAITING = 256

_ENDPOINT = "inproc://zeromq.zap.01"
_VERSION = b"1.0"
_WELCOME, _REFUSED = b"200", b"400"


@dataclass(frozen=True, slots=True)
class Keys:
    """In Z85."""

    public: bytes
    secret: bytes = field(repr=False)

    def listen(self, inbox: "zmq.Socket[bytes]") -> None:
        """Before it is bound."""
        inbox.setsockopt(zmq.ZAP_DOMAIN, b"kv")  # without one libzmq may ask nobody
        inbox.curve_server = True
        inbox.curve_secretkey = self.secret

    def dial(self, outbox: "zmq.Socket[bytes]", peer: KvPeer) -> None:
        """Before it is connected. Only the holder of the peer's secret key can read what is sent."""
        outbox.curve_serverkey = peer.public_key.encode()
        outbox.curve_publickey = self.public
        outbox.curve_secretkey = self.secret


def made_keys() -> Keys | None:
    """New ones; None where libzmq was built without CURVE."""
    return Keys(*zmq.curve_keypair()) if zmq.has("curve") else None


def fault_of_key(peer: KvPeer, own: Keys | None) -> str:
    """Why this peer can't be spoken to; "" if it can. Either both have keys or neither: a rank that spoke in the clear
    with whoever shows no key could be made to by anybody."""
    if own is None:
        return "it has a CURVE key and this rank's libzmq has no CURVE; install one alike" if peer.public_key else ""
    if not peer.public_key:
        return "it has no CURVE key: its libzmq lacks CURVE, or its splitserve is older"
    try:
        valid = len(z85.decode(peer.public_key.encode())) == 32
    except (ValueError, KeyError):
        valid = False
    return "" if valid else "its CURVE key is none"


@dataclass(frozen=True, slots=True)
class _Stranger:
    """A connection that waits for its key to be told."""

    envelope: Sequence[bytes]
    request: bytes
    key: str
    until: float  # its handshake ends then


class Doorkeeper:
    """ZAP's answering side in one context. `socket` is to be polled, and `answer` called when it is readable.
    `handshake_s` is the listener's own."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", handshake_s: float) -> None:
        self._handshake_s = handshake_s
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(_ENDPOINT)
        self._peers: dict[str, KvPeer] = {}
        self._uuids: dict[str, str] = {}
        self._waiting: OrderedDict[bytes, _Stranger] = OrderedDict()

    def trust(self, peer: KvPeer) -> None:
        """From now on it is let in; whoever waited with its key is at once. What was told first of a uuid or a key
        holds."""
        if peer.uuid in self._peers or peer.public_key in self._uuids or not peer.public_key:
            return
        self._peers[peer.uuid] = peer
        self._uuids[peer.public_key] = peer.uuid
        for name, stranger in list(self._waiting.items()):
            if stranger.key == peer.public_key:
                del self._waiting[name]
                self._reply(stranger.envelope, stranger.request, _WELCOME, peer.uuid)

    def forget(self, uuid: str) -> None:
        peer = self._peers.pop(uuid, None)
        if peer is not None:
            self._uuids.pop(peer.public_key, None)

    def known(self, uuid: str) -> KvPeer | None:
        return self._peers.get(uuid)

    def answer(self, now: float) -> None:
        """What waits on the socket."""
        while self.socket.poll(0):
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
            divider = frames.index(b"")
            self._judge(frames[: divider + 1], frames[divider + 1 :], now)

    def forget_gone(self, now: float) -> None:
        """Strangers whose handshakes have ended."""
        while self._waiting and next(iter(self._waiting.values())).until <= now:
            self._waiting.popitem(last=False)

    def close(self) -> None:
        self.socket.close(0)

    def _judge(self, envelope: Sequence[bytes], said: Sequence[bytes], now: float) -> None:
        _, request, _, _, _, mechanism, *credentials = said
        if mechanism != b"CURVE" or len(credentials) != 1:
            self._reply(envelope, request, _REFUSED, "")
            return
        key = z85.encode(credentials[0]).decode()
        if key in self._uuids:
            self._reply(envelope, request, _WELCOME, self._uuids[key])
        elif len(self._waiting) < MOST_WAITING:
            until = now + self._handshake_s
            self._waiting[b"".join(envelope) + request] = _Stranger(envelope, request, key, until)

    def _reply(self, envelope: Sequence[bytes], request: bytes, status: bytes, uuid: str) -> None:
        self.socket.send_multipart([*envelope, _VERSION, request, status, b"", uuid.encode(), b""])
