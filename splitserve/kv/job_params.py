"""What our adapter tells our connector about a job: vLLM's `kv_transfer_params`, written and read here alone. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

from splitserve.core.worker import KvPeer, Ticket

SOURCE, DESTINATION = "source", "destination"


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
