"""The KV control channel of one worker: messages to and from peers, and whether they live.

One thread (the control thread) owns every socket, so a peer is answered however long the engine's step or a WRITE
takes. `connect`, `send` and `close` are called from one other thread: they enqueue and wake it. What it learns goes to
`on_news`, called on the control thread, which must not block. Not here: what a message means to a transfer
(`ledger.py`).

Where libzmq has CURVE nothing goes in the clear and nobody is let in who was not told of (`curve.py`).

A peer has ended only when that is proven: its endpoint refuses connections, another worker answers there, or it said
Goodbye. Messages for other workers, from unknown ones or unreadable are counted and dropped.
"""

import logging
import math
import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from splitserve.core.config import KvTransferSettings
from splitserve.core.errors import ConfigError
from splitserve.core.versions import Versions
from splitserve.core.worker import KvFormat, KvPeer
from splitserve.kv.curve import Doorkeeper, fault_of_key, made_keys
from splitserve.kv.host import numeric_host
from splitserve.kv.layout import Shard, fault_of, format_difference
from splitserve.kv.liveness import ASKS_PER_SILENCE, Health, Liveness, Need
from splitserve.kv.messages import (
    MAX_MESSAGE_BYTES,
    SPOKEN,
    Codec,
    Goodbye,
    Hello,
    HelloReply,
    Malformed,
    Message,
    Ping,
    Pong,
    version_difference,
)
from splitserve.kv.news import ChannelBroke, News, PeerEnded, PeerRefused, PeerSilent, PeerUp, Received
from splitserve.kv.probe import Probe

_log = logging.getLogger(__name__)

QUEUED_MESSAGES = 1024  # per peer and direction; beyond it messages are dropped, and said again by whoever needs them
REMEMBERED_ENDED = 4096
GOODBYE_LINGER_MS = 200
TICKS_PER_INTERVAL = 4


@dataclass(slots=True)
class _Peer:
    peer: KvPeer
    socket: "zmq.Socket[bytes]"
    life: Liveness
    version: int
    shard: Shard | None = None
    address: bytes = b""
    fault: str = ""
    probe: Probe | None = None


@dataclass(slots=True)
class _Requests:
    """What other threads want of the control thread."""

    connect: deque[KvPeer] = field(default_factory=deque)
    expect: deque[KvPeer] = field(default_factory=deque)
    send: deque[tuple[str, Message]] = field(default_factory=deque)
    close: bool = False


