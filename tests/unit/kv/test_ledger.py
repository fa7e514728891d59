"""The two transition tables, walked exhaustively: every pair is defined, and the safety rules hold on every path."""

from itertools import product

import pytest

from splitserve.kv.ledger import (
    AWAITS_QUIET,
    DESTINATION,
    MAY_WRITE,
    OWES_SENT,
    PINS,
    SOURCE,
    WRITABLE,
    DestinationAction,
    DestinationEvent,
    DestinationState,
    Ledger,
    SourceAction,
    SourceEvent,
    SourceState,
    step,
)
from splitserve.kv.source_ticket import SourceTicket
from splitserve.kv.ticket import LegKey

PREFILL_OVER = {SourceEvent.PREFILL_ENDED, SourceEvent.PREFILL_ABORTED}
FENCES = {DestinationEvent.DONE, DestinationEvent.FAILED, DestinationEvent.CANCELLED, DestinationEvent.PEER_ENDED}
VERDICTS = {DestinationAction.RECEIVED, DestinationAction.FAILED, DestinationAction.RELEASED}
CLAIM_ANSWERS = {SourceAction.ANSWER, SourceAction.DELIVER, SourceAction.CONFIRM_CANCEL}


@pytest.mark.parametrize(("state", "event"), list(product(SourceState, SourceEvent)))
def test_every_source_pair_is_a_transition_or_a_drop(state: SourceState, event: SourceEvent) -> None:
    outcome = step(SOURCE, state, event)
    assert outcome is None or (isinstance(outcome[0], SourceState) and outcome[0] is not SourceState.ABSENT)


@pytest.mark.parametrize(("state", "event"), list(product(DestinationState, DestinationEvent)))
def test_every_destination_pair_is_a_transition_or_a_drop(state: DestinationState, event: DestinationEvent) -> None:
    outcome = step(DESTINATION, state, event)
    assert outcome is None or (isinstance(outcome[0], DestinationState) and outcome[0] is not DestinationState.ABSENT)


def test_every_state_can_be_reached_and_every_ending_from_every_state() -> None:
    assert _reachable(SOURCE, SourceState.ABSENT) == set(SourceState)
    assert _reachable(DESTINATION, DestinationState.ABSENT) == set(DestinationState)
    for state in SourceState:
        assert SourceState.ENDED in _reachable(SOURCE, state)
    for destination in DestinationState:
        assert DestinationState.ENDED in _reachable(DESTINATION, destination)


def test_blocks_that_were_named_to_a_source_are_given_up_only_after_a_fence() -> None:
    for (state, event), (after, actions) in DESTINATION.items():
        if state in WRITABLE:
            assert (after is DestinationState.ENDED) == (event in FENCES), (state, event)
            assert bool(VERDICTS & set(actions)) == (event in FENCES), (state, event)


def test_every_claim_gets_exactly_one_verdict() -> None:
    for (state, event), (after, actions) in DESTINATION.items():
        ends = state is not DestinationState.ENDED and after is DestinationState.ENDED
        assert len(VERDICTS & set(actions)) == ends, (state, event)


def test_an_abandoned_claim_is_released_and_never_reported_as_received_or_failed() -> None:
    verdicts = {
        action
        for (state, _), (_, actions) in DESTINATION.items()
        if state is DestinationState.ABANDONED
        for action in VERDICTS & set(actions)
    }
    assert verdicts == {DestinationAction.RELEASED}


def test_every_fence_ends_every_state_that_a_source_may_write_to() -> None:
    for state, event in product(WRITABLE, FENCES):
        outcome = step(DESTINATION, state, event)
        assert outcome is not None
        assert outcome[0] is DestinationState.ENDED


def test_silence_changes_nothing() -> None:
    for (state, event), (after, actions) in DESTINATION.items():
        if event is DestinationEvent.PEER_SILENT:
            assert (after, actions) == (state, ())


def test_a_claim_that_may_have_writes_in_flight_is_answered_only_when_it_has_none() -> None:
    for (state, event), (_, actions) in SOURCE.items():
        if state in MAY_WRITE | AWAITS_QUIET and CLAIM_ANSWERS & set(actions):
            assert event in {SourceEvent.ALL_WRITTEN, SourceEvent.QUIET}, (state, event)


