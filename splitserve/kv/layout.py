"""What a prompt's KV is in blocks and bytes, whether two workers' KV fits, and which bytes go from which rank to which.
Pure.

A rank holds some layers and some heads (`KvPart`) in blocks of its own size (`Shard`). What one rank writes of
another's KV is their `Slice`: the layers and heads that both hold, in cells of as many tokens as both block sizes are
multiples of. Where several ranks hold the same head, exactly one of them writes it to any one destination.

Not here: where the blocks lie in memory (`transport.Region`), or when they may be written (`ledger.py`).
"""

import math
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b

from splitserve.core.worker import KvFormat, KvMode, KvPart

PROMPT_HASH_BYTES = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part in its blocks: heads outermost, then tokens, then keys and values. `groups[i]` is the block table
    that holds layer `part.first_layer + i`."""

    part: KvPart
    block_size: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a slice lies at one of its ends. Cell c of a block is the byte ranges `runs[c]`, as (offset, bytes)."""

    first_layer: int  # among this rank's layers
    groups: tuple[int, ...]  # block table of each layer of the slice
    runs: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def cells(self) -> int:
        """Cells in a block."""
        return len(self.runs)


@dataclass(frozen=True, slots=True)
class Slice:
    """What one source rank writes of one destination rank's KV. Layers count over the whole model."""

    first_layer: int
    layers: int
    cell_tokens: int
    cell_bytes: int
    source: Cut
    destination: Cut
    whole_blocks: bool  # every cell is a whole block at both ends


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


def tokens_to_move(tokens: int) -> int:
    """A decode takes over the KV of all its tokens but the last, which it computes itself to get the next. So a prefill
    need not compute that one either; and in layers with a sliding window it must not, for it would push the first block
    that the decode looks at out of the window."""
    return tokens - 1


def first_kept_block(tokens: int, block_size: int, window: int | None) -> int:
    """The first block that the token after `tokens` tokens looks at, in layers with a sliding window of `window`."""
    return 0 if window is None else max(0, tokens + 1 - window) // block_size


def prompt_hash(token_ids: Sequence[int]) -> bytes:
    """16 bytes that agree exactly when the prompts do: blake2b over the ids as little-endian int32."""
    ids = array("i", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return blake2b(ids.tobytes(), digest_size=PROMPT_HASH_BYTES).digest()


def part_of(tensor_rank: int, tensor_size: int, kv_heads: int, first_layer: int, layers: int) -> KvPart:
    """A rank's part as tensor parallelism deals heads out: in runs, or each to several ranks if there are more.
    One of the two numbers divides the other."""
    assert kv_heads % tensor_size == 0 or tensor_size % kv_heads == 0
    heads, replicas = max(1, kv_heads // tensor_size), max(1, tensor_size // kv_heads)
    first_head = tensor_rank // replicas * heads
    return KvPart(first_layer, layers, first_head, heads, tensor_rank, tensor_rank % replicas, replicas)


def overlaps(source: KvPart, destination: KvPart) -> bool:
    """Whether the one rank writes anything of the other's."""
    serves = destination.tensor_rank % source.replicas == source.replica
    return serves and bool(_common_layers(source, destination)) and bool(_common_heads(source, destination))


def slice_between(source: Shard, destination: Shard, kv: KvFormat) -> Slice | None:
    """What the one rank writes of the other's KV; None if nothing."""
    if not overlaps(source.part, destination.part):
        return None
    layers, heads = _common_layers(source.part, destination.part), _common_heads(source.part, destination.part)
    tokens = math.gcd(source.block_size, destination.block_size)
    slot_bytes = kv.block_bytes // (kv.block_size * kv.kv_heads)  # one token of one head of one layer
    same_blocks = source.block_size == destination.block_size
    same_heads = source.part.heads == destination.part.heads == len(heads)
    runs = [heads] if same_blocks else [range(head, head + 1) for head in heads]  # contiguous at both ends
    return Slice(
        first_layer=layers.start,
        layers=len(layers),
        cell_tokens=tokens,
        cell_bytes=tokens * len(heads) * slot_bytes,
        source=_cut(source, layers, runs, tokens, slot_bytes),
        destination=_cut(destination, layers, runs, tokens, slot_bytes),
        whole_blocks=same_heads and same_blocks,
    )


def differing_field(ours: KvFormat, theirs: KvFormat) -> str:
    """The first field that disagrees; empty when one worker may write the other's KV. Push over NIXL translates between
    block sizes; nothing else does."""
    free = {"block_size", "block_bytes"} if ours.mode is KvMode.PUSH and ours.transport == "nixl" else set()
    names = (field.name for field in fields(KvFormat) if field.name not in free)
    first = next((name for name in names if getattr(ours, name) != getattr(theirs, name)), "")
    same_tokens = ours.block_bytes * theirs.block_size == theirs.block_bytes * ours.block_size  # bytes of one token
    return first or ("" if same_tokens else "block_bytes")


def fault_of(shard: Shard, kv: KvFormat) -> str:
    """Empty for what can be a rank's part of this KV, else a sentence: a peer's word is checked before it is used."""
    part = shard.part
    if shard.block_size != kv.block_size or shard.block_size < 1:
        return f"shard.block_size is {shard.block_size}, kv.block_size {kv.block_size}; they must be the same"
    if part.first_layer < 0 or part.layers < 1 or part.first_layer + part.layers > kv.layers:
        return f"shard.part names {part.layers} layers from {part.first_layer}; there are {kv.layers}"
    if part.first_head < 0 or part.heads < 1 or part.first_head + part.heads > kv.kv_heads:
        return f"shard.part names {part.heads} KV heads from {part.first_head}; there are {kv.kv_heads}"
    if not 0 <= part.replica < part.replicas or part.tensor_rank < 0:
        return f"shard.part is replica {part.replica} of {part.replicas} at tensor rank {part.tensor_rank}"
    if len(shard.groups) != part.layers or min(shard.groups) < 0:
        return f"shard.groups names a block table for {len(shard.groups)} of {part.layers} layers"
    return ""


def format_difference(ours: KvFormat, theirs: KvFormat) -> str:
    """Empty when one worker may write the other's KV, else a sentence naming the first field that disagrees."""
    name = differing_field(ours, theirs)
    if not name:
        return ""
    mine, other = str(getattr(ours, name)), str(getattr(theirs, name))
    return f"kv.{name} is {mine!r} here and {other!r} there; it must be the same on all workers"


def _common_layers(one: KvPart, other: KvPart) -> range:
    end = min(one.first_layer + one.layers, other.first_layer + other.layers)
    return range(max(one.first_layer, other.first_layer), end)


def _common_heads(one: KvPart, other: KvPart) -> range:
    return range(max(one.first_head, other.first_head), min(one.first_head + one.heads, other.first_head + other.heads))


def _cut(shard: Shard, layers: range, runs: Sequence[range], cell_tokens: int, slot_bytes: int) -> Cut:
    first = layers.start - shard.part.first_layer
    cells = range(shard.block_size // cell_tokens)
    return Cut(
        first_layer=first,
        groups=shard.groups[first : first + len(layers)],
        runs=tuple(tuple(_run(shard, heads, cell, cell_tokens, slot_bytes) for heads in runs) for cell in cells),
    )


def _run(shard: Shard, heads: range, cell: int, cell_tokens: int, slot_bytes: int) -> tuple[int, int]:
    """Where a cell of these heads begins in its block, and its length in bytes."""
    first_slot = (heads.start - shard.part.first_head) * shard.block_size + cell * cell_tokens
    return first_slot * slot_bytes, len(heads) * cell_tokens * slot_bytes
