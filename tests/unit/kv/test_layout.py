"""Blocks, bytes and prompt hashes of KV, and which bytes of which rank go to which other.

The property tests move KV between all ranks of two workers, element by element, for all small shapes of the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import cycle, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.core.worker import KvFormat, KvMode, KvPart
from splitserve.kv.cursor import Cursor, PrefillProgress, Span
from splitserve.kv.layout import (
    Shard,
    Slice,
    block_bytes,
    blocks_for,
    fault_of,
    first_kept_block,
    format_difference,
    full_blocks,
    overlaps,
    part_of,
    prompt_hash,
    prompt_kv_bytes,
    slice_between,
)
from splitserve.kv.ticket import Table
from tests.unit.kv.numbered import Array, Shape, copy, elements, flat, format_of, held, holders, memory_of, place

KV = KvFormat("abc", "float32", 16, 4, 2, 8, 2048, KvMode.PUSH, "shm")
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=50)


@given(st.integers(0, 10_000), st.integers(1, 512))
def test_blocks_hold_all_tokens_and_not_one_block_more(count: int, size: int) -> None:
    blocks = blocks_for(count, size)
    assert blocks * size >= count > (blocks - 1) * size or count == blocks == 0
    assert blocks - full_blocks(count, size) == (count % size != 0)


def test_a_block_holds_keys_and_values_of_all_heads() -> None:
    assert block_bytes(block_size=128, kv_heads=8, head_dim=64, dtype_bytes=2) == 2 * 128 * 8 * 64 * 2


def test_a_prompts_kv_is_whole_blocks_in_every_layer() -> None:
    assert prompt_kv_bytes(17, KV) == 2 * 2048 * 4
    assert prompt_kv_bytes(16, KV) == 1 * 2048 * 4


@given(tokens, tokens)
def test_prompt_hashes_agree_exactly_when_the_prompts_do(one: list[int], other: list[int]) -> None:
    assert (prompt_hash(one) == prompt_hash(other)) == (one == other)
    assert prompt_hash(tuple(one)) == prompt_hash(one)
    assert len(prompt_hash(one)) == 16


def test_the_prompt_hash_is_blake2b_over_little_endian_int32() -> None:
    assert prompt_hash([1, 258]) == blake2b(b"\x01\x00\x00\x00\x02\x01\x00\x00", digest_size=16).digest()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "other"),
        ("dtype", "bfloat16"),
        ("block_size", 32),
        ("layers", 5),
        ("kv_heads", 4),
        ("head_dim", 16),
        ("block_bytes", 1),
        ("mode", KvMode.PULL),
        ("transport", "nixl"),
    ],
)
def test_a_format_that_differs_is_refused_with_the_field_named(field: str, value: object) -> None:
    changes: dict[str, Any] = {field: value}
    sentence = format_difference(KV, replace(KV, **changes))
    assert f"kv.{field} is" in sentence
    assert str(value) in sentence
    assert format_difference(KV, replace(KV)) == ""


@pytest.mark.parametrize(
    ("mode", "transport", "refused"),
    [(KvMode.PUSH, "nixl", False), (KvMode.PUSH, "shm", True), (KvMode.PULL, "nixl", True)],
)
def test_push_over_nixl_alone_translates_between_block_sizes(mode: KvMode, transport: str, refused: bool) -> None:
    ours = replace(KV, mode=mode, transport=transport)
    theirs = replace(ours, block_size=32, block_bytes=2 * ours.block_bytes)
    assert format_difference(ours, theirs).startswith("kv.block_size is '16' here and '32' there") is refused


def test_blocks_of_one_size_that_take_different_bytes_are_refused() -> None:
    ours = replace(KV, transport="nixl")
    assert format_difference(ours, replace(ours, block_bytes=4096)).startswith("kv.block_bytes is '2048' here")
    assert format_difference(ours, replace(ours, block_size=32)).startswith("kv.block_bytes is '2048' here")


SHARD = Shard(KvPart(1, 2, 0, 1, tensor_rank=0, replica=0, replicas=1), KV.block_size, (0, 1))


def _part(**changes: int) -> Shard:
    return replace(SHARD, part=replace(SHARD.part, **changes))


@pytest.mark.parametrize(
    ("shard", "named"),
    [
        (replace(SHARD, block_size=0), "block_size"),
        (replace(SHARD, block_size=32), "block_size"),
        (replace(SHARD, groups=(0,)), "groups"),
        (replace(SHARD, groups=(0, -1)), "groups"),
        (_part(first_layer=-1), "layers"),
        (_part(first_layer=3), "layers"),
        (_part(layers=0), "layers"),
        (_part(first_head=2), "heads"),
        (_part(first_head=-1), "heads"),
        (_part(heads=0), "heads"),
        (_part(replica=1), "replica"),
        (_part(replicas=0), "replica"),
        (_part(tensor_rank=-1), "tensor rank"),
    ],
)
def test_a_rank_that_cannot_be_part_of_this_kv_is_refused_with_the_field_named(shard: Shard, named: str) -> None:
    assert fault_of(SHARD, KV) == ""
    assert named in fault_of(shard, KV)


# Parts ---------------------------------------------------------------------------------------------------------------
HEADS_AND_RANKS = [
    (heads, ranks) for heads, ranks in product((1, 2, 3, 4), (1, 2, 3, 4)) if heads % ranks == 0 or ranks % heads == 0
]


@pytest.mark.parametrize(("heads", "ranks"), [*HEADS_AND_RANKS, (2, 8), (8, 2)])
def test_every_head_is_held_by_as_many_ranks_as_every_other(heads: int, ranks: int) -> None:
    parts = [part_of(rank, ranks, heads, 0, 1) for rank in range(ranks)]
    count = sum(holders(part, 1, heads).astype(int) for part in parts)
    assert np.all(count == max(1, ranks // heads))
    assert {part.replicas for part in parts} == {max(1, ranks // heads)}


@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 30])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_the_first_kept_block_is_the_first_that_the_next_token_looks_at(size: int, window: int | None) -> None:
    for tokens in range(40):
        looked_at = [position for position in range(tokens + 1) if window is None or tokens - position < window]
        assert first_kept_block(tokens, size, window) == looked_at[0] // size


# What goes where -----------------------------------------------------------------------------------------------------
SLOT, UNWRITTEN = 2, -1


@dataclass(frozen=True, slots=True)
class Move:
    """`tokens` tokens, the first of a prompt, from all ranks of one worker to all of another. In group g the
    destination has the blocks before `first_blocks[g]`."""

    layers: int
    heads: int
    source: Shape
    destination: Shape
    tokens: int
    prompt: int
    first_blocks: tuple[int, int] = (0, 0)


@dataclass
class Moved:
    """What became of it: the destination's memories, and how often each element was written."""

    move: Move
    whole: Array = field(init=False)
    claimed: list[Table] = field(init=False)
    shards: list[Shard] = field(init=False)
    memories: list[Array] = field(init=False)
    written: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        move = self.move
        self.whole = np.arange(move.layers * move.heads * move.prompt * SLOT, dtype=np.int32).reshape(
            move.layers, move.heads, move.prompt, SLOT
        )
        total = blocks_for(move.tokens, move.destination.block_size)
        firsts = [min(first, total) for first in move.first_blocks]
        self.claimed = [Table(first, _scattered(total - first, group)) for group, first in enumerate(firsts)]
        self.shards = move.destination.shards(move.layers, move.heads)
        self.memories = [memory_of(shard, 2 * total + 2, SLOT, UNWRITTEN, np.int32) for shard in self.shards]
        self.written = [np.zeros_like(memory) for memory in self.memories]
        for shard in move.source.shards(move.layers, move.heads):
            self._write_from(shard)

    def _write_from(self, source: Shard) -> None:
        """All that one source rank writes."""
        move = self.move
        total = blocks_for(move.prompt, move.source.block_size)
        tables = [_scattered(total, group) for group in range(2)]
        memory = memory_of(source, 2 * total + 2, SLOT, -2, np.int32)
        place(memory, source, tables, self.whole, range(move.prompt))
        progress = PrefillProgress(source.part.first_layer, source.part.layers)
        progress.computing(tables)
        progress.computed(None, move.prompt)
        for shard, target, count in zip(self.shards, self.memories, self.written, strict=True):
            cut = slice_between(source, shard, format_of(move.source, move.layers, move.heads, SLOT))
            assert (cut is not None) == overlaps(source.part, shard.part)
            if cut is None:
                continue
            cursor = Cursor(progress, cut, move.tokens, self.claimed)
            for layer, span in _spans(cursor):
                copy(cut, layer - cut.first_layer, span, (source, memory), (shard, target))
                _count(cut, layer - cut.first_layer, span, shard, count)

    def check(self) -> None:
        """Every element that was claimed was written once and is the right one; no other was touched."""
        move = self.move
        size, cell = move.destination.block_size, int(np.gcd(move.source.block_size, move.destination.block_size))
        tables = [(-1,) * table.first_block + table.blocks for table in self.claimed]
        tokens = [range(table.first_block * size, move.tokens) for table in self.claimed]
        for shard, memory, count in zip(self.shards, self.memories, self.written, strict=True):
            assert held(memory, shard, tables, self.whole, tokens), move
            due = np.zeros_like(count)
            for layer, group in enumerate(shard.groups):
                for position in range(tokens[group].start, blocks_for(move.tokens, cell) * cell):
                    due[layer, tables[group][position // size], :, position % size] = 1
            assert np.array_equal(count, due), move
            assert np.all(memory[due == 0] == UNWRITTEN), move


def _scattered(count: int, group: int) -> tuple[int, ...]:
    """A block table out of order; no two groups share a block."""
    return tuple(2 * block + 1 + group for block in range(count))[::-1]


def _spans(cursor: Cursor) -> Iterator[tuple[int, Span]]:
    for layer in cursor.layers:
        while span := cursor.take(layer, 3):
            yield layer, span
    assert cursor.complete


def _count(cut: Slice, layer: int, span: Span, shard: Shard, count: Array) -> None:
    blocks, within = elements(cut, cut.destination, shard, SLOT, layer, span.destination)
    there = flat(count)[cut.destination.first_layer + layer]
    hits = np.bincount((blocks * there.shape[1] + within).ravel(), minlength=there.size)
    there += hits.reshape(there.shape)


def _all_parallelisms() -> Iterator[tuple[int, int, int, int, int, int]]:
    """Layers, heads, and the tensor and pipeline sizes of source and destination: all small ones."""
    for layers, (heads, source), (same, destination) in product(range(1, 5), HEADS_AND_RANKS, HEADS_AND_RANKS):
        if same == heads:
            for stages_p, stages_d in product(range(1, layers + 1), repeat=2):
                yield layers, heads, source, destination, stages_p, stages_d


def test_every_byte_is_written_once_and_rightly_for_all_small_parallelisms() -> None:
    """(heads, TP_p, TP_d, layers, PP_p, PP_d); what else can differ goes round."""
    sizes, tokens = cycle([(4, 4), (2, 4), (4, 2), (4, 6), (3, 2)]), cycle([7, 4, 1, 6, 3, 5, 2])
    windows, firsts = cycle([False, True]), cycle([(0, 0), (0, 1), (1, 0)])
    count = 0
    for layers, heads, tensor_p, tensor_d, stages_p, stages_d in _all_parallelisms():
        (size_p, size_d), windowed, claimed = next(sizes), next(windows), next(tokens)
        source = Shape(tensor_p, stages_p, size_p, windowed)
        destination = Shape(tensor_d, stages_d, size_d, windowed)
        Moved(Move(layers, heads, source, destination, claimed, claimed + count % 2, next(firsts))).check()
        count += 1
    assert count == 1140


def test_every_byte_is_written_once_and_rightly_for_all_small_blocks_and_prompts() -> None:
    """Block sizes against each other, prompts that end within a block, blocks that the destination has."""
    count = 0
    for size_p, size_d, claimed, more in product(range(1, 5), range(1, 5), range(10), (0, 3)):
        for first in range(blocks_for(claimed, size_d) + 1):
            source, destination = Shape(2, 1, size_p, True), Shape(1, 1, size_d, True)
            Moved(Move(2, 2, source, destination, claimed, claimed + more, (0, first))).check()
            count += 1
    assert count > 1000


@pytest.mark.parametrize("spoiled", ["an element", "twice", "beyond"])
def test_a_wrong_byte_a_second_write_and_one_beyond_the_claim_are_seen(spoiled: str) -> None:
    """The negative twin of the tests above: each part of their check can fail."""
    moved = Moved(Move(2, 2, Shape(2, 1), Shape(1, 2), 6, 6))
    moved.check()
    block = moved.claimed[0].blocks[0]
    if spoiled == "an element":
        moved.memories[1][0, block, 1, 2, 1] += 1
    elif spoiled == "twice":
        moved.written[1][0, block, 1, 2, 1] += 1
    else:
        moved.memories[1][0, 0, 0, 0, 0] = 5
    with pytest.raises(AssertionError):
        moved.check()


def test_heads_that_several_ranks_hold_are_written_by_as_many_of_them_as_there_are_receivers() -> None:
    """Two replicas of each head on one side, four on the other: no rank writes to all."""
    source, destination = Shape(tensor=4).shards(1, 2), Shape(tensor=8).shards(1, 2)
    served = [sum(overlaps(one.part, other.part) for other in destination) for one in source]
    assert served == [2, 2, 2, 2]


def test_equal_ranks_with_equal_blocks_move_whole_blocks() -> None:
    kv = format_of(Shape(), 2, 2, SLOT)
    one, other = Shape(2).shards(2, 2), Shape(2).shards(2, 2)
    cut = slice_between(one[1], other[1], kv)
    assert cut is not None
    assert cut.whole_blocks
    assert cut.source == cut.destination
    assert (cut.cell_tokens, cut.cell_bytes) == (4, 4 * SLOT)
    assert slice_between(one[0], other[1], kv) is None
    parted = slice_between(Shape(1).shards(2, 2)[0], other[1], kv)
    assert parted is not None
    assert not parted.whole_blocks
