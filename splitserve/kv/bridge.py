"""Between an engine adapter and the connector halves that vLLM builds inside it, perhaps in other processes.

vLLM constructs the connector itself, once in the scheduler's process and once per rank, and offers no way back. So the
adapter listens on a ZeroMQ socket in a private directory and names it in the connector's configuration; each half
connects to it. Messages are msgspec; each socket is used by one thread. The adapter's side runs on a thread of its own.
Where the engine spans machines, each has such a socket, and `engine/nodes` carries what it hears to node 0's adapter.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import zmq

from splitserve.core.worker import KvCounts, KvFormat, KvPeer, Pace, TransferStats

LINGER_MS = 500
REPORT_S = 0.25


class Started(msgspec.Struct, tag="started", frozen=True):
    """A rank's worker half registered its memory and listens for peers."""

    rank: int
    format: KvFormat
    peer: KvPeer


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """One side of a transfer ended at a rank; `reason` and `error` are empty on success."""

    rank: int
    transfer_id: str
    epoch: int
    source_side: bool
    stats: TransferStats
    reason: str
    error: str


class Held(msgspec.Struct, tag="held", frozen=True):
    """What a rank's transfer service holds and has counted: told in the step that changes the blocks, and of all else
    within `REPORT_S`."""

    rank: int
    pinned_blocks: int  # blocks that outlive their request
    quarantined_blocks: int
    in_flight_bytes: int
    counts: KvCounts


class Free(msgspec.Struct, tag="free", frozen=True):
    """Blocks that the scheduler could hand out now."""

    blocks: int


class Preempted(msgspec.Struct, tag="preempted", frozen=True):
    """Requests that lost their blocks and are computed anew, since the scheduler started."""

    requests: int


class Paced(msgspec.Struct, tag="paced", frozen=True):
    """How the scheduler's decodes stand."""

    pace: Pace


class Armed(msgspec.Struct, tag="armed", frozen=True):
    """The scheduler half knows that this job is to be handed over; its blocks stay when it is aborted."""

    job_id: str


class Connect(msgspec.Struct, tag="connect", frozen=True):
    peers: list[KvPeer]


class HandOver(msgspec.Struct, tag="hand_over", frozen=True):
    """A running job's KV may be claimed under this ticket: what is computed now, or with `at_end` all of it, once the
    job is aborted."""

    job_id: str
    transfer_id: str
    epoch: int
    destination: tuple[KvPeer, ...]
    at_end: bool


FromConnector = Started | Ended | Held | Free | Preempted | Paced | Armed
ToConnector = Connect | HandOver
OnMessage = Callable[[FromConnector], None]


class Outbox:
    """What a socket's thread is to send. `put` may be called by any thread and rings the bell that the socket's thread
    polls; a closed one takes nothing more."""

    def __init__(self) -> None:
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.closed = False
        self._frames: deque[bytes] = deque()

    def put(self, message: msgspec.Struct) -> None:
        self._frames.append(msgspec.msgpack.encode(message))
        os.eventfd_write(self.bell, 1)

    def close(self) -> None:
        self.closed = True
        os.eventfd_write(self.bell, 1)

    def take(self) -> Iterator[bytes]:
        """What there is now; for what is put meanwhile the bell rings again."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.bell)
        for _ in range(len(self._frames)):
            yield self._frames.popleft()


class AdapterEnd:
    """The adapter's end: calls `on_message` from its own thread; `tell` reaches every half that has spoken."""

    def __init__(self, on_message: OnMessage) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="splitserve-")
        self.address = self.beside("bridge")
        self._on_message = on_message
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._run, name="kv-bridge", daemon=True)
        self._thread.start()

    def beside(self, name: str) -> str:
        """Another address in the private directory."""
        return f"ipc://{Path(self._directory.name) / name}"

    def tell(self, message: ToConnector) -> None:
        self._outbox.put(message)

    def close(self) -> None:
        self._outbox.close()
        self._thread.join(timeout=5)
        self._directory.cleanup()

    def _run(self) -> None:
        decoder: msgspec.msgpack.Decoder[FromConnector] = msgspec.msgpack.Decoder(FromConnector)
        halves: set[bytes] = set()
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.bind(self.address)
            while not self._outbox.closed:
                wait_any(socket, outbox=self._outbox)
                while socket.poll(0):
                    half, payload = socket.recv_multipart()
                    halves.add(half)
                    self._on_message(decoder.decode(payload))
                for frame in self._outbox.take():
                    for half in halves:
                        socket.send_multipart([half, frame])


class ConnectorEnd:
    """A connector half's end. `tell` may be called by any thread; `on_message` is called from this end's thread, and so
    is `report`, every `REPORT_S`."""

    def __init__(
        self, address: str, on_message: Callable[[ToConnector], None], report: Callable[[], None] | None = None
    ) -> None:
        self._address = address
        self._on_message = on_message
        self._report = report
        self._report_at = 0.0
        self._outbox = Outbox()
        self._thread = threading.Thread(target=self._run, name="kv-bridge", daemon=True)
        self._thread.start()

    def tell(self, message: FromConnector) -> None:
        self._outbox.put(message)

    def close(self) -> None:
        self._outbox.close()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        decoder: msgspec.msgpack.Decoder[ToConnector] = msgspec.msgpack.Decoder(ToConnector)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = LINGER_MS
            socket.connect(self._address)
            while not self._outbox.closed:
                wait_any(socket, outbox=self._outbox, timeout_s=None if self._report is None else REPORT_S)
                while socket.poll(0):
                    self._on_message(decoder.decode(socket.recv()))
                self._report_if_due(time.monotonic())
                for frame in self._outbox.take():
                    socket.send(frame)

    def _report_if_due(self, now: float) -> None:
        if self._report is not None and now >= self._report_at:
            self._report_at = now + REPORT_S
            self._report()


def wait_any(*sockets: "zmq.Socket[bytes]", outbox: Outbox, timeout_s: float | None = None) -> None:
    """Until there is something to hear or to tell."""
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    poller.register(outbox.bell, zmq.POLLIN)
    poller.poll(None if timeout_s is None else int(timeout_s * 1000))
