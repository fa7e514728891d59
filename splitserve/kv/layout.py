"""What a prompt's KV is in blocks and bytes, and whether two workers' KV fits. Pure.

Not here: where the blocks lie in memory (`transport.Region`), or when they may be written (`ledger.py`).
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b

from splitserve.core.worker import KvFormat

PROMPT_HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks of one layer to copy: the source's block `source[i]` into the destination's block `destination[i]`."""

    source: tuple[int, ...]
    destination: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` tokens take, the last one perhaps partly filled."""
    return -(-tokens // block_size)


def full_blocks(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` tokens fill completely: those that later tokens do not change."""
    return tokens // block_size


def block_bytes(block_size: int, kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Bytes of one block of one layer: keys and values."""
    return 2 * block_size * kv_heads * head_dim * dtype_bytes


def prompt_kv_bytes(tokens: int, kv: KvFormat) -> int:
    """Bytes of a prompt's KV in whole blocks over all layers: what a transfer of it moves."""
    return blocks_for(tokens, kv.block_size) * kv.block_bytes * kv.layers


def prompt_hash(token_ids: Sequence[int]) -> bytes:
    """16 bytes that agree exactly when the prompts do: blake2b over the ids as little-endian int32."""
    ids = array("i", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return blake2b(ids.tobytes(), digest_size=PROMPT_HASH_BYTES).digest()


def span(table: Sequence[int], claimed: Sequence[int], first_block: int, begin: int, end: int) -> Span:
    """The copies for prompt blocks `begin` to `end` (exclusive): `table[i]` holds the prompt's block i at the source,
    `claimed[i]` receives its block `first_block + i` at the destination."""
    assert first_block <= begin <= end <= min(len(table), first_block + len(claimed))
    return Span(tuple(table[begin:end]), tuple(claimed[begin - first_block : end - first_block]))


def differing_field(ours: KvFormat, theirs: KvFormat) -> str:
    """The first field that disagrees; empty when one worker may write the other's KV."""
    names = (field.name for field in fields(KvFormat))
    return next((name for name in names if getattr(ours, name) != getattr(theirs, name)), "")


def format_difference(ours: KvFormat, theirs: KvFormat) -> str:
    """Empty when one worker may write the other's KV, else a sentence naming the first field that disagrees."""
    name = differing_field(ours, theirs)
    if not name:
        return ""
    mine, other = str(getattr(ours, name)), str(getattr(theirs, name))
    return f"kv.{name} is {mine!r} here and {other!r} there; it must be the same on all workers"
