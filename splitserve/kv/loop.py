"""The transfer thread: everything that happens on it, one turn after another.

It owns the transport, both sides of the ledger and the outlet. Work comes through the inbox: calls of engine threads
and news of the control thread. It sleeps while nothing is open; it polls while WRITEs are in flight, and while peers
may be writing here, for some transports move their bytes only then.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from math import inf

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import KvFormat
from splitserve.kv.control import ControlChannel
from splitserve.kv.destination import DestinationSide
from splitserve.kv.layout import Shard, slice_between
from splitserve.kv.messages import Cancel, Cancelled, Done, Failed, Message, Progress, Register
from splitserve.kv.news import ChannelBroke, News, PeerEnded, PeerRefused, PeerSilent, PeerUp, Received
from splitserve.kv.outlet import Outlet
from splitserve.kv.source import SourceSide
from splitserve.kv.ticket import Counters, Offer, OnEvent, Table
from splitserve.kv.transport import Fence, Transport, TransportError

_log = logging.getLogger(__name__)

WRITE_POLL_S = 0.0002  # While WRITEs are young.
CLAIM_POLL_S = 0.001  # While peers may be writing here.
CALM_POLL_S = 0.02  # When what is awaited is late.
CALM_AFTER_S = 1.0
GREETING_S = 3.0  # A transport's first contact needs both sides' help for so long.
EXPIRE_S = 0.05
IDLE_S = 60.0
RETRIES_PER_SILENCE = 5
QUEUED_NEWS = 65_536
CANCEL_TIMEOUT_S = 2.0  # How long a closing worker waits for its sources to stop,
WRITES_TIMEOUT_S = 10.0  # and for its own WRITEs to end.

Command = Callable[[float], None]  # called on the transfer thread with the time


class Inbox:
    """Commands for the transfer thread, in order. Any thread puts; `pending` counts until each is carried out."""

    def __init__(self) -> None:
        self._commands: deque[Command] = deque()
        self._wake = threading.Event()
        self._open = True

    def put(self, command: Command) -> None:
        if self._open:
            self._commands.append(command)
            self._wake.set()

    def run(self, now: float) -> None:
        """Carries out what is there. A command stays in the queue until it is done, so that `pending` has no gap."""
        for _ in range(len(self._commands)):
            self._commands[0](now)
            self._commands.popleft()

    def wait(self, timeout_s: float) -> None:
        if self._wake.wait(timeout_s):
            self._wake.clear()

    def close(self) -> None:
        self._open = False
        self._commands.clear()

    @property
    def pending(self) -> int:
        return len(self._commands)


class TransferLoop:
    """Made and run on the transfer thread."""

    def __init__(
        self,
        uuid: str,
        transport: Transport,
        kv: KvFormat,
        shard: Shard,
        settings: KvTransferSettings,
        on_event: OnEvent,
        inbox: Inbox,
    ) -> None:
        self._transport = transport
        self._kv = kv
        self._shard = shard
        self._inbox = inbox
        self.counters = Counters()
        self.control = ControlChannel(uuid, kv, shard, transport.address, settings, self._hear)
        self.outlet = Outlet(self.control.send, on_event, self.counters)
        retry_s = settings.peer_silent_s / RETRIES_PER_SILENCE
        self.source = SourceSide(transport, self.outlet, shard, settings)
        self.destination = DestinationSide(self.outlet, shard.part, self.control.connect, retry_s, self._land)
        self._stop_by = inf
        self._greeting_until = 0.0
        self._expire_at = 0.0
        self.peer = self.control.start()

    def run(self) -> None:
        """Returns when `stop` was carried out."""
        while not self._stopped(time.monotonic()):
            self._turn()
            self._inbox.wait(self._pause_s(time.monotonic()))
        self._inbox.close()
        self._end()

    def offer(self, offer: Offer, now: float) -> None:
        """A command: the destination's ranks may say Hello from now on, if nobody introduced them before."""
        for peer in offer.destination:
            self.control.expect(peer)
        self.source.offer(offer, now)

    def stop(self, now: float) -> None:
        """A command: ends every transfer, then the loop."""
        self._stop_by = now + WRITES_TIMEOUT_S
        self.source.stop(now)
        self.destination.stop(now)

    def _turn(self) -> None:
        self._inbox.run(time.monotonic())
        if self.source.writing:
            self.source.poll(time.monotonic())
        if self.destination.landing:
            self.destination.poll()
        if self.destination.open_claims or time.monotonic() < self._greeting_until:
            self._progress()
        now = time.monotonic()
        if now >= self._expire_at:
            self._expire_at = now + EXPIRE_S
            self.source.expire(now)
            self.destination.expire(now)

    def _progress(self) -> None:
        try:
            self._transport.progress()
        except TransportError as error:
            # One peer's trouble; its own claims end by what the control channel learns of it.
            self.outlet.dropped("progress refused by the transport")
            _log.warning("%s", error)

    def _land(self, tables: Sequence[Table]) -> Fence | None:
        return self._transport.land([tables[group].blocks for group in self._shard.groups])

    def _pause_s(self, now: float) -> float:
        if self._inbox.pending:
            return 0.0
        if self.source.writing:
            return WRITE_POLL_S if now - self.source.oldest_write_at < CALM_AFTER_S else CALM_POLL_S
        if self.destination.landing:
            return WRITE_POLL_S
        if self.destination.awaits_bytes or now < self._greeting_until:
            return CLAIM_POLL_S
        if self.destination.open_claims:
            return CALM_POLL_S
        return EXPIRE_S if self.source.open_tickets or self._stop_by < inf else IDLE_S

    # News of peers ---------------------------------------------------------------------------------------------------
    def _hear(self, news: News) -> None:
        """Called on the control thread."""
        if self._inbox.pending < QUEUED_NEWS or not isinstance(news, Received):
            self._inbox.put(partial(self._on_news, news))
        else:
            self.control.dropped["beyond the inbox"] += 1

    def _on_news(self, news: News, now: float) -> None:
        match news:
            case Received():
                self._on_message(news.sender, news.message, now)
            case PeerUp():
                self._peer_up(news, now)
            case PeerRefused():
                self.destination.peer_refused(news.uuid, news.message, now)
            case PeerSilent():
                self.destination.peer_silent(news.uuid, now)
            case PeerEnded():
                _log.info("KV peer %s has ended: %s", news.uuid, news.proof)
                self.source.peer_ended(news.uuid, now)
                self.destination.peer_ended(news.uuid, now)
            case ChannelBroke():
                raise TransportError(f"the KV control channel broke: {news.error!r}") from news.error

    def _on_message(self, sender: str, message: Message, now: float) -> None:
        match message:
            case Register():
                self.source.on_register(sender, message, now)
            case Cancel():
                self.source.on_cancel(sender, message, now)
            case Progress() | Done() | Failed() | Cancelled():
                self.destination.on_message(sender, message, now)

    def _peer_up(self, news: PeerUp, now: float) -> None:
        cut = slice_between(self._shard, news.shard, self._kv)
        try:
            if cut is not None:
                self._transport.connect(news.uuid, news.address, cut)
        except TransportError as error:
            _log.warning("KV peer %s can't be written to: %s", news.uuid, error)
            self.destination.peer_refused(news.uuid, str(error), now)
            return
        self._greeting_until = now + GREETING_S
        self.source.peer_up(news.uuid, cut, now)
        self.destination.peer_up(news.uuid, now)

    # The end ---------------------------------------------------------------------------------------------------------
    def _stopped(self, now: float) -> bool:
        """Nothing is written by us any more, nor to us as far as peers answer in time."""
        stopping_s = WRITES_TIMEOUT_S - (self._stop_by - now)
        if stopping_s < 0 or self._stop_by == inf:
            return False
        claims_over = not self.destination.open_claims or stopping_s > CANCEL_TIMEOUT_S
        return now >= self._stop_by or (claims_over and not self.source.writing)

    def _end(self) -> None:
        if self.source.writing:
            _log.error(
                "WRITEs do not end; the KV endpoint stays open until this process ends, so that peers keep waiting"
            )
            return
        self.control.close()
        self._transport.close()