def test_blocks_that_writes_may_read_are_given_back_only_when_none_is_in_flight() -> None:
    for (state, event), (_, actions) in SOURCE.items():
        if state in MAY_WRITE | AWAITS_QUIET and SourceAction.SENT in actions:
            assert event in {SourceEvent.ALL_WRITTEN, SourceEvent.QUIET}, (state, event)


def test_every_offered_prefill_is_sent_exactly_once_and_then_owes_nothing() -> None:
    for (state, event), (after, actions) in SOURCE.items():
        assert actions.count(SourceAction.SENT) <= 1
        if state in OWES_SENT:
            assert (SourceAction.SENT in actions) == (after not in OWES_SENT), (state, event)
        if SourceAction.SENT in actions:
            assert after is SourceState.ENDED


def test_no_source_state_writes_again_once_its_claim_is_over() -> None:
    stopped = {SourceState.STOPPED, SourceState.ENDED, SourceState.DELIVERED} | AWAITS_QUIET
    for state in stopped:
        assert not _reachable(SOURCE, state) & MAY_WRITE, state


def test_a_prefill_over_leads_to_sent_whatever_else_happens() -> None:
    """From every state in which it ended, each further event either keeps it pinned or says SENT."""
    for state in PINS:
        for event in SourceEvent:
            outcome = step(SOURCE, state, event)
            if outcome is not None:
                after, actions = outcome
                assert after in PINS or SourceAction.SENT in actions, (state, event)


def test_the_engines_own_endings_are_never_dropped_while_it_waits_for_sent() -> None:
    running = OWES_SENT - PINS
    for state, event in product(running, PREFILL_OVER):
        assert step(SOURCE, state, event) is not None, (state, event)
    for state in PINS:
        assert step(SOURCE, state, SourceEvent.PREFILL_ABORTED) is not None


def test_a_register_or_cancel_is_always_answered_or_awaited() -> None:
    for state, event in product(SourceState, (SourceEvent.REGISTER, SourceEvent.CANCEL)):
        assert step(SOURCE, state, event) is not None, (state, event)


def test_a_wrong_prompt_hash_never_leads_to_a_write() -> None:
    for (state, event), (after, actions) in SOURCE.items():
        if event in {SourceEvent.REGISTER_MISMATCH, SourceEvent.OFFER_MISMATCH}:
            assert after not in MAY_WRITE, (state, event)
            assert SourceAction.ANSWER in actions, (state, event)


def _reachable(table: object, start: object) -> set[object]:
    found, frontier = {start}, [start]
    while frontier:
        here = frontier.pop()
        for (state, _), (after, _) in table.items():  # type: ignore[attr-defined]
            if state is here and after not in found:
                found.add(after)
                frontier.append(after)
    return found


def _ticket(number: int) -> SourceTicket:
    return SourceTicket(LegKey(f"t{number}", 1, "decoder"))


def test_the_ledger_forgets_the_oldest_ended_tickets_and_never_a_live_one() -> None:
    ledger: Ledger[SourceTicket] = Ledger(most_ended=2)
    tickets = [_ticket(number) for number in range(5)]
    for ticket in tickets:
        ledger.keep(ticket, ended=False)
    for ticket in tickets[:4]:
        ledger.keep(ticket, ended=True)
    assert [ledger.get(ticket.key) for ticket in tickets] == [None, None, *tickets[2:]]
    assert list(ledger.live()) == [tickets[4]]


def test_an_ended_ticket_that_comes_back_to_life_is_live_again() -> None:
    ledger: Ledger[SourceTicket] = Ledger(most_ended=1)
    ticket = _ticket(1)
    ledger.keep(ticket, ended=True)
    ledger.keep(ticket, ended=False)
    ledger.keep(_ticket(2), ended=True)
    ledger.keep(_ticket(3), ended=True)
    assert ledger.get(ticket.key) is ticket
    assert len(ledger) == 1
