"""Node 0's end: it waits until all nodes have joined, says when one is gone, and carries what ranks on them say.

A thread of its own owns the socket. Which node a broken connection was is known by its descriptor, which both libzmq's
monitor and a message's origin name, so that a killed process is missed at once and a lost machine after `silent_s`.
"""

import errno
import ipaddress
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import msgspec
import zmq

from splitserve.core.config import NodesSettings
from splitserve.core.errors import ConfigError, EngineError, SplitserveError
from splitserve.engine.nodes.channel import BEAT_S, MOST_AT_ONCE, NEWS_S, events, prepare, where
from splitserve.engine.nodes.messages import Alive, Broke, FromNode, Heard, Join, Leaving, Over, ToNode
from splitserve.engine.nodes.roll import Member, Roll
from splitserve.kv.bridge import FromConnector, Outbox, wait_any
from splitserve.kv.curve import Keys
from splitserve.kv.host import numeric_host
from splitserve.telemetry.logs import Logger

CLOSE_S = 5.0
GOODBYE_S = 2.0  # that nodes get to say that they have heard
LEADER = "nodes.leader (--leader)"
_HANDSHAKE_FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

OnMessage = Callable[[FromConnector], None]
OnLost = Callable[[str], None]


class LeaderEnd:
    """`alike`: what must be the same on every node, by setting. Callbacks come on this end's thread; `on_lost` comes
    again every `BEAT_S` until this is closed."""

    def __init__(self, settings: NodesSettings, uuid: str, alike: Mapping[str, str], keys: Keys | None) -> None:
        self.settings = settings
        self._keys = keys
        self._logger = Logger("nodes")
        self._roll = Roll(settings.count, uuid, alike, settings.silent_s)
        self._changed = threading.Condition()
        self._lost = ""
        self._fault: SplitserveError | None = None  # why no node can join
        self._why = ""  # why it does not listen yet
        self._closed = False
        self._warn_at = 0.0
        self._over = Over("it ended", False)
        self._heard: set[bytes] = set()  # who knows that it is over
        self._on_message: OnMessage = lambda message: None
        self._on_lost: OnLost = lambda sentence: None
        self._on_leaving: Callable[[], object] = lambda: None
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(f"it failed: {error}" if error is not None else "")

    # Its owner's threads ---------------------------------------------------------------------------------------------
    def wait_for_all(self) -> bool:
        """Until all nodes have joined; False if closed meanwhile. Raises ConfigError if it can't listen, EngineError
        if some do not come in time."""
        until = time.monotonic() + self.settings.wait_s
        while time.monotonic() < until:
            with self._changed:
                left = min(NEWS_S, until - time.monotonic())
                self._changed.wait_for(lambda: self._roll.complete or self._closed or self._fault, max(0.0, left))
                if self._fault is not None:
                    raise self._fault
                if self._closed or self._roll.complete:
                    return not self._closed
            self._logger.info("waits for the worker's other nodes", at=where(self.settings), why=self.waits)
        raise EngineError(f"nodes: not all of the worker's nodes came within {self.settings.wait_s:g} s: {self.waits}")

    @property
    def waits(self) -> str:
        """What for; "" once all have joined."""
        if self._roll.complete:
            return ""
        missing = ", ".join(map(str, self._roll.missing))
        return "; ".join(filter(None, (self._why, f"node {missing} has not joined", self._roll.refused)))

    def listen(self, on_message: OnMessage, on_lost: OnLost) -> None:
        """From now on; what was lost before is told at once."""
        with self._changed:
            self._on_message, self._on_lost, lost = on_message, on_lost, self._lost
        if lost:
            on_lost(lost)

    def on_leaving(self, call: Callable[[], object]) -> None:
        """When another node was told to end."""
        self._on_leaving = call

    def tell(self, message: ToNode) -> None:
        """To every other node."""
        self._outbox.put(message)

    def lost_within(self, seconds: float) -> str:
        """The sentence that says which node is gone; "" if none is by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost, seconds)
            return self._lost

    def close(self, failure: str = "") -> None:
        """The other nodes end too. Called again it does nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            failure = failure or self._lost
            self._over = Over(failure or "its leader ended", bool(failure))
            self._changed.notify_all()
        self._outbox.close()
        self._thread.join(CLOSE_S)

    # This end's thread -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
                prepare(socket, self._keys, listens=True)
                if self._bound(socket):
                    self._serve(socket)
        except SplitserveError as error:
            self._fail(error)
        except Exception as error:
            self._logger.exception("the channel to the worker's other nodes broke", error)
            self._fail(EngineError(f"nodes: the channel to the other nodes broke: {error}"))
            self._lose(f"the channel to the worker's other nodes broke: {error}")

    def _fail(self, error: SplitserveError) -> None:
        with self._changed:
            self._fault = error
            self._changed.notify_all()

    def _bound(self, socket: "zmq.Socket[bytes]") -> bool:
        """A leader's name may not be known yet, or still be a former one's: tried until it is ours. Raises ConfigError
        for what waiting does not mend."""
        leader = str(self.settings.leader)
        while not self._outbox.closed:
            try:
                socket.bind(f"tcp://{numeric_host(leader)}:{self.settings.port}")
            except ConfigError as error:
                if _is_address(leader):
                    raise ConfigError(LEADER, error.message) from error
                self._why = error.message
            except zmq.ZMQError as error:
                self._why = f"can't listen on {where(self.settings)}: {error.strerror}"
                if error.errno == errno.EADDRINUSE:
                    raise ConfigError("nodes.port", f"{self._why}; choose another on all nodes") from error
                if error.errno != errno.EADDRNOTAVAIL or _is_address(leader):
                    sentence = f"{self._why}; it must be this machine's own, for this is node 0"
                    raise ConfigError(LEADER, sentence) from error
            else:
                self._why = ""
                return True
            wait_any(outbox=self._outbox, timeout_s=BEAT_S)
        return False

    def _serve(self, socket: "zmq.Socket[bytes]") -> None:
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED)
        beat_at = 0.0
        try:
            while not self._outbox.closed:
                wait_any(socket, monitor, outbox=self._outbox, timeout_s=BEAT_S)
                self._hear_all(socket, monitor)
                now = time.monotonic()
                if (member := self._roll.silent(now)) is not None and self._roll.remove(member):
                    self._gone(member, f"it has said nothing for {self.settings.silent_s:g} s")
                if now >= beat_at:
                    beat_at = now + BEAT_S
                    self._outbox.put(Alive())
                    if self._lost:
                        self._on_lost(self._lost)
                self._send_all(socket)
            self._outbox.put(self._over)
            self._send_all(socket)
            until = time.monotonic() + GOODBYE_S
            while (left := until - time.monotonic()) > 0 and not self._heard.issuperset(self._roll.identities):
                wait_any(socket, monitor, outbox=self._outbox, timeout_s=left)
                self._send_all(socket)
                self._hear_all(socket, monitor)
        finally:
            socket.disable_monitor()
            monitor.close(0)

    def _hear_all(self, socket: "zmq.Socket[bytes]", monitor: "zmq.Socket[bytes]") -> None:
        """What is said, and then who is gone: a node's last words come before its end."""
        gone = self._disconnected(monitor)
        for _ in range(MOST_AT_ONCE):
            if not socket.poll(0):
                break
            identity, *frames = socket.recv_multipart(copy=False)
            gone += self._disconnected(monitor)  # before this descriptor becomes another node's
            try:
                said = _decoder.decode(b"".join(frame.bytes for frame in frames))
            except msgspec.DecodeError as error:
                self._warn("unreadable message of a node dropped", str(error))
            else:
                self._hear(socket, identity.bytes, _connection(identity), said)
        for member in gone:
            if self._roll.remove(member):
                self._gone(member, "its connection ended")

    def _disconnected(self, monitor: "zmq.Socket[bytes]") -> list[Member]:
        found: list[Member] = []
        for event, value in events(monitor):
            if event != zmq.EVENT_DISCONNECTED:
                self._warn("somebody was not let in", "a node must have this worker's API key")
            elif (member := self._roll.by_connection(value)) is not None:
                found.append(member)
        return found

    def _hear(self, socket: "zmq.Socket[bytes]", identity: bytes, connection: int, said: FromNode) -> None:
        now = time.monotonic()
        self._roll.heard(identity, now)
        if isinstance(said, Join):
            self._join(socket, identity, connection, said, now)
        elif (member := self._roll.member(identity)) is None or isinstance(said, Alive):
            return
        elif isinstance(said, Heard):
            self._heard.add(identity)
        elif isinstance(said, Leaving):
            self._logger.info("a node was told to end", node=member.node, host=member.host)
            self._on_leaving()
        elif isinstance(said, Broke):
            self._lose(f"{member}: {said.reason}")
        else:
            self._on_message(said)

    def _join(self, socket: "zmq.Socket[bytes]", identity: bytes, connection: int, said: Join, now: float) -> None:
        refused = self._roll.refused
        with self._changed:
            replies = self._roll.join(identity, connection, said, now)
            self._changed.notify_all()
        if self._roll.refused != refused:
            self._logger.warning("node refused", reason=self._roll.refused)
        for to, reply in replies:
            socket.send_multipart([to, msgspec.msgpack.encode(reply)])

    def _warn(self, event: str, reason: str) -> None:
        """Of what strangers may bring about as often as they like."""
        now = time.monotonic()
        if now >= self._warn_at:
            self._warn_at = now + NEWS_S
            self._logger.warning(event, reason=reason)

    def _gone(self, member: object, why: str) -> None:
        if self._roll.complete:
            self._lose(f"{member} is gone: {why}")
        else:
            self._logger.info("a node that had joined is gone", node=str(member), why=why)

    def _lose(self, sentence: str) -> None:
        with self._changed:
            if self._lost or self._closed:
                return
            self._lost = f"{sentence}; a worker's nodes end together"
            on_lost = self._on_lost
            self._changed.notify_all()
        on_lost(self._lost)

    def _send_all(self, socket: "zmq.Socket[bytes]") -> None:
        for frame in self._outbox.take():
            for identity in self._roll.identities:
                socket.send_multipart([identity, frame])


_decoder: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)


def _connection(frame: zmq.Frame) -> int:
    return int(frame.get(zmq.SRCFD))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
