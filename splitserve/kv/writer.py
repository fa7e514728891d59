"""The WRITEs of one rank: which goes next, how much is in flight, which are overdue.

Owned by the transfer thread. A link (to one rank of another worker) has at most so many bytes in flight; what is due
beyond that waits here and goes by its claim's deadline, the earliest first, whoever came first. Not here: what a ticket
may do (`ledger.py`), what is due (`cursor.py`), or how bytes travel (`transport.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from splitserve.kv.cursor import Span
from splitserve.kv.layout import Slice
from splitserve.kv.source_ticket import SourceTicket
from splitserve.kv.ticket import Counters, LegKey
from splitserve.kv.transport import Transport, TransportError, WriteState

Failing = Callable[[SourceTicket, str, str, float], None]  # ticket, reason, sentence, now


@dataclass(slots=True, eq=False)
class _Write:
    link: "_Link"
    ticket: SourceTicket
    handle: object
    bytes: int
    posted_at: float
    stuck: bool = False


@dataclass(slots=True)
class _Link:
    """`due`: tickets that have something to write, and since when."""

    cut: Slice
    in_flight_bytes: int = 0
    due: dict[LegKey, tuple[SourceTicket, float]] = field(default_factory=dict)


class Writer:
    """`wrote(ticket, now)` and `failed` are called for every WRITE that ends; a WRITE in flight for longer than
    `stuck_s` fails its ticket once, and stays in flight until the transport lets go."""

    def __init__(
        self,
        transport: Transport,
        counters: Counters,
        most_in_flight_bytes: int,
        most_write_bytes: int,
        stuck_s: float,
        wrote: Callable[[SourceTicket, float], None],
        failed: Failing,
    ) -> None:
        self._transport = transport
        self._counters = counters
        self._most_in_flight_bytes = most_in_flight_bytes
        self._most_write_bytes = most_write_bytes
        self._stuck_s = stuck_s
        self._wrote = wrote
        self._failed = failed
        self._links: dict[str, _Link] = {}
        self._writes: list[_Write] = []
        self.in_flight_bytes = 0  # also read by other threads

    def link(self, peer: str, cut: Slice) -> None:
        """The peer can be written to from now on; again for the same peer is harmless."""
        self._links.setdefault(peer, _Link(cut))

    def unlink(self, peer: str) -> None:
        """The peer has ended; its WRITEs fail as the transport sees fit."""
        self._links.pop(peer, None)
        try:
            self._transport.disconnect(peer)
        except TransportError:
            self._counters.dropped["disconnect refused by the transport"] += 1  # polled until they end

    def slice_for(self, peer: str) -> Slice | None:
        link = self._links.get(peer)
        return link.cut if link is not None else None

    def push(self, ticket: SourceTicket, now: float) -> None:
        """Something may have become due for this ticket; writes what the link has room for."""
        link = self._links.get(ticket.peer)
        if link is None or not ticket.may_write or ticket.cursor is None:
            return
        if any(ticket.cursor.due(layer) for layer in ticket.cursor.layers):
            link.due.setdefault(ticket.key, (ticket, now))
            self._pump(link, now)

    def poll(self, now: float) -> None:
        """Looks after WRITEs in flight, then fills the room that ended ones have left."""
        writes, self._writes = self._writes, []
        for write in writes:
            state = self._transport.poll(write.handle)
            if state is WriteState.IN_FLIGHT:
                self._writes.append(write)
                self._watch(write, now)
            else:
                self._over(write, state, now)
        for link in list(self._links.values()):
            self._pump(link, now)

    @property
    def writing(self) -> bool:
        return bool(self._writes)

    @property
    def oldest_write_at(self) -> float:
        return self._writes[0].posted_at if self._writes else inf

    def _pump(self, link: _Link, now: float) -> None:
        while link.due and (cells := self._room(link)):
            ticket, since = min(link.due.values(), key=_urgency)
            layer, span = self._next(ticket, cells)
            if not span:
                del link.due[ticket.key]
                continue
            ticket.queued_s = max(ticket.queued_s, now - since)
            link.due[ticket.key] = (ticket, now)
            self._write(link, ticket, layer, span, now)

    def _room(self, link: _Link) -> int:
        """Cells that the next WRITE may have. A link with nothing in flight takes one, however large."""
        fit = (self._most_in_flight_bytes - link.in_flight_bytes) // link.cut.cell_bytes
        most = max(1, self._most_write_bytes // link.cut.cell_bytes)
        return max(min(fit, most), 0 if link.in_flight_bytes else 1)

    def _next(self, ticket: SourceTicket, most: int) -> tuple[int, Span]:
        """The due copies of its first layer that has any."""
        if ticket.may_write and ticket.cursor is not None:
            for layer in ticket.cursor.layers:
                if span := ticket.cursor.take(layer, most):
                    return layer, span
        return 0, Span((), ())

    def _write(self, link: _Link, ticket: SourceTicket, layer: int, span: Span, now: float) -> None:
        try:
            handle = self._transport.write(ticket.peer, layer - link.cut.first_layer, span.source, span.destination)
        except TransportError as error:
            link.due.pop(ticket.key, None)
            self._failed(ticket, "write", str(error), now)
            return
        size = len(span) * link.cut.cell_bytes
        ticket.in_flight += 1
        link.in_flight_bytes += size
        self.in_flight_bytes += size
        self._counters.writes += 1
        self._writes.append(_Write(link, ticket, handle, size, now))

    def _watch(self, write: _Write, now: float) -> None:
        if not write.stuck and now - write.posted_at > self._stuck_s:
            write.stuck = True
            self._failed(write.ticket, "stuck", f"a WRITE did not complete within {self._stuck_s:.1f} s", now)

    def _over(self, write: _Write, state: WriteState, now: float) -> None:
        ticket = write.ticket
        ticket.in_flight -= 1
        write.link.in_flight_bytes -= write.bytes
        self.in_flight_bytes -= write.bytes
        if state is WriteState.FAILED:
            self._failed(ticket, "write", "a WRITE failed; the decode worker may have ended", now)
            return
        ticket.wrote(write.bytes, now - write.posted_at, now)
        self._counters.bytes_written += write.bytes
        self._wrote(ticket, now)


def _urgency(due: tuple[SourceTicket, float]) -> tuple[float, float]:
    ticket, since = due
    return ticket.expires_at, since
