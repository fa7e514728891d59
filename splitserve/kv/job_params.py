"""What our adapter tells what is ours inside vLLM about a job: the connector by vLLM's `kv_transfer_params`; in its
`extra_args`, what the job's grammar is to start from, and the scheduler what its objectives are. Written and read here
alone. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from splitserve.core.worker import KvPeer, Objectives, Ticket

SOURCE, DESTINATION = "source", "destination"
_GRAMMAR = "splitserve_grammar"
_PACE = "splitserve_pace"
_STOCK_DESTINATION = "do_remote_prefill"  # of vLLM's own connector


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


def pace_params(objectives: Objectives, made_elsewhere: int) -> dict[str, Any]:
    """For vLLM's `extra_args`: what the job is to meet from now on, and its output tokens that are made already."""
    if objectives == Objectives() and not made_elsewhere:
        return {}
    return {_PACE: [objectives.first_token_s, objectives.tpot_s, objectives.itl_s, made_elsewhere]}


def pace_of(extra_args: Mapping[str, Any] | None) -> tuple[Objectives, int]:
    """`pace_params`, read."""
    said = (extra_args or {}).get(_PACE)
    return (Objectives(*said[:3]), said[3]) if said is not None else (Objectives(), 0)


def waits_for_kv(params: Mapping[str, Any] | None) -> bool:
    """Whether a job with these `kv_transfer_params` gets its KV from elsewhere, in either mode."""
    return params is not None and (params.get("side") == DESTINATION or bool(params.get(_STOCK_DESTINATION)))


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
