"""Between an engine adapter and the connector halves that vLLM builds inside it, perhaps in other processes.

vLLM constructs the connector itself, once in the scheduler's process and once per rank, and offers no way back. So the
adapter listens on a ZeroMQ socket in a private directory and names it in the connector's configuration; each half
connects to it. Messages are msgspec; each socket is used by one thread. The adapter's side runs on a thread of its own.
"""

import contextlib
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from splitserve.core.worker import KvFormat, KvPeer, TransferStats
from splitserve.kv.transfer import TransferEnded, TransferKey

POLL_MS = 100


class Started(msgspec.Struct, tag="started", frozen=True):
    """The worker half registered its memory and listens for peers. `peer` is empty where the stock connector does."""

    format: KvFormat
    peer: KvPeer


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """One side of a transfer ended; `error` is empty on success."""

    transfer_id: str
    epoch: int
    source_side: bool
    stats: TransferStats
    error: str


class Held(msgspec.Struct, tag="held", frozen=True):
    """Blocks that outlive their request."""

    pinned_blocks: int
    quarantined_blocks: int


class Free(msgspec.Struct, tag="free", frozen=True):
    """Blocks that the scheduler could hand out now."""

    blocks: int


class Connect(msgspec.Struct, tag="connect", frozen=True):
    peers: list[KvPeer]


FromConnector = Started | Ended | Held | Free
OnMessage = Callable[[FromConnector], None]


class AdapterEnd:
    """The adapter's end: calls `on_message` from its own thread; `connect_peers` reaches every worker half."""

    def __init__(self, on_message: OnMessage) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="splitserve-")
        self.address = f"ipc://{Path(self._directory.name) / 'bridge'}"
        self._on_message = on_message
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-bridge", daemon=True)
        self._thread.start()

    def connect_peers(self, peers: Sequence[KvPeer]) -> None:
        self._outbox.put(msgspec.msgpack.encode(Connect(list(peers))))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._directory.cleanup()

    def _run(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromConnector)
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.linger = 0
            socket.bind(self.address)
            halves: set[bytes] = set()
            while not self._stop.is_set():
                if socket.poll(POLL_MS):
                    half, payload = socket.recv_multipart()
                    message = decoder.decode(payload)
                    if isinstance(message, Started):
                        halves.add(half)
                    self._on_message(message)
                self._flush(socket, halves)

    def _flush(self, socket: "zmq.Socket[bytes]", halves: set[bytes]) -> None:
        with contextlib.suppress(queue.Empty):
            while halves:
                payload = self._outbox.get_nowait()
                for half in halves:
                    socket.send_multipart([half, payload])


class ConnectorEnd:
    """A connector half's end. `tell` may be called by any thread; `on_peers` is called from this end's thread."""

    def __init__(self, address: str, on_peers: Callable[[Sequence[KvPeer]], None] | None = None) -> None:
        self._address = address
        self._on_peers = on_peers
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv-bridge", daemon=True)
        self._thread.start()

    def tell(self, message: FromConnector) -> None:
        self._outbox.put(msgspec.msgpack.encode(message))

    def tell_ended(self, event: TransferEnded) -> None:
        key: TransferKey = event.key
        self.tell(Ended(key.transfer_id, key.epoch, event.source_side, event.stats, event.error))

    def close(self) -> None:
        self._outbox.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        decoder = msgspec.msgpack.Decoder(Connect)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 500
            socket.connect(self._address)
            while True:
                with contextlib.suppress(queue.Empty):
                    payload = self._outbox.get(timeout=POLL_MS / 1000)
                    if payload is None:
                        return
                    socket.send(payload)
                while socket.poll(0):
                    peers = decoder.decode(socket.recv()).peers
                    if self._on_peers is not None:
                        self._on_peers(peers)
