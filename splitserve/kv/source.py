"""The source side: carries out what the ledger's source table says, with WRITEs through the transport.

Owned by the transfer thread, which passes the time in. Not here: when a message is believed to come from its sender
(`control.py`), or how bytes travel (`transport.py`).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from splitserve.core.worker import KvFormat
from splitserve.kv.cursor import Cursor
from splitserve.kv.layout import Span
from splitserve.kv.ledger import (
    AWAITS_QUIET,
    EARLY,
    FORGETTABLE,
    MAY_WRITE,
    OWES_SENT,
    SOURCE,
    Ledger,
    SourceAction,
    SourceEvent,
    SourceState,
    step,
)
from splitserve.kv.messages import Cancel, Done, Failed, Progress, Register
from splitserve.kv.outlet import Outlet
from splitserve.kv.source_ticket import Answer, SourceTicket, claim_digest, mismatch, verdict
from splitserve.kv.ticket import Offer, TransferKey
from splitserve.kv.transport import Transport, TransportError, WriteState

MOST_ENDED = 4096  # Remembered to answer duplicates; a claim repeated later than that fails at its deadline instead.
MOST_EARLY = 4096  # Claims waiting for their offer; a router sends both within milliseconds.
LONGEST_CLAIM_S = 86_400.0
PROGRESS_S = 0.5


@dataclass(slots=True, eq=False)
class _Write:
    ticket: SourceTicket
    handle: object
    bytes: int
    posted_at: float
    stuck: bool = False


@dataclass(slots=True)
class _Drain:
    tickets: list[SourceTicket]
    over: threading.Event


class SourceSide:
    """`stuck_s`: a WRITE in flight for longer fails its ticket. Its blocks stay pinned until the transport lets go."""

    def __init__(self, transport: Transport, outlet: Outlet, kv: KvFormat, lease_s: float, stuck_s: float) -> None:
        self._transport = transport
        self._outlet = outlet
        self._kv = kv
        self._lease_s = lease_s
        self._stuck_s = stuck_s
        self._ledger: Ledger[SourceTicket] = Ledger(MOST_ENDED)
        self._writes: list[_Write] = []
        self._drains: list[_Drain] = []
        self.pinned_blocks = 0
        self.owed = 0  # offered prefills that `Results.sent` has yet to name

    # What the engine calls -------------------------------------------------------------------------------------------
    def offer(self, offer: Offer, now: float) -> None:
        ticket = self._ticket(offer.key)
        if ticket.state in EARLY and ticket.destination != offer.destination.uuid:
            self._outlet.dropped("message from another worker")
            ticket = SourceTicket(offer.key, Cursor(self._kv.layers))
        ticket.offer, ticket.destination = offer, offer.destination.uuid
        fault = mismatch(offer, ticket.register) if ticket.register is not None else None
        event = SourceEvent.OFFER_MISMATCH if fault else SourceEvent.OFFER
        self._fire(ticket, event, now, fault)

    def computing(self, key: TransferKey, table: Sequence[int], ready: int, now: float) -> None:
        ticket = self._ledger.get(key)
        if ticket is None:
            self._outlet.dropped("own computing")
            return
        ticket.cursor.computing(table, ready)
        self._catch_up(ticket, now)

    def computed(self, layer: int, ready: Sequence[tuple[TransferKey, int]], now: float) -> None:
        for key, blocks in ready:
            ticket = self._ledger.get(key)
            if ticket is not None:
                ticket.cursor.computed(layer, blocks)
                self._push(ticket, layer, now)
                self._conclude(ticket, now)

    def prefill_ended(self, key: TransferKey, ended_at: float, now: float) -> None:
        ticket = self._ticket(key)
        ticket.prefill_ended_at = ended_at
        ticket.cursor.computing(ticket.cursor.table, len(ticket.cursor.table))
        self._fire(ticket, SourceEvent.PREFILL_ENDED, now, ticket.failure("unknown", "this prefill was never offered"))

    def prefill_aborted(self, key: TransferKey, now: float) -> None:
        ticket = self._ticket(key)
        self._fire(ticket, SourceEvent.PREFILL_ABORTED, now, ticket.failure("aborted", "the prefill was aborted"))

    def drain(self, keys: Sequence[TransferKey], over: threading.Event) -> None:
        """Stops WRITEs of these prefills; `over` is set when none is in flight."""
        tickets = [ticket for key in keys if (ticket := self._ledger.get(key)) is not None]
        for ticket in tickets:
            ticket.cursor.preempted()
        self._drains.append(_Drain(tickets, over))
        self._end_drains()

    # What peers say --------------------------------------------------------------------------------------------------
    def on_register(self, sender: str, message: Register, now: float) -> None:
        ticket = self._ticket(message.key)
        if not self._from_destination(ticket, sender):
            return
        if ticket.state is SourceState.ABSENT and len(self._ledger) - self.owed >= MOST_EARLY:
            self._outlet.dropped("register beyond the limit")
            return
        if ticket.claimed and ticket.claimed != claim_digest(message):
            self._claimed_before(ticket, message)
            return
        fault = mismatch(ticket.offer, message) if ticket.offer is not None else None
        if fault is not None and step(SOURCE, ticket.state, SourceEvent.REGISTER_MISMATCH):
            self._fire(ticket, SourceEvent.REGISTER_MISMATCH, now, fault)
            return
        if not ticket.claimed:
            self._accept(ticket, sender, message, now)
        self._fire(ticket, SourceEvent.REGISTER, now, ticket.failure("unknown", "the claim came after the end"))

    def on_cancel(self, sender: str, message: Cancel, now: float) -> None:
        ticket = self._ticket(message.key)
        if not self._from_destination(ticket, sender):
            return
        ticket.destination = sender
        self._outlet.counters.cancels += 1
        self._fire(ticket, SourceEvent.CANCEL, now, ticket.cancelled())

    def peer_ended(self, uuid: str, now: float) -> None:
        """The destination's process is proven ended: its WRITEs fail, its claims are over."""
        try:
            self._transport.disconnect(uuid)
        except TransportError:
            self._outlet.dropped("disconnect refused by the transport")  # Its WRITEs are polled until they end.
        for ticket in self._ledger.live():
            if ticket.destination == uuid:
                fault = ticket.failure("peer ended", f"the decode worker {uuid} has ended")
                self._fire(ticket, SourceEvent.PEER_ENDED, now, fault)

    # Time ------------------------------------------------------------------------------------------------------------
    def poll(self, now: float) -> None:
        """Looks after WRITEs in flight."""
        writes, self._writes = self._writes, []
        for write in writes:
            state = self._transport.poll(write.handle)
            if state is WriteState.IN_FLIGHT:
                self._writes.append(write)
                self._watch(write, now)
            else:
                self._over(write, state, now)
        if self._drains:
            self._end_drains()

    def expire(self, now: float) -> None:
        """Ends leases and claims whose time is over; tells destinations how far theirs are."""
        for ticket in self._ledger.live():
            if now >= ticket.expires_at:
                self._expire(ticket, now)
            elif ticket.state in MAY_WRITE and now >= ticket.progress_at:
                self._tell_progress(ticket, now)

    def stop(self, now: float) -> None:
        """The worker is closing: every claim that is still written to fails."""
        for ticket in self._ledger.live():
            self._fire(ticket, SourceEvent.PREFILL_ABORTED, now, ticket.failure("closing", "the worker is closing"))

    @property
    def open_tickets(self) -> int:
        return len(self._ledger)

    @property
    def writing(self) -> bool:
        return bool(self._writes)

    @property
    def oldest_write_at(self) -> float:
        return self._writes[0].posted_at if self._writes else inf

    # Below: one transition, and what it asks for ---------------------------------------------------------------------
    def _ticket(self, key: TransferKey) -> SourceTicket:
        return self._ledger.get(key) or SourceTicket(key, Cursor(self._kv.layers))

    def _fire(self, ticket: SourceTicket, event: SourceEvent, now: float, answer: Answer | None = None) -> None:
        """Makes the transition and carries it out. `answer` is what the claim will hear if this event ends it."""
        outcome = step(SOURCE, ticket.state, event)
        if outcome is None:
            self._outlet.dropped(f"source {event.name.lower()} while {ticket.state.name.lower()}")
            return
        pinned, owed = ticket.pinned_blocks, ticket.state in OWES_SENT
        ticket.state, actions = outcome
        self.pinned_blocks += ticket.pinned_blocks - pinned
        self.owed += (ticket.state in OWES_SENT) - owed
        self._ledger.keep(ticket, ended=ticket.state in FORGETTABLE)
        for action in actions:
            self._act(ticket, action, now, answer)
        self._catch_up(ticket, now)
        if ticket.state in FORGETTABLE:
            ticket.shed()

    def _act(self, ticket: SourceTicket, action: SourceAction, now: float, answer: Answer | None) -> None:
        match action:
            case SourceAction.ACKNOWLEDGE:
                self._tell_progress(ticket, now)
            case SourceAction.STOP:
                ticket.answer = ticket.answer or answer
            case SourceAction.ANSWER:
                ticket.answer = ticket.answer or answer
                self._answer(ticket, ticket.answer)
            case SourceAction.DELIVER:
                ticket.answer = Done(ticket.key.transfer_id, ticket.key.epoch, ticket.stats)
                self._answer(ticket, ticket.answer)
            case SourceAction.CONFIRM_CANCEL:
                ticket.answer = ticket.answer or answer
                self._answer(ticket, ticket.cancelled())
            case SourceAction.HOLD:
                ticket.expires_at = now + self._lease_s
            case SourceAction.SENT:
                self._sent(ticket)

    def _catch_up(self, ticket: SourceTicket, now: float) -> None:
        """Writes whatever is due in any layer."""
        if ticket.state in MAY_WRITE:
            for layer in ticket.cursor.layers:
                self._push(ticket, layer, now)
        self._conclude(ticket, now)

    def _conclude(self, ticket: SourceTicket, now: float) -> None:
        """Notices that all is written, or that nothing is in flight any more."""
        if ticket.in_flight:
            return
        if ticket.state in MAY_WRITE and ticket.cursor.complete:
            self._fire(ticket, SourceEvent.ALL_WRITTEN, now)
        elif ticket.state in AWAITS_QUIET:
            self._fire(ticket, SourceEvent.QUIET, now)

    def _push(self, ticket: SourceTicket, layer: int, now: float) -> None:
        """One WRITE for all blocks that are due in this layer."""
        if ticket.state not in MAY_WRITE:
            return
        due = ticket.cursor.take(layer)
        if not due:
            return
        try:
            handle = self._transport.write(ticket.destination, layer, due.source, due.destination)
        except TransportError as error:
            self._fire(ticket, SourceEvent.WRITE_FAILED, now, ticket.failure("write", str(error)))
            return
        self._post(ticket, handle, due, now)

    def _post(self, ticket: SourceTicket, handle: object, due: Span, now: float) -> None:
        ticket.in_flight += 1
        self._outlet.counters.writes += 1
        self._writes.append(_Write(ticket, handle, len(due) * self._kv.block_bytes, now))

    def _watch(self, write: _Write, now: float) -> None:
        if not write.stuck and now - write.posted_at > self._stuck_s:
            write.stuck = True
            fault = write.ticket.failure("stuck", f"a WRITE did not complete within {self._stuck_s:.1f} s")
            self._fire(write.ticket, SourceEvent.WRITE_FAILED, now, fault)

    def _over(self, write: _Write, state: WriteState, now: float) -> None:
        ticket = write.ticket
        ticket.in_flight -= 1
        if state is WriteState.FAILED:
            fault = ticket.failure("write", "a WRITE failed; the decode worker may have ended")
            self._fire(ticket, SourceEvent.WRITE_FAILED, now, fault)
            return
        ticket.bytes += write.bytes
        ticket.last_write_done_at = now
        if ticket.prefill_ended_at is None or now <= ticket.prefill_ended_at:
            ticket.bytes_before_prefill_ended += write.bytes
        self._outlet.counters.bytes_written += write.bytes
        self._conclude(ticket, now)

    def _expire(self, ticket: SourceTicket, now: float) -> None:
        ticket.expires_at = inf
        if ticket.state is SourceState.HELD:
            fault = ticket.failure("lease", f"nobody claimed this prefill's KV within {self._lease_s:.1f} s")
            self._fire(ticket, SourceEvent.LEASE_EXPIRED, now, fault)
        elif step(SOURCE, ticket.state, SourceEvent.DEADLINE):
            fault = ticket.failure("deadline", "the claim's deadline passed before all of its KV was written")
            self._fire(ticket, SourceEvent.DEADLINE, now, fault)

    def _accept(self, ticket: SourceTicket, sender: str, message: Register, now: float) -> None:
        ticket.destination, ticket.register, ticket.claimed = sender, message, claim_digest(message)
        ticket.cursor.claim(message.first_block, message.blocks)
        in_bounds = 0 < message.deadline_s < LONGEST_CLAIM_S  # False for NaN too.
        ticket.expires_at = now + (message.deadline_s if in_bounds else LONGEST_CLAIM_S)

    def _claimed_before(self, ticket: SourceTicket, message: Register) -> None:
        """The destination has forgotten that it used this ticket. Its new claim must not be told that the old one is
        Done; while the old one may still be written, it must not be told that it is over either."""
        self._outlet.dropped("claim under a used ticket")
        if ticket.state not in MAY_WRITE | AWAITS_QUIET:
            sentence = "the ticket was used before, for another claim; every request needs a ticket of its own"
            self._answer(ticket, Failed(message.transfer_id, message.epoch, "used before", sentence))

    def _from_destination(self, ticket: SourceTicket, sender: str) -> bool:
        if ticket.destination in ("", sender):
            return True
        self._outlet.dropped("message from another worker")
        return False

    def _tell_progress(self, ticket: SourceTicket, now: float) -> None:
        ticket.progress_at = now + PROGRESS_S
        self._answer(ticket, Progress(ticket.key.transfer_id, ticket.key.epoch, ticket.cursor.written))

    def _answer(self, ticket: SourceTicket, message: Answer | Progress | None) -> None:
        assert message is not None, f"transfer {ticket.key} in {ticket.state} has no answer to give"
        self._outlet.send(ticket.destination, message)

    def _sent(self, ticket: SourceTicket) -> None:
        self._outlet.sent(ticket.key)
        reason, error = verdict(ticket.answer)
        self._outlet.ended(ticket.key, True, ticket.stats, reason, error)

    def _end_drains(self) -> None:
        for drain in self._drains:
            if not any(ticket.in_flight for ticket in drain.tickets):
                drain.over.set()
        self._drains = [drain for drain in self._drains if not drain.over.is_set()]
