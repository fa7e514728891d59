"""What the source side knows of one leg of a transfer, and what may be said of it: values and pure functions.

Owned by `source.py`, which alone changes a ticket.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from math import inf

from splitserve.core.worker import TransferStats
from splitserve.kv.cursor import Cursor
from splitserve.kv.layout import Slice, blocks_for, prompt_hash
from splitserve.kv.ledger import MAY_WRITE, SourceState
from splitserve.kv.messages import Cancelled, Done, Failed, Register
from splitserve.kv.ticket import LegKey, Offer, Table

Answer = Done | Failed | Cancelled


@dataclass(slots=True)
class SourceTicket:
    """`expires_at`: the claim's deadline, or the lease's end while HELD. `claimed`: digest of the accepted claim.
    `cursor`: once both offer and claim are there."""

    key: LegKey
    state: SourceState = SourceState.ABSENT
    offer: Offer | None = None
    register: Register | None = None
    claimed: bytes = b""
    cursor: Cursor | None = None
    expires_at: float = inf
    answer: Answer | None = None
    in_flight: int = 0
    bytes: int = 0
    bytes_before_prefill_ended: int = 0
    writes: int = 0
    writing_s: float = 0.0
    queued_s: float = 0.0
    prefill_ended_at: float | None = None
    last_write_done_at: float | None = None
    progress_at: float = 0.0

    @property
    def peer(self) -> str:
        return self.key.peer

    @property
    def may_write(self) -> bool:
        return self.cursor is not None and self.state in MAY_WRITE

    @property
    def stats(self) -> TransferStats:
        uncovered_s = 0.0
        if self.prefill_ended_at is not None and self.last_write_done_at is not None:
            uncovered_s = self.last_write_done_at - self.prefill_ended_at
        return TransferStats(
            self.bytes, self.bytes_before_prefill_ended, uncovered_s, self.writes, self.writing_s, self.queued_s
        )

    def wrote(self, bytes_written: int, took_s: float, now: float) -> None:
        """A WRITE has ended well."""
        self.bytes += bytes_written
        self.writes += 1
        self.writing_s += took_s
        self.last_write_done_at = now
        if self.prefill_ended_at is None or now <= self.prefill_ended_at:
            self.bytes_before_prefill_ended += bytes_written

    def failure(self, reason: str, message: str) -> Failed:
        return Failed(self.key.transfer_id, self.key.epoch, reason, message)

    def cancelled(self) -> Cancelled:
        return Cancelled(self.key.transfer_id, self.key.epoch)

    def shed(self) -> None:
        """It has ended, and thousands such are remembered: what answers a duplicate stays, tables and tokens go."""
        self.register, self.cursor, self.offer = None, None, None


def merged(stats: Sequence[TransferStats]) -> TransferStats:
    """Of one transfer over several legs: it has ended when the last one has."""
    return TransferStats(
        sum(each.bytes for each in stats),
        sum(each.bytes_before_prefill_ended for each in stats),
        max((each.uncovered_s for each in stats), default=0.0),
        sum(each.writes for each in stats),
        sum(each.writing_s for each in stats),
        max((each.queued_s for each in stats), default=0.0),
    )


def verdict(answer: Answer | None) -> tuple[str, str]:
    """Why a leg ended without success: what to count, and a sentence. Both empty when it succeeded."""
    match answer:
        case Failed():
            return answer.reason, answer.message
        case Cancelled():
            return "cancelled", "the decode worker cancelled its claim"
        case Done():
            return "", ""
    return "unknown", "the prefill ended without an answer to its claim"


def claim_digest(claim: Register) -> bytes:
    """Equal for the repetition of a claim alone."""
    numbers = chain([claim.tokens], *((t.first_block, len(t.blocks), *t.blocks) for t in claim.tables))
    return blake2b(claim.prompt_hash + array("q", numbers).tobytes(), digest_size=16).digest()


def tables_of(claim: Register) -> tuple[Table, ...]:
    return tuple(Table(table.first_block, table.blocks) for table in claim.tables)


def mismatch(offer: Offer, register: Register, cut: Slice | None) -> Failed | None:
    """Why this claim must not get this prefill's KV."""
    reason, message = _fault(offer, register, cut)
    return Failed(register.transfer_id, register.epoch, reason, message) if reason else None


def _fault(offer: Offer, register: Register, cut: Slice | None) -> tuple[str, str]:
    if cut is None:
        return "unconnected", "this rank has nothing of what the claim's rank holds, or can't write to it"
    if register.tokens > len(offer.tokens):
        return "blocks", f"the claim names {register.tokens} tokens, the prompt has {len(offer.tokens)}"
    if register.prompt_hash != prompt_hash(offer.tokens[: register.tokens]):
        return "prompt hash", "prompt_hash of the claim is not the prefill's: its KV belongs to another prompt"
    needed = blocks_for(register.tokens, cut.cell_tokens * cut.destination.cells)
    for group in set(cut.destination.groups):
        if group >= len(register.tables):
            return "blocks", f"the claim has {len(register.tables)} block tables, none for KV group {group}"
        table = register.tables[group]
        if table.first_block < needed != table.first_block + len(table.blocks):
            last = table.first_block + len(table.blocks) - 1
            return "blocks", f"the claim names blocks {table.first_block} to {last}, its tokens take {needed}"
    return "", ""
