"""What the source side knows of one transfer, and what may be said of it: values and pure functions.

Owned by `source.py`, which alone changes a ticket.
"""

from array import array
from dataclasses import dataclass
from hashlib import blake2b
from math import inf

from splitserve.core.worker import TransferStats
from splitserve.kv.cursor import Cursor
from splitserve.kv.ledger import PINS, SourceState
from splitserve.kv.messages import Cancelled, Done, Failed, Register
from splitserve.kv.ticket import Offer, TransferKey

Answer = Done | Failed | Cancelled


@dataclass(slots=True)
class SourceTicket:
    """`expires_at`: the claim's deadline, or the lease's end while HELD. `claimed`: digest of the accepted claim."""

    key: TransferKey
    cursor: Cursor
    state: SourceState = SourceState.ABSENT
    destination: str = ""
    offer: Offer | None = None
    register: Register | None = None
    claimed: bytes = b""
    expires_at: float = inf
    answer: Answer | None = None
    in_flight: int = 0
    bytes: int = 0
    bytes_before_prefill_ended: int = 0
    prefill_ended_at: float | None = None
    last_write_done_at: float | None = None
    progress_at: float = 0.0
    progress_told: int = 0

    @property
    def stats(self) -> TransferStats:
        uncovered_s = 0.0
        if self.prefill_ended_at is not None and self.last_write_done_at is not None:
            uncovered_s = self.last_write_done_at - self.prefill_ended_at
        return TransferStats(self.bytes, self.bytes_before_prefill_ended, uncovered_s)

    @property
    def pinned_blocks(self) -> int:
        return self.offer.prompt_blocks if self.offer is not None and self.state in PINS else 0

    def failure(self, reason: str, message: str) -> Failed:
        return Failed(self.key.transfer_id, self.key.epoch, reason, message)

    def cancelled(self) -> Cancelled:
        return Cancelled(self.key.transfer_id, self.key.epoch)

    def shed(self) -> None:
        """It has ended, and thousands such are remembered: what answers a duplicate stays, the block tables go."""
        self.register, self.cursor = None, Cursor(len(self.cursor.layers))


def verdict(answer: Answer | None) -> tuple[str, str]:
    """Why a transfer ended without success: what to count, and a sentence. Both empty when it succeeded."""
    match answer:
        case Failed():
            return answer.reason, answer.message
        case Cancelled():
            return "cancelled", "the decode worker cancelled its claim"
        case Done():
            return "", ""
    return "unknown", "the prefill ended without an offer"


def claim_digest(claim: Register) -> bytes:
    """Equal for the repetition of a claim alone."""
    table = array("q", (claim.first_block, *claim.blocks))
    return blake2b(claim.prompt_hash + table.tobytes(), digest_size=16).digest()


def mismatch(offer: Offer, register: Register) -> Failed | None:
    """Why this claim must not get this prefill's KV."""
    if register.prompt_hash != offer.prompt_hash:
        message = "prompt_hash of the claim is not the prefill's: its KV belongs to another prompt"
        return Failed(register.transfer_id, register.epoch, "prompt hash", message)
    if register.first_block + len(register.blocks) > offer.prompt_blocks:
        message = (
            f"the claim names blocks {register.first_block} to {register.first_block + len(register.blocks) - 1}, "
            f"the prompt has {offer.prompt_blocks}"
        )
        return Failed(register.transfer_id, register.epoch, "blocks", message)
    return None
