"""What our adapter tells our connector about a job: vLLM's `kv_transfer_params`, and what its grammar is to start from,
in vLLM's `extra_args`. Written and read here alone. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from splitserve.core.worker import KvPeer, Ticket

SOURCE, DESTINATION = "source", "destination"
_GRAMMAR = "splitserve_grammar"


@dataclass(frozen=True, slots=True)
class GrammarStart:
    """Where a structured output's grammar stands when its request starts here. `constrains`: it does at once; else only
    after the reasoning has ended. `accepted`: so many tokens, at the prompt's end, it has accepted elsewhere."""

    constrains: bool
    accepted: int


def grammar_params(start: GrammarStart | None) -> dict[str, Any]:
    """For vLLM's `extra_args`."""
    return {_GRAMMAR: [start.constrains, start.accepted]} if start is not None else {}


def grammar_of(extra_args: Mapping[str, Any] | None) -> GrammarStart | None:
    said = (extra_args or {}).get(_GRAMMAR)
    return GrammarStart(*said) if said is not None else None


def job_params(job_id: str) -> dict[str, Any]:
    """Of a job without a ticket."""
    return {"job_id": job_id}


def ticket_params(job_id: str, ticket: Ticket, side: str, deadline_s: float) -> dict[str, Any]:
    """Of a job whose engine is on `side` of this ticket."""
    peers = ticket.destination if side == SOURCE else ticket.source
    return {
        "job_id": job_id,
        "side": side,
        "transfer_id": ticket.transfer_id,
        "epoch": ticket.epoch,
        "peers": msgspec.to_builtins(peers),
        "deadline_s": deadline_s,
    }


def peers_of(params: Mapping[str, Any]) -> tuple[KvPeer, ...]:
    """The other worker's ranks."""
    return msgspec.convert(params["peers"], tuple[KvPeer, ...])
