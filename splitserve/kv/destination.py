"""The destination side: carries out what the ledger's destination table says, leg by leg.

Owned by the transfer thread, which passes the time in. A claim has a leg for each rank of the source that holds
something of this rank's part; it is received when all of them are and the bytes have landed (`Transport.land`), and one
that fails cancels the others. It never says that blocks are free before the table does, for every leg.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from splitserve.core.worker import KvPart, KvPeer, TransferStats
from splitserve.kv.layout import overlaps
from splitserve.kv.ledger import (
    DESTINATION,
    DestinationAction,
    DestinationEvent,
    DestinationState,
    Ledger,
    step,
)
from splitserve.kv.messages import (
    Cancel,
    Cancelled,
    Done,
    Failed,
    FromSource,
    GroupTable,
    Progress,
    Register,
)
from splitserve.kv.outlet import Outlet
from splitserve.kv.source_ticket import merged
from splitserve.kv.ticket import Claim, LegKey, Table, TransferKey
from splitserve.kv.transport import Fence, TransportError

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
    """One leg of a claim. `register` is None once it has ended."""

    key: LegKey
    source: KvPeer
    register: Register | None
    deadline_at: float
    state: DestinationState = DestinationState.ABSENT
    retry_at: float = 0.0
    stats: TransferStats = field(default_factory=TransferStats)
    reason: str = ""
    error: str = ""

    def cancel(self) -> Cancel:
        return Cancel(self.key.transfer_id, self.key.epoch)


@dataclass(slots=True)
class _Claimed:
    """A claim over its legs. `abandoned`: the engine has given it up; `told`: its failure is known to the engine."""

    claim: Claim
    owed: set[LegKey]
    abandoned: bool = False
    told: bool = False
    stats: list[TransferStats] = field(default_factory=list)
    verdicts: set[DestinationAction] = field(default_factory=set)


def _in_place(_: Sequence[Table]) -> Fence | None:
    """Landing of bytes that peers write where the engine reads them."""
    return None


class DestinationSide:
    """`part` is this rank's. `retry_s`: how often what was not answered is said again; all of it may be repeated.
    `land` brings a claim's blocks to where the engine reads them."""

    def __init__(
        self,
        outlet: Outlet,
        part: KvPart,
        connect: Callable[[KvPeer], None],
        retry_s: float,
        land: Callable[[Sequence[Table]], Fence | None] = _in_place,
    ) -> None:
        self._outlet = outlet
        self._part = part
        self._connect = connect
        self._retry_s = retry_s
        self._land = land
        self._landing: dict[TransferKey, Fence] = {}
        self._ledger: Ledger[DestinationTicket] = Ledger(MOST_ENDED)
        self._claims: dict[TransferKey, _Claimed] = {}
        self.up: frozenset[str] = frozenset()  # ranks that are connected and answer
        self.quarantined_blocks = 0

    # What the engine calls -------------------------------------------------------------------------------------------
    def claim(self, claim: Claim, now: float) -> None:
        sources = [peer for peer in claim.source if overlaps(peer.part, self._part)]
        if claim.key in self._claims:
            self._outlet.dropped("own claim made twice")
        elif any(self._ledger.get(claim.key.leg(peer.uuid)) for peer in sources):
            message = f"ticket {claim.key} was used before; every request needs a ticket of its own"
            self._refuse(claim.key, "used before", message)
        elif not sources:
            self._refuse(claim.key, "unconnected", "no rank of the source holds anything of what this rank needs")
        else:
            self._open(claim, sources, now)

    def abandon(self, key: TransferKey, now: float) -> None:
        claimed = self._claims.get(key)
        if claimed is None:
            self._outlet.dropped("own abandon of no claim")
            return
        self._quarantine(claimed)
        self._abandon_legs(claimed, now, "abandoned", "the request ended before its KV had arrived")

    # What peers say, and what is known of them -----------------------------------------------------------------------
    def on_message(self, sender: str, message: FromSource, now: float) -> None:
        ticket = self._ledger.get(message.key.leg(sender))
        if ticket is None:
            self._outlet.dropped(f"{type(message).__name__.lower()} for no claim")
            return
        if ticket.state is DestinationState.REGISTERED:  # What is waited for later is not what it speaks of.
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
        self._fire_all(uuid, DestinationEvent.PEER_ENDED, now, "peer ended", f"the source's rank {uuid} has ended")

    # Time ------------------------------------------------------------------------------------------------------------
    def poll(self) -> None:
        """Looks after bytes that are landing."""
        for key in [key for key, landed in self._landing.items() if landed()]:
            del self._landing[key]
            self._conclude(self._claims[key])

    def expire(self, now: float) -> None:
        for ticket in self._ledger.live():
            if now >= ticket.deadline_at and step(DESTINATION, ticket.state, DestinationEvent.DEADLINE):
                self._fire(ticket, DestinationEvent.DEADLINE, now, "deadline", "the KV did not arrive in time")
            elif now >= ticket.retry_at and ticket.key.peer in self.up:
                self._retry(ticket, now)

    def stop(self, now: float) -> None:
        """The worker is closing: sources are told to stop."""
        for claimed in list(self._claims.values()):
            self._abandon_legs(claimed, now, "closing", "the worker is closing")

    @property
    def open_claims(self) -> int:
        return len(self._claims)

    @property
    def landing(self) -> bool:
        """Bytes are on their way from where peers have written them to where the engine reads them."""
        return bool(self._landing)

    @property
    def awaits_bytes(self) -> bool:
        """Sources may be writing here, and somebody waits for it."""
        return any(ticket.state is not DestinationState.ABANDONED for ticket in self._ledger.live())

    # Below: claims and their legs ------------------------------------------------------------------------------------
    def _open(self, claim: Claim, sources: list[KvPeer], now: float) -> None:
        tables = tuple(GroupTable(table.first_block, table.blocks) for table in claim.tables)
        key = claim.key
        register = Register(key.transfer_id, key.epoch, claim.prompt_hash, claim.tokens, tables, claim.deadline_s)
        legs = [
            DestinationTicket(key.leg(peer.uuid), peer, register, deadline_at=now + claim.deadline_s)
            for peer in sources
        ]
        self._claims[key] = _Claimed(claim, {leg.key for leg in legs})
        for leg in legs:
            self._fire(leg, DestinationEvent.CLAIM, now)
            if leg.key.peer in self.up:
                self._fire(leg, DestinationEvent.CONNECTED, now)

    def _refuse(self, key: TransferKey, reason: str, message: str) -> None:
        self._outlet.failed(key)
        self._outlet.ended(key, False, TransferStats(), reason, message)

    def _quarantine(self, claimed: _Claimed) -> None:
        if not claimed.abandoned:
            claimed.abandoned = True
            self.quarantined_blocks += claimed.claim.blocks

    def _abandon_legs(self, claimed: _Claimed, now: float, reason: str, error: str) -> None:
        for key in sorted(claimed.owed):
            if (leg := self._ledger.get(key)) is not None:
                self._fire(leg, DestinationEvent.ABANDON, now, reason, error)

    def _leg_over(self, ticket: DestinationTicket, verdict: DestinationAction, now: float) -> None:
        claimed = self._claims[ticket.key.transfer]
        claimed.owed.discard(ticket.key)
        claimed.stats.append(ticket.stats)
        claimed.verdicts.add(verdict)
        if not claimed.owed:
            self._over(claimed)
        if verdict is not DestinationAction.RECEIVED and not claimed.told:
            claimed.told = True
            self._outlet.ended(claimed.claim.key, False, merged(claimed.stats), ticket.reason, ticket.error)
            self._abandon_legs(claimed, now, ticket.reason, ticket.error)

    def _over(self, claimed: _Claimed) -> None:
        """No leg is open: no peer writes these blocks any more."""
        landed: Fence | None = None
        if claimed.verdicts == {DestinationAction.RECEIVED}:
            try:
                landed = self._land(claimed.claim.tables)
            except TransportError as error:
                claimed.verdicts, claimed.told = {DestinationAction.FAILED}, True
                self._outlet.ended(claimed.claim.key, False, merged(claimed.stats), "landing", str(error))
        if landed is None:
            self._conclude(claimed)
        else:
            self._landing[claimed.claim.key] = landed

    def _conclude(self, claimed: _Claimed) -> None:
        """Nobody writes these blocks any more."""
        key = claimed.claim.key
        del self._claims[key]
        if claimed.abandoned:
            self.quarantined_blocks -= claimed.claim.blocks
        if claimed.verdicts == {DestinationAction.RECEIVED}:
            self._outlet.received(key)
            self._outlet.ended(key, False, merged(claimed.stats), "", "")
        elif claimed.abandoned or DestinationAction.FAILED not in claimed.verdicts:
            self._outlet.released(key)
        else:
            self._outlet.failed(key)

    # One transition of a leg, and what it asks for -------------------------------------------------------------------
    def _fire_all(self, uuid: str, event: DestinationEvent, now: float, reason: str = "", error: str = "") -> None:
        for ticket in self._ledger.live():
            if ticket.key.peer == uuid:
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
        ticket.state, actions = outcome
        self._ledger.keep(ticket, ended=ticket.state is DestinationState.ENDED)
        for action in actions:
            self._act(ticket, action, now)
        if ticket.state is DestinationState.ENDED:
            ticket.register = None  # thousands of ended ones are remembered

    def _act(self, ticket: DestinationTicket, action: DestinationAction, now: float) -> None:
        match action:
            case DestinationAction.CONNECT:
                self._ask_to_connect(ticket)
            case DestinationAction.REGISTER:
                assert ticket.register is not None
                left_s = max(ticket.deadline_at - now, 0.001)
                self._say(ticket, msgspec.structs.replace(ticket.register, deadline_s=left_s), now)
            case DestinationAction.CANCEL:
                self._outlet.counters.cancels += 1
                self._say(ticket, ticket.cancel(), now)
            case DestinationAction.RECEIVED | DestinationAction.FAILED | DestinationAction.RELEASED:
                self._leg_over(ticket, action, now)

    def _ask_to_connect(self, ticket: DestinationTicket) -> None:
        if ticket.key.peer not in self.up:
            self._connect(ticket.source)

    def _say(self, ticket: DestinationTicket, message: Register | Cancel, now: float) -> None:
        ticket.retry_at = now + self._retry_s
        self._outlet.send(ticket.key.peer, message)

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
