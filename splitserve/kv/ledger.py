"""The life of one leg of a transfer on both sides, as two transition tables. Pure: no clock, no I/O, no thread.
A leg is what one rank of the prefill worker and one rank of the decode worker have with each other under one ticket.

A (state, event) that is not in a table changes nothing: `step` answers None and the caller counts it, whether it was a
peer's message (late, twice, forged) or a call of our own engine (which may race with the end of its transfer). What
must never be lost is that every offered prefill is answered SENT once, and every claim RECEIVED, FAILED or RELEASED
once; tests walk the tables for that.

    source        OFFERED ─► PUSHING ─► DELIVERED ─► ENDED       claim first: EARLY ─► PUSHING
                  (prefill still running: PUSHING, DELIVERED, STOPPING, STOPPED; ended: HELD, FINISHING, STOPPING_ENDED)
    destination   CONNECTING ─► REGISTERED ─► ENDED              given up: CANCELLING or ABANDONED ─► ENDED

Safety, readable in the tables: a destination leaves REGISTERED, CANCELLING or ABANDONED for ENDED only by DONE, FAILED,
CANCELLED or PEER_ENDED; a source answers a claim it has pushed for only by ALL_WRITTEN or QUIET (no WRITE in flight),
and says SENT from a state that may have WRITEs only by the same two.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Generic, Protocol, TypeVar

from splitserve.kv.ticket import LegKey


class SourceState(Enum):
    ABSENT = auto()  # nothing is known of the key
    EARLY = auto()  # claimed, not offered yet
    REFUSED_EARLY = auto()  # the claim is over, not offered yet
    OFFERED = auto()  # prefill runs, not claimed yet
    PUSHING = auto()  # prefill runs, WRITEs go out
    DELIVERED = auto()  # prefill runs, all of the claim is written and answered
    STOPPING = auto()  # prefill runs, the claim is over, its last WRITEs are awaited
    STOPPED = auto()  # prefill runs, the claim is over and answered
    HELD = auto()  # prefill ended, not claimed yet: the lease runs
    FINISHING = auto()  # prefill ended, WRITEs remain
    STOPPING_ENDED = auto()  # prefill ended, the claim is over, its last WRITEs are awaited
    ENDED = auto()  # remembered for a while to answer duplicates


class SourceEvent(Enum):
    OFFER = auto()
    OFFER_MISMATCH = auto()  # the offer does not fit the early claim
    REGISTER = auto()
    REGISTER_MISMATCH = auto()  # the claim does not fit the offer
    CANCEL = auto()
    PREFILL_ENDED = auto()
    PREFILL_ABORTED = auto()
    ALL_WRITTEN = auto()  # every claimed block of every layer, none in flight
    QUIET = auto()  # stopping, none in flight any more
    WRITE_FAILED = auto()
    PEER_ENDED = auto()  # the destination's process, proven
    DEADLINE = auto()  # the claim's
    LEASE_EXPIRED = auto()


class SourceAction(Enum):
    ACKNOWLEDGE = auto()  # send Progress
    STOP = auto()  # no more WRITEs; keep the answer for when it is quiet
    ANSWER = auto()  # send the answer kept, or that the event carries
    DELIVER = auto()  # send Done, and keep it
    CONFIRM_CANCEL = auto()  # send Cancelled: nothing of this claim is in flight
    HOLD = auto()  # start the lease
    SENT = auto()  # tell the engine


class DestinationState(Enum):
    ABSENT = auto()
    CONNECTING = auto()  # the source has not been told yet
    REGISTERED = auto()
    CANCELLING = auto()  # the deadline passed: fenced, it has failed
    ABANDONED = auto()  # the engine gave it up: fenced, it is released. Its blocks are in quarantine
    ENDED = auto()


class DestinationEvent(Enum):
    CLAIM = auto()
    CONNECTED = auto()
    REFUSED = auto()
    PROGRESS = auto()
    DONE = auto()
    FAILED = auto()
    CANCELLED = auto()
    ABANDON = auto()
    DEADLINE = auto()
    PEER_SILENT = auto()
    PEER_ENDED = auto()  # the source's process, proven
    RETRY = auto()


class DestinationAction(Enum):
    CONNECT = auto()
    REGISTER = auto()  # send (again)
    CANCEL = auto()  # send (again)
    RECEIVED = auto()  # tell the engine
    FAILED = auto()
    RELEASED = auto()


StateT = TypeVar("StateT", SourceState, DestinationState)
EventT = TypeVar("EventT", SourceEvent, DestinationEvent)
ActionT = TypeVar("ActionT", SourceAction, DestinationAction)
SourceTable = Mapping[tuple[SourceState, SourceEvent], tuple[SourceState, tuple[SourceAction, ...]]]
DestinationTable = Mapping[
    tuple[DestinationState, DestinationEvent], tuple[DestinationState, tuple[DestinationAction, ...]]
]


def _source_table() -> SourceTable:
    s, e, a = SourceState, SourceEvent, SourceAction
    return {
        (s.ABSENT, e.OFFER): (s.OFFERED, ()),
        (s.ABSENT, e.REGISTER): (s.EARLY, (a.ACKNOWLEDGE,)),
        (s.ABSENT, e.CANCEL): (s.REFUSED_EARLY, (a.CONFIRM_CANCEL,)),
        (s.EARLY, e.OFFER): (s.PUSHING, ()),
        (s.EARLY, e.OFFER_MISMATCH): (s.STOPPED, (a.ANSWER,)),
        (s.EARLY, e.REGISTER): (s.EARLY, (a.ACKNOWLEDGE,)),
        (s.EARLY, e.CANCEL): (s.REFUSED_EARLY, (a.CONFIRM_CANCEL,)),
        (s.EARLY, e.PEER_ENDED): (s.REFUSED_EARLY, (a.STOP,)),
        (s.EARLY, e.DEADLINE): (s.REFUSED_EARLY, (a.ANSWER,)),
        (s.REFUSED_EARLY, e.OFFER): (s.STOPPED, ()),
        (s.REFUSED_EARLY, e.REGISTER): (s.REFUSED_EARLY, (a.ANSWER,)),
        (s.REFUSED_EARLY, e.CANCEL): (s.REFUSED_EARLY, (a.CONFIRM_CANCEL,)),
        (s.OFFERED, e.REGISTER): (s.PUSHING, (a.ACKNOWLEDGE,)),
        (s.OFFERED, e.REGISTER_MISMATCH): (s.STOPPED, (a.ANSWER,)),
        (s.OFFERED, e.CANCEL): (s.STOPPED, (a.CONFIRM_CANCEL,)),
        (s.OFFERED, e.PREFILL_ENDED): (s.HELD, (a.HOLD,)),
        (s.OFFERED, e.PREFILL_ABORTED): (s.ENDED, (a.STOP, a.SENT)),
        (s.OFFERED, e.PEER_ENDED): (s.STOPPED, (a.STOP,)),
        (s.PUSHING, e.REGISTER): (s.PUSHING, (a.ACKNOWLEDGE,)),
        (s.PUSHING, e.CANCEL): (s.STOPPING, (a.STOP,)),
        (s.PUSHING, e.PREFILL_ENDED): (s.FINISHING, ()),
        (s.PUSHING, e.PREFILL_ABORTED): (s.STOPPING_ENDED, (a.STOP,)),
        (s.PUSHING, e.ALL_WRITTEN): (s.DELIVERED, (a.DELIVER,)),
        (s.PUSHING, e.WRITE_FAILED): (s.STOPPING, (a.STOP,)),
        (s.PUSHING, e.PEER_ENDED): (s.STOPPING, (a.STOP,)),
        (s.PUSHING, e.DEADLINE): (s.STOPPING, (a.STOP,)),
        (s.DELIVERED, e.REGISTER): (s.DELIVERED, (a.ANSWER,)),
        (s.DELIVERED, e.CANCEL): (s.DELIVERED, (a.CONFIRM_CANCEL,)),
        (s.DELIVERED, e.PREFILL_ENDED): (s.ENDED, (a.SENT,)),
        (s.DELIVERED, e.PREFILL_ABORTED): (s.ENDED, (a.SENT,)),
        (s.DELIVERED, e.PEER_ENDED): (s.DELIVERED, ()),
        (s.STOPPING, e.REGISTER): (s.STOPPING, ()),
        (s.STOPPING, e.CANCEL): (s.STOPPING, ()),
        (s.STOPPING, e.PREFILL_ENDED): (s.STOPPING_ENDED, ()),
        (s.STOPPING, e.PREFILL_ABORTED): (s.STOPPING_ENDED, ()),
        (s.STOPPING, e.QUIET): (s.STOPPED, (a.ANSWER,)),
        (s.STOPPING, e.WRITE_FAILED): (s.STOPPING, ()),
        (s.STOPPING, e.PEER_ENDED): (s.STOPPING, ()),
        (s.STOPPED, e.REGISTER): (s.STOPPED, (a.ANSWER,)),
        (s.STOPPED, e.CANCEL): (s.STOPPED, (a.CONFIRM_CANCEL,)),
        (s.STOPPED, e.PREFILL_ENDED): (s.ENDED, (a.SENT,)),
        (s.STOPPED, e.PREFILL_ABORTED): (s.ENDED, (a.SENT,)),
        (s.STOPPED, e.PEER_ENDED): (s.STOPPED, ()),
        (s.HELD, e.REGISTER): (s.FINISHING, (a.ACKNOWLEDGE,)),
        (s.HELD, e.REGISTER_MISMATCH): (s.ENDED, (a.ANSWER, a.SENT)),
        (s.HELD, e.CANCEL): (s.ENDED, (a.CONFIRM_CANCEL, a.SENT)),
        (s.HELD, e.PREFILL_ABORTED): (s.ENDED, (a.STOP, a.SENT)),
        (s.HELD, e.PEER_ENDED): (s.ENDED, (a.STOP, a.SENT)),
        (s.HELD, e.LEASE_EXPIRED): (s.ENDED, (a.STOP, a.SENT)),
        (s.FINISHING, e.REGISTER): (s.FINISHING, (a.ACKNOWLEDGE,)),
        (s.FINISHING, e.CANCEL): (s.STOPPING_ENDED, (a.STOP,)),
        (s.FINISHING, e.PREFILL_ABORTED): (s.STOPPING_ENDED, (a.STOP,)),
        (s.FINISHING, e.ALL_WRITTEN): (s.ENDED, (a.DELIVER, a.SENT)),
        (s.FINISHING, e.WRITE_FAILED): (s.STOPPING_ENDED, (a.STOP,)),
        (s.FINISHING, e.PEER_ENDED): (s.STOPPING_ENDED, (a.STOP,)),
        (s.FINISHING, e.DEADLINE): (s.STOPPING_ENDED, (a.STOP,)),
        (s.STOPPING_ENDED, e.REGISTER): (s.STOPPING_ENDED, ()),
        (s.STOPPING_ENDED, e.CANCEL): (s.STOPPING_ENDED, ()),
        (s.STOPPING_ENDED, e.PREFILL_ABORTED): (s.STOPPING_ENDED, ()),
        (s.STOPPING_ENDED, e.QUIET): (s.ENDED, (a.ANSWER, a.SENT)),
        (s.STOPPING_ENDED, e.WRITE_FAILED): (s.STOPPING_ENDED, ()),
        (s.STOPPING_ENDED, e.PEER_ENDED): (s.STOPPING_ENDED, ()),
        # An offer after the end: the router made a new prefill of an old ticket. It runs, and nobody can claim it.
        (s.ENDED, e.OFFER): (s.STOPPED, ()),
        (s.ENDED, e.REGISTER): (s.ENDED, (a.ANSWER,)),
        (s.ENDED, e.CANCEL): (s.ENDED, (a.CONFIRM_CANCEL,)),
    }


def _destination_table() -> DestinationTable:
    s, e, a = DestinationState, DestinationEvent, DestinationAction
    return {
        (s.ABSENT, e.CLAIM): (s.CONNECTING, (a.CONNECT,)),
        (s.CONNECTING, e.CONNECTED): (s.REGISTERED, (a.REGISTER,)),
        (s.CONNECTING, e.REFUSED): (s.ENDED, (a.FAILED,)),
        (s.CONNECTING, e.ABANDON): (s.ENDED, (a.RELEASED,)),
        (s.CONNECTING, e.DEADLINE): (s.ENDED, (a.FAILED,)),
        (s.CONNECTING, e.PEER_SILENT): (s.CONNECTING, ()),
        (s.CONNECTING, e.PEER_ENDED): (s.ENDED, (a.FAILED,)),
        (s.REGISTERED, e.CONNECTED): (s.REGISTERED, (a.REGISTER,)),
        (s.REGISTERED, e.PROGRESS): (s.REGISTERED, ()),
        (s.REGISTERED, e.DONE): (s.ENDED, (a.RECEIVED,)),
        (s.REGISTERED, e.FAILED): (s.ENDED, (a.FAILED,)),
        (s.REGISTERED, e.CANCELLED): (s.ENDED, (a.FAILED,)),
        (s.REGISTERED, e.ABANDON): (s.ABANDONED, (a.CANCEL,)),
        (s.REGISTERED, e.DEADLINE): (s.CANCELLING, (a.CANCEL,)),
        (s.REGISTERED, e.PEER_SILENT): (s.REGISTERED, ()),
        (s.REGISTERED, e.PEER_ENDED): (s.ENDED, (a.FAILED,)),
        (s.REGISTERED, e.RETRY): (s.REGISTERED, (a.REGISTER,)),
        (s.CANCELLING, e.CONNECTED): (s.CANCELLING, (a.CANCEL,)),
        (s.CANCELLING, e.PROGRESS): (s.CANCELLING, ()),
        (s.CANCELLING, e.DONE): (s.ENDED, (a.RECEIVED,)),
        (s.CANCELLING, e.FAILED): (s.ENDED, (a.FAILED,)),
        (s.CANCELLING, e.CANCELLED): (s.ENDED, (a.FAILED,)),
        (s.CANCELLING, e.ABANDON): (s.ABANDONED, ()),
        (s.CANCELLING, e.PEER_SILENT): (s.CANCELLING, ()),
        (s.CANCELLING, e.PEER_ENDED): (s.ENDED, (a.FAILED,)),
        (s.CANCELLING, e.RETRY): (s.CANCELLING, (a.CANCEL,)),
        (s.ABANDONED, e.CONNECTED): (s.ABANDONED, (a.CANCEL,)),
        (s.ABANDONED, e.PROGRESS): (s.ABANDONED, ()),
        (s.ABANDONED, e.DONE): (s.ENDED, (a.RELEASED,)),
        (s.ABANDONED, e.FAILED): (s.ENDED, (a.RELEASED,)),
        (s.ABANDONED, e.CANCELLED): (s.ENDED, (a.RELEASED,)),
        (s.ABANDONED, e.ABANDON): (s.ABANDONED, ()),
        (s.ABANDONED, e.PEER_SILENT): (s.ABANDONED, ()),
        (s.ABANDONED, e.PEER_ENDED): (s.ENDED, (a.RELEASED,)),
        (s.ABANDONED, e.RETRY): (s.ABANDONED, (a.CANCEL,)),
        (s.ENDED, e.ABANDON): (s.ENDED, ()),
    }


SOURCE = _source_table()
DESTINATION = _destination_table()

EARLY = frozenset({SourceState.EARLY, SourceState.REFUSED_EARLY})
MAY_WRITE = frozenset({SourceState.PUSHING, SourceState.FINISHING})
AWAITS_QUIET = frozenset({SourceState.STOPPING, SourceState.STOPPING_ENDED})
PINS = frozenset({SourceState.HELD, SourceState.FINISHING, SourceState.STOPPING_ENDED})
OWES_SENT = PINS | {
    SourceState.OFFERED,
    SourceState.PUSHING,
    SourceState.DELIVERED,
    SourceState.STOPPING,
    SourceState.STOPPED,
}
FORGETTABLE = frozenset({SourceState.REFUSED_EARLY, SourceState.ENDED})
WRITABLE = frozenset({DestinationState.REGISTERED, DestinationState.CANCELLING, DestinationState.ABANDONED})


def step(
    table: Mapping[tuple[StateT, EventT], tuple[StateT, tuple[ActionT, ...]]], state: StateT, event: EventT
) -> tuple[StateT, tuple[ActionT, ...]] | None:
    """The state after the event and what to do, in order; None when the event does not fit and must be dropped."""
    return table.get((state, event))


class Keyed(Protocol):
    """What the ledger keeps: a ticket knows its key."""

    @property
    def key(self) -> LegKey: ...


TicketT = TypeVar("TicketT", bound=Keyed)


class Ledger(Generic[TicketT]):
    """The tickets of one side by key. Live ones stay; ended ones are remembered up to a bound, the oldest go first."""

    def __init__(self, most_ended: int) -> None:
        self._live: dict[LegKey, TicketT] = {}
        self._ended: OrderedDict[LegKey, TicketT] = OrderedDict()
        self._most_ended = most_ended

    def get(self, key: LegKey) -> TicketT | None:
        return self._live.get(key) or self._ended.get(key)

    def keep(self, ticket: TicketT, ended: bool) -> None:
        """Files a new ticket, or one that has just ended or come back to life."""
        here, there = (self._ended, self._live) if ended else (self._live, self._ended)
        there.pop(ticket.key, None)
        here[ticket.key] = ticket
        while len(self._ended) > self._most_ended:
            self._ended.popitem(last=False)

    def live(self) -> Iterator[TicketT]:
        """A snapshot: tickets may end while it is walked."""
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)
