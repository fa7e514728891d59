"""The source side: carries out what the ledger's source table says, leg by leg.

Owned by the transfer thread, which passes the time in. A prefill is offered once and has a leg for each rank of the
other worker that needs something of this rank's; its blocks are the engine's again when all of them are over. Not here:
which WRITE goes first (`writer.py`), when a message is believed to come from its sender (`control.py`).
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from splitserve.core.config import KvTransferSettings
from splitserve.core.worker import TransferStats
from splitserve.kv.cursor import Cursor, PrefillProgress
from splitserve.kv.layout import Shard, Slice, overlaps
from splitserve.kv.ledger import (
    AWAITS_QUIET,
    FORGETTABLE,
    MAY_WRITE,
    SOURCE,
    Ledger,
    SourceAction,
    SourceEvent,
    SourceState,
    step,
)
from splitserve.kv.messages import Cancel, Done, Failed, Progress, Register
from splitserve.kv.outlet import Outlet
from splitserve.kv.source_ticket import Answer, SourceTicket, claim_digest, merged, mismatch, tables_of, verdict
from splitserve.kv.ticket import LegKey, Offer, TransferKey
from splitserve.kv.transport import Fence, Transport
from splitserve.kv.writer import Writer

MOST_ENDED = 4096  # Remembered to answer duplicates; a claim repeated later than that fails at its deadline instead.
MOST_EARLY = 4096  # Claims waiting for their offer; a router sends both within milliseconds.
LONGEST_CLAIM_S = 86_400.0
PROGRESS_S = 0.5
STUCK_SILENCES = 2  # A WRITE is stuck after so many times peer_silent_s.
MIB = 1024**2


@dataclass(slots=True)
class _Prefill:
    """One offered prefill at this rank. `owed`: legs that are not over; `ended`: the engine is done with it."""

    offer: Offer
    progress: PrefillProgress
    owed: set[LegKey]
    ended_at: float | None = None
    stats: list[TransferStats] = field(default_factory=list)
    fault: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class _Computed:
    """Once `fence` is passed (none: once those before it are), so many tokens are there in `layer` (none: in all)."""

    fence: Fence | None
    layer: int | None
    tokens: tuple[tuple[TransferKey, int], ...]


@dataclass(slots=True)
class _Drain:
    tickets: list[SourceTicket]
    over: threading.Event


class SourceSide:
    def __init__(self, transport: Transport, outlet: Outlet, shard: Shard, settings: KvTransferSettings) -> None:
        self._outlet = outlet
        self._part = shard.part
        self._lease_s = settings.lease_s
        self._writer = Writer(
            transport,
            outlet.counters,
            settings.link_in_flight_mib * MIB,
            settings.write_mib * MIB,
            STUCK_SILENCES * settings.peer_silent_s,
            wrote=self._conclude,
            failed=self._write_failed,
        )
        self._ledger: Ledger[SourceTicket] = Ledger(MOST_ENDED)
        self._prefills: dict[TransferKey, _Prefill] = {}
        self._fenced: deque[_Computed] = deque()
        self._early = 0
        self._drains: list[_Drain] = []
        self.pinned_blocks = 0

    # What the engine calls -------------------------------------------------------------------------------------------
    def offer(self, offer: Offer, now: float) -> None:
        if offer.key in self._prefills:
            self._outlet.dropped("own offer made twice")
            return
        peers = [peer.uuid for peer in offer.destination if overlaps(self._part, peer.part)]
        progress = PrefillProgress(self._part.first_layer, self._part.layers)
        legs = [self._ticket(offer.key.leg(peer)) for peer in peers]
        self._prefills[offer.key] = _Prefill(offer, progress, {leg.key for leg in legs})
        for leg in legs:
            self._offer_leg(leg, offer, now)

    def computing(
        self, key: TransferKey, tables: Sequence[Sequence[int]], tokens: int, fence: Fence | None, now: float
    ) -> None:
        prefill = self._prefills.get(key)
        if prefill is None:
            self._outlet.dropped("own computing")
            return
        prefill.progress.computing(tables)
        self.computed(None, [(key, tokens)], fence, now)

    def computed(
        self, layer: int | None, tokens: Sequence[tuple[TransferKey, int]], fence: Fence | None, now: float
    ) -> None:
        """None: in all layers."""
        self._fenced.append(_Computed(fence, layer, tuple(tokens)))
        self._pass_fences(now)

    def prefill_ended(self, key: TransferKey, ended_at: float, now: float) -> None:
        """All of it is computed, or will be once the fences before it are passed."""
        if prefill := self._prefills.get(key):
            self.computed(None, [(key, len(prefill.offer.tokens))], None, now)
        self._over(key, SourceEvent.PREFILL_ENDED, ended_at, now)

    def prefill_aborted(self, key: TransferKey, now: float) -> None:
        self._over(key, SourceEvent.PREFILL_ABORTED, now, now)

    def drain(self, keys: Sequence[TransferKey], over: threading.Event) -> None:
        """Stops WRITEs of these prefills; `over` is set when none is in flight."""
        drained = set(keys)
        for prefill in (self._prefills[key] for key in keys if key in self._prefills):
            prefill.progress.preempted()
        self._fenced = deque(_without(waiting, drained) for waiting in self._fenced)
        tickets = [ticket for ticket in self._ledger.live() if ticket.key.transfer in drained]
        self._drains.append(_Drain(tickets, over))
        self._end_drains()

    # What peers say, and what is known of them -----------------------------------------------------------------------
    def peer_up(self, uuid: str, cut: Slice | None, now: float) -> None:
        """The peer is connected; `cut` is what this rank writes of its KV, if anything."""
        if cut is not None:
            self._writer.link(uuid, cut)

    def on_register(self, sender: str, message: Register, now: float) -> None:
        ticket = self._addressed(message.key, sender)
        if ticket is None:
            return
        if ticket.state is SourceState.ABSENT and self._early >= MOST_EARLY:
            self._outlet.dropped("register beyond the limit")
            return
        if ticket.claimed and ticket.claimed != claim_digest(message):
            self._claimed_before(ticket, message)
            return
        fault = self._mismatch(ticket, message)
        if fault is not None and step(SOURCE, ticket.state, SourceEvent.REGISTER_MISMATCH):
            self._fire(ticket, SourceEvent.REGISTER_MISMATCH, now, fault)
            return
        if not ticket.claimed:
            self._accept(ticket, message, now)
        if fault is None and ticket.offer is not None and ticket.cursor is None:
            self._aim(ticket, message)
        self._fire(ticket, SourceEvent.REGISTER, now, ticket.failure("unknown", "the claim came after the end"))

    def on_cancel(self, sender: str, message: Cancel, now: float) -> None:
        ticket = self._addressed(message.key, sender)
        if ticket is not None:
            self._outlet.counters.cancels += 1
            self._fire(ticket, SourceEvent.CANCEL, now, ticket.cancelled())

    def peer_ended(self, uuid: str, now: float) -> None:
        """The destination's process is proven ended: its WRITEs fail, its claims are over."""
        self._writer.unlink(uuid)
        for ticket in self._ledger.live():
            if ticket.peer == uuid:
                fault = ticket.failure("peer ended", f"the decode worker's rank {uuid} has ended")
                self._fire(ticket, SourceEvent.PEER_ENDED, now, fault)

    # Time ------------------------------------------------------------------------------------------------------------
    def poll(self, now: float) -> None:
        """Looks after WRITEs in flight and what the device has computed meanwhile."""
        self._pass_fences(now)
        self._writer.poll(now)
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
        for key in list(self._prefills):
            self._over(key, SourceEvent.PREFILL_ABORTED, now, now, "closing", "the worker is closing")

    @property
    def open_tickets(self) -> int:
        return len(self._ledger)

    @property
    def owed(self) -> int:
        """Offered prefills that `Results.sent` has yet to name."""
        return len(self._prefills)

    @property
    def in_flight_bytes(self) -> int:
        return self._writer.in_flight_bytes

    @property
    def writing(self) -> bool:
        return bool(self._writer.writing or self._fenced)

    @property
    def oldest_write_at(self) -> float:
        return self._writer.oldest_write_at

    # Below: prefills and their legs ----------------------------------------------------------------------------------
    def _ticket(self, key: LegKey) -> SourceTicket:
        return self._ledger.get(key) or SourceTicket(key)

    def _addressed(self, key: TransferKey, sender: str) -> SourceTicket | None:
        """The leg that a message is about; None if the prefill was offered to others."""
        ticket = self._ticket(key.leg(sender))
        if ticket.state is SourceState.ABSENT and key in self._prefills:
            self._outlet.dropped("message from another worker")
            return None
        return ticket

    def _offer_leg(self, leg: SourceTicket, offer: Offer, now: float) -> None:
        leg.offer = offer
        fault = self._mismatch(leg, leg.register) if leg.register is not None else None
        if fault is None and leg.register is not None:
            self._aim(leg, leg.register)
        self._fire(leg, SourceEvent.OFFER_MISMATCH if fault else SourceEvent.OFFER, now, fault)

    def _mismatch(self, ticket: SourceTicket, message: Register) -> Failed | None:
        if ticket.offer is None:
            return None
        return mismatch(ticket.offer, message, self._writer.slice_for(ticket.peer))

    def _accept(self, ticket: SourceTicket, message: Register, now: float) -> None:
        ticket.register, ticket.claimed = message, claim_digest(message)
        in_bounds = 0 < message.deadline_s < LONGEST_CLAIM_S  # False for NaN too.
        ticket.expires_at = now + (message.deadline_s if in_bounds else LONGEST_CLAIM_S)

    def _aim(self, ticket: SourceTicket, message: Register) -> None:
        """Offer and claim are there and fit."""
        cut, prefill = self._writer.slice_for(ticket.peer), self._prefills.get(ticket.key.transfer)
        if cut is not None and prefill is not None:
            ticket.cursor = Cursor(prefill.progress, cut, message.tokens, tables_of(message))

    def _over(
        self, key: TransferKey, event: SourceEvent, ended_at: float, now: float, reason: str = "", message: str = ""
    ) -> None:
        """The engine is done with a prefill, which it may have aborted."""
        prefill = self._prefills.get(key)
        if prefill is None:
            self._outlet.dropped("own end of no offer")
            return
        if prefill.ended_at is None:
            prefill.ended_at = ended_at
            self.pinned_blocks += prefill.offer.blocks
        for leg in [leg for leg in self._ledger.live() if leg.key.transfer == key]:
            leg.prefill_ended_at = prefill.ended_at
            fault = leg.failure(reason or "aborted", message or "the prefill was aborted")
            self._fire(leg, event, now, fault)
        self._give_back(key)

    def _catch_up(self, prefill: _Prefill, now: float) -> None:
        for key in sorted(prefill.owed):
            if ticket := self._ledger.get(key):
                self._writer.push(ticket, now)
                self._conclude(ticket, now)

    def _give_back(self, key: TransferKey) -> None:
        """Names a prefill as sent once the engine is done with it and no leg is open."""
        prefill = self._prefills.get(key)
        if prefill is None or prefill.owed or prefill.ended_at is None:
            return
        del self._prefills[key]
        self.pinned_blocks -= prefill.offer.blocks
        self._outlet.sent(key)
        self._outlet.ended(key, True, merged(prefill.stats), *prefill.fault)

    # One transition of a leg, and what it asks for -------------------------------------------------------------------
    def _fire(self, ticket: SourceTicket, event: SourceEvent, now: float, answer: Answer | None = None) -> None:
        """Makes the transition and carries it out. `answer` is what the claim will hear if this event ends it."""
        outcome = step(SOURCE, ticket.state, event)
        if outcome is None:
            self._outlet.dropped(f"source {event.name.lower()} while {ticket.state.name.lower()}")
            return
        was_early = ticket.state is SourceState.EARLY
        ticket.state, actions = outcome
        self._early += (ticket.state is SourceState.EARLY) - was_early
        self._ledger.keep(ticket, ended=ticket.state in FORGETTABLE)
        for action in actions:
            self._act(ticket, action, now, answer)
        self._writer.push(ticket, now)
        self._conclude(ticket, now)
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
                self._outlet.counters.leases += 1
                ticket.expires_at = now + self._lease_s
            case SourceAction.SENT:
                self._leg_over(ticket)

    def _leg_over(self, ticket: SourceTicket) -> None:
        key = ticket.key.transfer
        prefill = self._prefills[key]
        prefill.owed.discard(ticket.key)
        prefill.stats.append(ticket.stats)
        if not prefill.fault[0]:
            prefill.fault = verdict(ticket.answer)
        self._give_back(key)

    def _conclude(self, ticket: SourceTicket, now: float) -> None:
        """Notices that all is written, or that nothing is in flight any more."""
        if ticket.in_flight:
            return
        if ticket.may_write and ticket.cursor is not None and ticket.cursor.complete:
            self._fire(ticket, SourceEvent.ALL_WRITTEN, now)
        elif ticket.state in AWAITS_QUIET:
            self._fire(ticket, SourceEvent.QUIET, now)

    def _write_failed(self, ticket: SourceTicket, reason: str, message: str, now: float) -> None:
        self._fire(ticket, SourceEvent.WRITE_FAILED, now, ticket.failure(reason, message))

    def _expire(self, ticket: SourceTicket, now: float) -> None:
        ticket.expires_at = inf
        if ticket.state is SourceState.HELD:
            self._outlet.counters.expired_leases += 1
            fault = ticket.failure("lease", f"nobody claimed this prefill's KV within {self._lease_s:.1f} s")
            self._fire(ticket, SourceEvent.LEASE_EXPIRED, now, fault)
        elif step(SOURCE, ticket.state, SourceEvent.DEADLINE):
            fault = ticket.failure("deadline", "the claim's deadline passed before all of its KV was written")
            self._fire(ticket, SourceEvent.DEADLINE, now, fault)

    def _claimed_before(self, ticket: SourceTicket, message: Register) -> None:
        """The destination has forgotten that it used this ticket. Its new claim must not be told that the old one is
        Done; while the old one may still be written, it must not be told that it is over either."""
        self._outlet.dropped("claim under a used ticket")
        if ticket.state not in MAY_WRITE | AWAITS_QUIET:
            sentence = "the ticket was used before, for another claim; every request needs a ticket of its own"
            self._answer(ticket, Failed(message.transfer_id, message.epoch, "used before", sentence))

    def _tell_progress(self, ticket: SourceTicket, now: float) -> None:
        ticket.progress_at = now + PROGRESS_S
        written = ticket.cursor.written if ticket.cursor is not None else 0
        self._answer(ticket, Progress(ticket.key.transfer_id, ticket.key.epoch, written))

    def _answer(self, ticket: SourceTicket, message: Answer | Progress | None) -> None:
        assert message is not None, f"transfer {ticket.key} in {ticket.state} has no answer to give"
        self._outlet.send(ticket.peer, message)

    # Fences ----------------------------------------------------------------------------------------------------------
    def _pass_fences(self, now: float) -> None:
        """A device computes in the order of its launches, so only the first fence is asked."""
        while self._fenced and ((fence := self._fenced[0].fence) is None or fence()):
            done = self._fenced.popleft()
            for key, count in done.tokens:
                if prefill := self._prefills.get(key):
                    prefill.progress.computed(done.layer, count)
                    self._catch_up(prefill, now)

    def _end_drains(self) -> None:
        for drain in self._drains:
            if not any(ticket.in_flight for ticket in drain.tickets):
                drain.over.set()
        self._drains = [drain for drain in self._drains if not drain.over.is_set()]


def _without(waiting: _Computed, keys: set[TransferKey]) -> _Computed:
    return _Computed(waiting.fence, waiting.layer, tuple(each for each in waiting.tokens if each[0] not in keys))
