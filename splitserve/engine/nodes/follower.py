"""The end of every node but the first: it joins its leader, hears when the worker ends, and carries what ranks say."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self
from uuid import uuid4

import msgspec
import zmq

from splitserve.core.config import NodesSettings
from splitserve.core.errors import ConfigError, EngineError
from splitserve.engine.nodes.channel import BEAT_S, MOST_AT_ONCE, NEWS_S, events, prepare, where
from splitserve.engine.nodes.messages import Alive, Broke, Heard, Join, Leaving, Over, Refused, ToNode, Waiting, Welcome
from splitserve.kv.bridge import FromConnector, Outbox, ToConnector, wait_any
from splitserve.kv.curve import Keys
from splitserve.telemetry.logs import Logger

CLOSE_S = 5.0
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_UNREACHED = "it has not been reached yet"
_LEFT = "it was reached, and is gone"
_HANDSHAKE = "it was reached, but breaks the handshake off: this node's API key must be the leader's"


class FollowerEnd:
    """`host`: this node's, for people. `alike`: as the leader's. Callbacks come on this end's thread."""

    def __init__(self, settings: NodesSettings, host: str, alike: Mapping[str, str], keys: Keys | None) -> None:
        self._settings = settings
        self._join = Join(settings.rank, uuid4().hex, host, dict(alike))
        self._keys = keys
        self._logger = Logger("nodes")
        self._changed = threading.Condition()
        self._why = _UNREACHED
        self._uuid = ""
        self._refused: Refused | None = None
        self._over: Over | None = None
        self._closed = False
        self._heard_at = 0.0
        self._on_message: Callable[[ToConnector], None] = lambda message: None
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Its owner's threads ---------------------------------------------------------------------------------------------
    def join(self) -> str:
        """Until all nodes have joined: the worker's uuid, or "" if it is over before it began. Raises ConfigError if
        the leader refuses, EngineError if there is none in time."""
        until = time.monotonic() + self._settings.wait_s
        while time.monotonic() < until:
            with self._changed:
                left = min(NEWS_S, until - time.monotonic())
                self._changed.wait_for(
                    lambda: self._uuid or self._refused or self._over or self._closed, max(0.0, left)
                )
                if self._refused is not None:
                    raise ConfigError(self._refused.field, self._refused.message)
                if self._over is not None and self._over.failed:
                    raise EngineError(f"nodes: {self._over.reason}")
                if self._uuid or self._closed or self._over:
                    return self._uuid
            self._logger.info("waits for the worker's leader", node=self._settings.rank, why=self.waits)
        raise EngineError(f"nodes: {self.waits}, and has not begun within {self._settings.wait_s:g} s")

    @property
    def waits(self) -> str:
        """What for; "" once all nodes have joined."""
        return "" if self._uuid else f"the leader is to be at {where(self._settings)}: {self._why}"

    def listen(self, on_message: Callable[[ToConnector], None]) -> None:
        self._on_message = on_message

    def tell(self, message: FromConnector) -> None:
        self._outbox.put(message)

    def leave(self) -> None:
        """This node was told to end: the leader is asked to drain."""
        self._outbox.put(Leaving())

    def broke(self, reason: str) -> None:
        self._outbox.put(Broke(reason))

    def over_within(self, seconds: float | None) -> Over | None:
        """Why the worker ends, as soon as it does; None if it does not by then, or this end is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._closed, seconds)
            return self._over

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._outbox.close()
        self._thread.join(CLOSE_S)

    # This end's thread -----------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
                prepare(socket, self._keys, listens=False)
                socket.setsockopt(zmq.IMMEDIATE, 1)  # else every Join said so far waits for the connection
                monitor = socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED)
                try:
                    host = str(self._settings.leader)
                    socket.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{self._settings.port}")
                    self._serve(socket, monitor)
                finally:
                    socket.disable_monitor()
                    monitor.close(0)
        except Exception as error:
            self._logger.exception("the channel to the worker's leader broke", error)
            self._end(f"the channel to the leader broke: {error}")

    def _serve(self, socket: "zmq.Socket[bytes]", monitor: "zmq.Socket[bytes]") -> None:
        decoder: msgspec.msgpack.Decoder[ToNode] = msgspec.msgpack.Decoder(ToNode)
        beat_at = 0.0
        while not self._outbox.closed:
            wait_any(socket, monitor, outbox=self._outbox, timeout_s=BEAT_S)
            happened = list(events(monitor))  # before what was still said is heard
            for _ in range(MOST_AT_ONCE):
                if not socket.poll(0):
                    break
                self._hear(decoder.decode(socket.recv()))
            self._look(happened)
            now = time.monotonic()
            if now >= beat_at:
                beat_at = now + BEAT_S
                self._outbox.put(Alive() if self._uuid else self._join)
                if self._uuid and now - self._heard_at > self._settings.silent_s:
                    self._end(
                        f"the leader at {where(self._settings)} has said nothing for {self._settings.silent_s:g} s"
                    )
            self._send_all(socket)
        self._send_all(socket)

    def _look(self, happened: Iterable[tuple[int, int]]) -> None:
        for event, _ in happened:
            if event == zmq.EVENT_CONNECTED and self._why in (_UNREACHED, _LEFT):
                self._why = "it was reached, and has not answered"
            elif event & _HANDSHAKE_FAILED:
                self._why = _HANDSHAKE
            elif event == zmq.EVENT_DISCONNECTED and not self._uuid:
                self._why = self._why if self._why == _HANDSHAKE else _LEFT
            elif event == zmq.EVENT_DISCONNECTED:
                self._end(f"the leader at {where(self._settings)} is gone: its connection ended")

    def _hear(self, said: ToNode) -> None:
        self._heard_at = time.monotonic()
        match said:
            case Alive():
                return
            case Waiting():
                self._why = f"it waits for node {', '.join(map(str, said.missing))} too"
            case Over():
                self._outbox.put(Heard())
                self._end(f"the worker ends: {said.reason}", failed=said.failed)
            case Welcome():
                with self._changed:
                    self._uuid = said.uuid
                    self._changed.notify_all()
            case Refused():
                with self._changed:
                    self._refused = said
                    self._changed.notify_all()
            case _:
                self._on_message(said)

    def _end(self, reason: str, *, failed: bool = True) -> None:
        with self._changed:
            self._over = self._over or Over(reason, failed)
            self._changed.notify_all()

    def _send_all(self, socket: "zmq.Socket[bytes]") -> None:
        """What can't be sent now is dropped: a node that has no connection has no worker either."""
        for frame in self._outbox.take():
            try:
                socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                continue
