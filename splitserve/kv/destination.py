"""The destination side: carries out what the ledger's destination table says.

Owned by the transfer thread, which passes the time in. It never says that blocks are free before the table does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from splitserve.core.worker import KvPeer, TransferStats
from splitserve.kv.ledger import (
    DESTINATION,
    DestinationAction,
    DestinationEvent,
    DestinationState,
    Ledger,
    step,
)
from splitserve.kv.messages import Cancel, Cancelled, Done, Failed, FromSource, Progress, Register
from splitserve.kv.outlet import Outlet
from splitserve.kv.ticket import Claim, TransferKey

CALM_RETRIES = 5  # A source that has just spoken is asked again so much later.
MOST_ENDED = 4096  # Remembered so that a second claim under an old key is noticed.

_EVENTS: dict[type[FromSource], DestinationEvent] = {
    Progress: DestinationEvent.PROGRESS,
    Done: DestinationEvent.DONE,
    Failed: DestinationEvent.FAILED,
    Cancelled: DestinationEvent.CANCELLED,
}


@dataclass(slots=True)
class DestinationTicket:
    claim: Claim
    deadline_at: float
    state: DestinationState = DestinationState.ABSENT
    retry_at: float = 0.0
    stats: TransferStats = field(default_factory=TransferStats)
    reason: str = ""
    error: str = ""

    @property
    def key(self) -> TransferKey:
        return self.claim.key

    @property
    def quarantined_blocks(self) -> int:
        return len(self.claim.blocks) if self.state is DestinationState.ABANDONED else 0

    def register(self, now: float) -> Register:
        left_s = max(self.deadline_at - now, 0.001)
        return Register(
            self.key.transfer_id,
            self.key.epoch,
            self.claim.prompt_hash,
            self.claim.first_block,
            self.claim.blocks,
            left_s,
        )

    def cancel(self) -> Cancel:
        return Cancel(self.key.transfer_id, self.key.epoch)


class DestinationSide:
    """`retry_s`: how often what was not answered is said again; every message here may be repeated."""

    def __init__(self, outlet: Outlet, connect: Callable[[KvPeer], None], retry_s: float) -> None:
        self._outlet = outlet
        self._connect = connect
        self._retry_s = retry_s
        self._ledger: Ledger[DestinationTicket] = Ledger(MOST_ENDED)
        self.up: frozenset[str] = frozenset()  # workers that are connected and answer
        self.quarantined_blocks = 0

    # What the engine calls -------------------------------------------------------------------------------------------
    def claim(self, claim: Claim, now: float) -> None:
        known = self._ledger.get(claim.key)
        if known is not None:
            self._claimed_before(known)
            return
        ticket = DestinationTicket(claim, now + claim.deadline_s)
        self._fire(ticket, DestinationEvent.CLAIM, now)
        if claim.source.uuid in self.up:
            self._fire(ticket, DestinationEvent.CONNECTED, now)

    def abandon(self, key: TransferKey, now: float) -> None:
        ticket = self._ledger.get(key)
        if ticket is None:
            self._outlet.dropped("own abandon of no claim")
            return
        self._fire(ticket, DestinationEvent.ABANDON, now, "abandoned", "the request ended before its KV had arrived")

    # What peers say, and what is known of them -----------------------------------------------------------------------
    def on_message(self, sender: str, message: FromSource, now: float) -> None:
        ticket = self._ledger.get(message.key)
        if ticket is None:
            self._outlet.dropped(f"{type(message).__name__.lower()} for no claim")
        elif ticket.claim.source.uuid != sender:
            self._outlet.dropped("message from another worker")
        else:
            ticket.retry_at = now + CALM_RETRIES * self._retry_s
            if isinstance(message, Done):
                ticket.stats = message.stats
            self._fire(ticket, _EVENTS[type(message)], now, *_reason(message))

    def peer_up(self, uuid: str, now: float) -> None:
        self.up |= {uuid}
        self._fire_all(uuid, DestinationEvent.CONNECTED, now)

    def peer_silent(self, uuid: str, now: float) -> None:
        """Nothing is known; its claims wait. What we would repeat waits too, until `peer_up`."""
        self.up -= {uuid}
        self._fire_all(uuid, DestinationEvent.PEER_SILENT, now)

    def peer_refused(self, uuid: str, message: str, now: float) -> None:
        self.up -= {uuid}
        self._fire_all(uuid, DestinationEvent.REFUSED, now, "refused", message)

    def peer_ended(self, uuid: str, now: float) -> None:
        """The source's process is proven ended: it writes no more."""
        self.up -= {uuid}
        self._fire_all(uuid, DestinationEvent.PEER_ENDED, now, "peer ended", f"the prefill worker {uuid} has ended")

    # Time ------------------------------------------------------------------------------------------------------------
    def expire(self, now: float) -> None:
        for ticket in self._ledger.live():
            if now >= ticket.deadline_at and step(DESTINATION, ticket.state, DestinationEvent.DEADLINE):
                self._fire(ticket, DestinationEvent.DEADLINE, now, "deadline", "the KV did not arrive in time")
            elif now >= ticket.retry_at and ticket.claim.source.uuid in self.up:
                self._retry(ticket, now)

    def stop(self, now: float) -> None:
        """The worker is closing: sources are told to stop."""
        for ticket in self._ledger.live():
            self._fire(ticket, DestinationEvent.ABANDON, now, "closing", "the worker is closing")

    @property
    def open_claims(self) -> int:
        return len(self._ledger)

    @property
    def awaits_bytes(self) -> bool:
        """Sources may be writing here, and somebody waits for it."""
        return any(ticket.state is not DestinationState.ABANDONED for ticket in self._ledger.live())

    def _claimed_before(self, ticket: DestinationTicket) -> None:
        """A ticket is good for one claim. A second one fails; while the first is open they can't be told apart."""
        if ticket.state is DestinationState.ENDED:
            self._outlet.failed(ticket.key)
            message = f"ticket {ticket.key} was used before; every request needs a ticket of its own"
            self._outlet.ended(ticket.key, False, TransferStats(), "used before", message)
        else:
            self._outlet.dropped("own claim made twice")

    # Below: one transition, and what it asks for ---------------------------------------------------------------------
    def _fire_all(self, uuid: str, event: DestinationEvent, now: float, reason: str = "", error: str = "") -> None:
        for ticket in self._ledger.live():
            if ticket.claim.source.uuid == uuid:
                self._fire(ticket, event, now, reason, error)

    def _fire(
        self, ticket: DestinationTicket, event: DestinationEvent, now: float, reason: str = "", error: str = ""
    ) -> None:
        outcome = step(DESTINATION, ticket.state, event)
        if outcome is None:
            self._outlet.dropped(f"destination {event.name.lower()} while {ticket.state.name.lower()}")
            return
        if not ticket.reason:
            ticket.reason, ticket.error = reason, error
        quarantined = ticket.quarantined_blocks
        ticket.state, actions = outcome
        self.quarantined_blocks += ticket.quarantined_blocks - quarantined
        self._ledger.keep(ticket, ended=ticket.state is DestinationState.ENDED)
        for action in actions:
            self._act(ticket, action, now)
        if ticket.state is DestinationState.ENDED:
            ticket.claim = replace(ticket.claim, blocks=())  # thousands of ended ones are remembered

    def _act(self, ticket: DestinationTicket, action: DestinationAction, now: float) -> None:
        match action:
            case DestinationAction.CONNECT:
                self._ask_to_connect(ticket)
            case DestinationAction.REGISTER:
                self._say(ticket, ticket.register(now), now)
            case DestinationAction.CANCEL:
                self._outlet.counters.cancels += 1
                self._say(ticket, ticket.cancel(), now)
            case DestinationAction.RECEIVED:
                self._outlet.received(ticket.key)
                self._outlet.ended(ticket.key, False, ticket.stats, "", "")
            case DestinationAction.FAILED:
                self._outlet.failed(ticket.key)
                self._outlet.ended(ticket.key, False, ticket.stats, ticket.reason, ticket.error)
            case DestinationAction.RELEASED:
                self._outlet.released(ticket.key)
                self._outlet.ended(ticket.key, False, ticket.stats, ticket.reason, ticket.error)

    def _ask_to_connect(self, ticket: DestinationTicket) -> None:
        if ticket.claim.source.uuid not in self.up:
            self._connect(ticket.claim.source)

    def _say(self, ticket: DestinationTicket, message: Register | Cancel, now: float) -> None:
        ticket.retry_at = now + self._retry_s
        self._outlet.send(ticket.claim.source.uuid, message)

    def _retry(self, ticket: DestinationTicket, now: float) -> None:
        ticket.retry_at = now + self._retry_s
        self._fire(ticket, DestinationEvent.RETRY, now)


def _reason(message: FromSource) -> tuple[str, str]:
    match message:
        case Failed():
            return message.reason, message.message
        case Cancelled():
            return "cancelled", "the prefill worker had this claim cancelled"
    return "", ""
