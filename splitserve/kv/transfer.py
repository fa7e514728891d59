"""The transfer service of one rank of a worker: claims, WRITEs and their fences.

One thread (the transfer thread, `loop.py`) owns the transport and the ledger; the control channel has a thread of its
own. Engine threads call the methods below, which only enqueue and never block (`start`, `drain` and `close` excepted).
"""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from splitserve.core.config import KvTransferSettings
from splitserve.core.errors import SplitserveError
from splitserve.core.worker import KvFormat, KvPeer
from splitserve.kv.layout import Shard
from splitserve.kv.loop import CANCEL_TIMEOUT_S, WRITES_TIMEOUT_S, Command, Inbox, TransferLoop
from splitserve.kv.ticket import Claim, Counters, Offer, OnEvent, Results, Table, TransferEnded, TransferKey
from splitserve.kv.transport import Fence, Transport, TransportError

__all__ = [
    "Claim",
    "Counters",
    "Offer",
    "OnEvent",
    "Results",
    "Table",
    "TransferEnded",
    "TransferKey",
    "TransferService",
]

START_TIMEOUT_S = 60.0


class TransferService:
    """See the module's docstring. `transport_factory` is called on the transfer thread, and so is `on_event`, which
    must not block. `start` comes first, `close` last; or use it as a context manager."""

    def __init__(
        self,
        uuid: str,
        transport_factory: Callable[[], Transport],
        kv: KvFormat,
        shard: Shard,
        settings: KvTransferSettings,
        on_event: OnEvent,
    ) -> None:
        self._uuid = uuid
        self._transport_factory = transport_factory
        self._kv = kv
        self._shard = shard
        self._settings = settings
        self._on_event = on_event
        self._inbox = Inbox()
        self._made = threading.Event()
        self._loop: TransferLoop | None = None
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)

    def start(self) -> KvPeer:
        """Makes the transport and binds the control channel. Raises TransportError or ConfigError when it can't."""
        self._thread.start()
        if not self._made.wait(START_TIMEOUT_S):
            raise TransportError(f"the KV transport did not start within {START_TIMEOUT_S:.0f} s")
        if self._fault is not None:
            raise self._fault
        return self.peer

    @property
    def peer(self) -> KvPeer:
        """This worker's control channel; known once started."""
        return self._running.peer

    # Source side -----------------------------------------------------------------------------------------------------
    def offer(self, offer: Offer) -> None:
        """A prefill was accepted. Its claim may have come already, or come later within the lease."""
        self._do(lambda now: self._running.offer(offer, now))

    def computing(
        self, key: TransferKey, tables: Sequence[Sequence[int]], tokens: int, fence: Fence | None = None
    ) -> None:
        """Before a forward: the prefill's absolute block table so far in each group. The first `tokens` tokens are
        computed in every layer (prefix hits, earlier chunks) once `fence` and all fences before it are passed."""
        known = tuple(map(tuple, tables))
        self._do(lambda now: self._running.source.computing(key, known, tokens, fence, now))

    def computed(self, layer: int, tokens: Sequence[tuple[TransferKey, int]], fence: Fence | None = None) -> None:
        """After a layer of the forward: for each prefill how many of its tokens are computed in this layer, once
        `fence` says so (asked on the transfer thread; none: now) and all fences before it. Layers count over the whole
        model."""
        counts = tuple(tokens)
        self._do(lambda now: self._running.source.computed(layer, counts, fence, now))

    def prefill_ended(self, key: TransferKey) -> None:
        """The prompt is computed. Blocks stay until `Results.sent` names the key; the lease starts now if unclaimed."""
        ended_at = time.monotonic()
        self._do(lambda now: self._running.source.prefill_ended(key, ended_at, now))

    def prefill_aborted(self, key: TransferKey) -> None:
        """The prefill won't finish: stop, tell the destination Failed, then name the key in `Results.sent`."""
        self._do(lambda now: self._running.source.prefill_aborted(key, now))

    def drain(self, keys: Sequence[TransferKey], timeout_s: float = 5.0) -> None:
        """Blocks until no WRITE reads these prefills' blocks (they were preempted; `computing` comes anew). Raises
        TransportError when a WRITE does not end in time: the blocks must not be reused then."""
        preempted, over = tuple(keys), threading.Event()
        self._do(lambda now: self._running.source.drain(preempted, over))
        if not over.wait(timeout_s):
            self._check()
            raise TransportError(f"WRITEs of preempted prefills did not end within {timeout_s:.1f} s")

    # Destination side ------------------------------------------------------------------------------------------------
    def claim(self, claim: Claim) -> None:
        """Blocks are allocated: ask the source to write them."""
        self._do(lambda now: self._running.destination.claim(claim, now))

    def abandon(self, key: TransferKey) -> None:
        """The request ended early. `Results.released` names the key once nobody can write its blocks."""
        self._do(lambda now: self._running.destination.abandon(key, now))

    # Both ------------------------------------------------------------------------------------------------------------
    def connect(self, peers: Sequence[KvPeer]) -> None:
        """Says Hello to peers so that the first transfer finds a connected pair."""
        for peer in peers:
            if peer.uuid != self._uuid:
                self._do(partial(self._connect, peer))

    def take_results(self) -> Results:
        """What happened since the last call; called by the engine thread on every step. Raises TransportError when the
        transfer thread has broken: nothing is fenced any more, the process must end."""
        self._check()
        return self._running.outlet.take()

    @property
    def busy(self) -> bool:
        """True while any result may still come: the engine must keep stepping."""
        running = self._running
        owed = running.source.owed or running.destination.open_claims
        return bool(self._inbox.pending or owed or running.outlet.waiting)

    @property
    def quarantined_blocks(self) -> int:
        """Destination blocks of abandoned claims whose source has not answered."""
        return self._running.destination.quarantined_blocks

    @property
    def pinned_blocks(self) -> int:
        """Source blocks of ended prefills that are not sent yet."""
        return self._running.source.pinned_blocks

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of WRITEs that have not ended."""
        return self._running.source.in_flight_bytes

    @property
    def connected(self) -> frozenset[str]:
        """The uuids of workers that said Hello, fit and answer."""
        return self._running.destination.up

    @property
    def counters(self) -> Counters:
        """A copy of what has happened so far."""
        counted = self._running.counters.copy()
        counted.dropped.update(dict(self._running.control.dropped))  # copied: the control thread adds to it
        return counted

    def close(self) -> None:
        """Ends every transfer, waits for WRITEs in flight, says Goodbye to peers."""
        if self._loop is not None and self._thread.is_alive():
            self._do(self._loop.stop)
            self._thread.join(CANCEL_TIMEOUT_S + WRITES_TIMEOUT_S + self._settings.peer_silent_s)

    def __enter__(self) -> "TransferService":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Below: the thread -----------------------------------------------------------------------------------------------
    @property
    def _running(self) -> TransferLoop:
        assert self._loop is not None, "start() comes first"
        return self._loop

    def _connect(self, peer: KvPeer, _now: float) -> None:
        self._running.control.connect(peer)

    def _do(self, command: Command) -> None:
        self._inbox.put(command)

    def _check(self) -> None:
        if self._fault is not None:
            raise TransportError(f"the KV transfer thread broke: {self._fault!r}") from self._fault

    def _run(self) -> None:
        try:
            self._loop = self._make_loop()
            self._made.set()
            self._loop.run()
        except Exception as error:
            # Kept for the engine thread, which raises it: this thread has no caller.
            self._fault = error
            self._made.set()

    def _make_loop(self) -> TransferLoop:
        transport = self._transport_factory()
        try:
            return TransferLoop(
                self._uuid, transport, self._kv, self._shard, self._settings, self._on_event, self._inbox
            )
        except SplitserveError:
            transport.close()
            raise