class ControlChannel:
    """`on_news` is called on the control thread. `start` before anything else."""

    def __init__(
        self,
        uuid: str,
        kv: KvFormat,
        shard: Shard,
        address: bytes,
        settings: KvTransferSettings,
        on_news: Callable[[News], None],
        spoken: Versions = SPOKEN,
    ) -> None:
        self._spoken = spoken
        self._host = numeric_host(settings.host)
        self._uuid = uuid
        self._kv = kv
        self._shard = shard
        self._address = address
        self._settings = settings
        self._on_news = on_news
        self._codec = Codec(uuid, spoken)
        self._peers: dict[str, _Peer] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._requests = _Requests()
        self._expected: set[str] = set()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-control", daemon=True)
        self._context = zmq.Context(io_threads=1)
        self._keys = made_keys()
        self._doorkeeper = Doorkeeper(self._context, settings.peer_silent_s)
        self._inbox: zmq.Socket[bytes] = self._socket(zmq.PULL)
        self._endpoint = ""
        self.dropped: Counter[str] = Counter()

    # The owner's thread -----------------------------------------------------------------------------------------------
    def start(self) -> KvPeer:
        """Binds and starts. Raises ConfigError naming the host when it can't be bound."""
        if self._keys is not None:
            self._keys.listen(self._inbox)
        try:
            self._inbox.bind(f"tcp://{self._host}:0")
        except zmq.ZMQError as error:
            self._release()
            self._close_wake()
            raise ConfigError(
                "kv_transfer.host", f"can't listen on {self._settings.host!r}: {error.strerror}"
            ) from error
        port = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0").rpartition(":")[2]
        self._endpoint = f"tcp://{self._host}:{port}"
        self._thread.start()
        public_key = self._keys.public.decode() if self._keys is not None else ""
        return KvPeer(self._uuid, self._endpoint, self._shard.part, public_key, self._spoken)

    def connect(self, peer: KvPeer) -> None:
        """Says Hello, if that was not done yet; tells anew what is known of the peer."""
        self._requests.connect.append(peer)
        self._wake_up()

    def expect(self, peer: KvPeer) -> None:
        """Lets it in when it says Hello; says none itself. Called by the thread that calls `connect`."""
        if peer.uuid not in self._expected:
            self._expected.add(peer.uuid)
            self._requests.expect.append(peer)
            self._wake_up()

    def send(self, recipient: str, message: Message) -> None:
        """To a connected worker. Dropped and counted when there is no such worker or its queue is full."""
        self._requests.send.append((recipient, message))
        self._wake_up()

    def close(self) -> None:
        """Says Goodbye and ends the thread. Only when no WRITE of this worker is in flight: peers take it as proof."""
        if self._thread.is_alive():
            self._requests.close = True
            self._wake_up()
            self._thread.join(timeout=GOODBYE_LINGER_MS / 1000 + self._settings.peer_silent_s)
            self._close_wake()

    def _wake_up(self) -> None:
        if not self._closed:
            os.eventfd_write(self._wake, 1)

    def _close_wake(self) -> None:
        """Called by the owner's thread, once the control thread is over: a closed descriptor's number is used anew."""
        if not self._closed and not self._thread.is_alive():
            self._closed = True
            os.close(self._wake)

    # The control thread ----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            # The sockets stay open: a refused connection would tell peers that this process writes no more.
            _log.exception("the KV control channel broke")
            self._on_news(ChannelBroke(error))
        else:
            self._end()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._doorkeeper.socket, zmq.POLLIN)
        tick_s = self._settings.peer_silent_s / ASKS_PER_SILENCE / TICKS_PER_INTERVAL
        next_tick = time.monotonic()
        while not self._requests.close:
            now = time.monotonic()
            if now >= next_tick:
                self._tick(now)
                next_tick = now + tick_s
            ready = dict(poller.poll(math.ceil(max(0.0, next_tick - now) * 1000)))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            self._serve_requests()
            if self._doorkeeper.socket in ready:
                self._doorkeeper.answer(time.monotonic())
            if self._inbox in ready:
                self._receive_all()

    def _end(self) -> None:
        for uuid in list(self._peers):
            self._send(uuid, Goodbye())
        for peer in self._peers.values():
            _close(peer, GOODBYE_LINGER_MS)
        self._release()

    def _release(self) -> None:
        self._inbox.close(0)
        self._doorkeeper.close()
        self._context.term()

    def _serve_requests(self) -> None:
        while self._requests.expect:
            self._expect(self._requests.expect.popleft())
        while self._requests.connect:
            self._greet(self._requests.connect.popleft())
        while self._requests.send:
            self._send(*self._requests.send.popleft())

    def _receive_all(self) -> None:
        for _ in range(QUEUED_MESSAGES):  # Then let liveness have its turn.
            try:
                frame = self._inbox.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._receive(frame)

    def _receive(self, frame: zmq.Frame) -> None:
        try:
            sender, recipient, message = self._codec.decode(frame.bytes)
        except Malformed as error:
            self.dropped[error.kind] += 1
            return
        if self._keys is not None and frame.get("User-Id") != sender:
            self.dropped["in another worker's name"] += 1
        elif isinstance(message, Hello):
            self._on_hello(sender, recipient, message)
        elif recipient != self._uuid:
            self.dropped["for another worker"] += 1
        elif isinstance(message, HelloReply):
            self._on_reply(sender, message)
        else:
            self._on_message(sender, message)

    # Greeting --------------------------------------------------------------------------------------------------------
    def _expect(self, peer: KvPeer) -> None:
        if peer.uuid not in self._ended and not fault_of_key(peer, self._keys):
            self._doorkeeper.trust(peer)

    def _greet(self, peer: KvPeer) -> None:
        self._expect(peer)
        known = self._peers.get(peer.uuid)
        if peer.uuid in self._ended:
            self._on_news(PeerEnded(peer.uuid, self._ended[peer.uuid]))
        elif peer.uuid == self._uuid:
            self._on_news(PeerRefused(peer.uuid, "a worker can't claim KV from itself"))
        elif known is None:
            self._meet(peer)
        elif known.life.health is Health.ALIVE:
            self._tell_up(known)
        elif known.life.health is Health.REFUSED:
            self._on_news(PeerRefused(peer.uuid, known.fault))

    def _meet(self, peer: KvPeer) -> None:
        """A new peer: Hello at once, and a probe that proves quickly when nobody is there."""
        version = self._spoken.common(peer.control)
        fault = fault_of_key(peer, self._keys) or version_difference(self._spoken, peer.control)
        if fault or version is None:
            self._on_news(PeerRefused(peer.uuid, fault))
            return
        outbox = self._socket(zmq.PUSH)
        if self._keys is not None:
            self._keys.dial(outbox, peer)
        try:
            outbox.connect(peer.endpoint)
        except zmq.ZMQError as error:
            outbox.close(0)
            self._on_news(PeerRefused(peer.uuid, f"its endpoint {peer.endpoint!r} is not usable: {error.strerror}"))
            return
        now = time.monotonic()
        known = _Peer(peer, outbox, Liveness(self._settings.peer_silent_s, heard_at=now, asked_at=now), version)
        self._peers[peer.uuid] = known
        known.probe = Probe.start(peer.endpoint)
        self._send(peer.uuid, self._hello())

    def _on_hello(self, sender: str, recipient: str, hello: Hello) -> None:
        peer = self._doorkeeper.known(sender) or KvPeer(sender, hello.endpoint, hello.shard.part, control=hello.control)
        self._replace(sender, peer.endpoint)
        if sender in self._ended or sender == self._uuid:
            self.dropped["hello of an ended worker"] += 1
            return
        if sender not in self._peers:
            self._meet(peer)
        if sender in self._peers:
            fault = format_difference(self._kv, hello.kv) or fault_of(hello.shard, hello.kv)
            self._send(sender, HelloReply(recipient, self._kv, self._shard, self._address, fault))
            self._judge(sender, fault, hello)

    def _on_reply(self, sender: str, reply: HelloReply) -> None:
        if reply.asked != sender:
            self._peer_ended(reply.asked, "another worker answers at its endpoint")
        if sender in self._peers:
            fault = reply.refused or format_difference(self._kv, reply.kv) or fault_of(reply.shard, reply.kv)
            self._judge(sender, fault, reply)

    def _judge(self, uuid: str, fault: str, said: Hello | HelloReply) -> None:
        """What a Hello or its reply says of a peer: it fits, or which field does not."""
        peer = self._peers[uuid]
        peer.life.heard(time.monotonic())
        if fault:
            if peer.life.health is not Health.REFUSED:
                _log.warning("KV peer %s at %s refused: %s", uuid, peer.peer.endpoint, fault)
            peer.life.health, peer.fault = Health.REFUSED, fault
            self._on_news(PeerRefused(uuid, fault))
        elif peer.life.health is not Health.ALIVE or not peer.address:
            peer.life.health, peer.shard, peer.address = Health.ALIVE, said.shard, said.address
            self._tell_up(peer)

    def _tell_up(self, peer: _Peer) -> None:
        assert peer.shard is not None
        self._on_news(PeerUp(peer.peer.uuid, peer.shard, peer.address))

    def _hello(self) -> Hello:
        return Hello(self._endpoint, self._kv, self._shard, self._address, self._spoken)

    def _replace(self, uuid: str, endpoint: str) -> None:
        """A worker listens at this endpoint: whoever did before has ended."""
        for other in list(self._peers.values()):
            if other.peer.endpoint == endpoint and other.peer.uuid != uuid:
                self._peer_ended(other.peer.uuid, f"worker {uuid} listens at its endpoint now")

    # Everything else -------------------------------------------------------------------------------------------------
    def _on_message(self, sender: str, message: Message) -> None:
        peer = self._peers.get(sender)
        if peer is None or peer.life.health is Health.REFUSED:
            self.dropped["from an unknown worker"] += 1
            return
        if peer.life.heard(time.monotonic()):
            self._tell_up(peer)
        if isinstance(message, Ping):
            self._send(sender, Pong())
        elif isinstance(message, Goodbye):
            self._peer_ended(sender, "it said Goodbye")
        elif not isinstance(message, Pong):
            self._on_news(Received(sender, message))

    def _tick(self, now: float) -> None:
        self._doorkeeper.forget_gone(now)
        for peer in list(self._peers.values()):
            if peer.probe is not None and self._proves_the_end(peer):
                self._peer_ended(peer.peer.uuid, "its endpoint refuses connections")
                continue
            for need in peer.life.due(now):
                self._meet_need(peer, need)

    def _meet_need(self, peer: _Peer, need: Need) -> None:
        match need:
            case Need.ASK:
                greeting = peer.life.health is Health.GREETING
                self._send(peer.peer.uuid, self._hello() if greeting else Ping())
            case Need.PROBE:
                peer.probe = peer.probe or Probe.start(peer.peer.endpoint)
            case Need.FELL_SILENT:
                self._on_news(PeerSilent(peer.peer.uuid))

    def _proves_the_end(self, peer: _Peer) -> bool:
        assert peer.probe is not None
        if not peer.probe.finished:
            return False
        refused = peer.probe.refused
        peer.probe.close()
        peer.probe = None
        return refused

    def _peer_ended(self, uuid: str, proof: str) -> None:
        peer = self._peers.pop(uuid, None)
        if peer is None:
            return
        _close(peer, 0)
        self._doorkeeper.forget(uuid)
        self._ended[uuid] = proof
        while len(self._ended) > REMEMBERED_ENDED:
            self._ended.popitem(last=False)
        self._on_news(PeerEnded(uuid, proof))

    def _send(self, recipient: str, message: Message) -> None:
        peer = self._peers.get(recipient)
        if peer is None:
            self.dropped["to an unknown worker"] += 1
            return
        try:
            peer.socket.send(self._codec.encode(recipient, message, peer.version), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped["to a full queue"] += 1
        except Malformed as error:
            self.dropped[f"own {error.kind}"] += 1

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        """The one place that makes sockets to and from peers; what CURVE needs is set by `_meet` and `start`."""
        made: zmq.Socket[bytes] = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.IPV6, 1)
        made.setsockopt(zmq.HANDSHAKE_IVL, math.ceil(self._settings.peer_silent_s * 1000))
        made.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
        made.setsockopt(zmq.RCVHWM, QUEUED_MESSAGES)
        # Twice the limit, so that a message a little too long is counted here rather than cutting the connection.
        made.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
        return made


def _close(peer: _Peer, linger_ms: int) -> None:
    peer.socket.close(linger_ms)
    if peer.probe is not None:
        peer.probe.close()
