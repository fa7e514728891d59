"""Which transfer a job takes part in, and what makes its request or its ticket unusable here. Pure."""

import json
from collections.abc import Collection

from splitserve.core.worker import DecodeJob, Failure, Job, KvMode, Outcome, PrefillJob, Ticket
from splitserve.engine.protocol import NEEDS_NO_TICKET
from splitserve.kv.transfer import TransferKey

Side = tuple[TransferKey, bool]  # True: the source's


def side_of(job: Job) -> Side | None:
    """None for a job without a ticket."""
    if job.ticket is None:
        return None
    return key_of(job.ticket), isinstance(job, PrefillJob)


def key_of(ticket: Ticket) -> TransferKey:
    return TransferKey(ticket.transfer_id, ticket.epoch)


def handover_of(ticket: Ticket) -> bytes:
    """What a source says in pull mode; here only which transfer it holds KV for."""
    return json.dumps({"transfer_id": ticket.transfer_id, "epoch": ticket.epoch}).encode()


def prompt_fault(job: Job, max_model_len: int, vocab_size: int) -> Outcome | None:
    """What only the engine knows to be wrong with a request."""
    output = job.output if isinstance(job, DecodeJob) else ()
    if not job.prompt:
        return _invalid("is empty; send at least one token")
    if len(job.prompt) + len(output) > max_model_len:
        return _invalid(f"has {len(job.prompt) + len(output)} tokens; the model takes {max_model_len}: shorten it")
    for token in (*job.prompt, *output):
        if not 0 <= token < vocab_size:
            return _invalid(f"token id {token} is outside the vocabulary of {vocab_size} tokens")
    return None


def request_fault(job: Job, loras: Collection[str], vocab_size: int) -> Outcome | None:
    """What this worker can't do for it, by field."""
    if job.lora and job.lora not in loras:
        known = ", ".join(loras) or "it has none"
        return _invalid(f"{job.lora!r} is none of this worker's adapters: {known}", "lora")
    if not isinstance(job, DecodeJob):
        return None
    if job.sampling.prompt_logprobs is not None and job.ticket is not None:
        return _invalid(NEEDS_NO_TICKET, "sampling.prompt_logprobs")
    outside = [token for token in job.sampling.logit_bias if not 0 <= token < vocab_size]
    if outside:
        sentence = f"token id {outside[0]} is outside the vocabulary of {vocab_size} tokens"
        return _invalid(sentence, "sampling.logit_bias")
    return None


def ticket_fault(ticket: Ticket, source: bool, uuid: str, mode: KvMode) -> Outcome | None:
    """Why the rank `uuid` can't be the ticket's source or destination."""
    named = [peer.uuid for peer in (ticket.source if source else ticket.destination)]
    if named != [uuid]:
        return not_transferred(f"the ticket names worker {', '.join(named)}; this is {uuid}")
    if mode is KvMode.PULL and not source and ticket.handover != handover_of(ticket):
        return not_transferred("the ticket has no handover of its source; in pull mode it comes with the decode")
    return None


def not_transferred(message: str) -> Outcome:
    return Outcome(failure=Failure.TRANSFER, message=message)


def _invalid(message: str, field: str = "prompt") -> Outcome:
    return Outcome(failure=Failure.INVALID, field=field, message=message)
