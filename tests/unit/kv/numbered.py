"""KV in which every element can be told from every other, in the memories of ranks that each hold a part of it.

A rank's memory is an array of (layer, block, head, token of the block, element of the slot): the layout that
`kv/layout` describes, built and read here without asking it. A slot is what one head of one layer keeps of one token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from splitserve.core.worker import KvFormat, KvMode, KvPart
from splitserve.kv.cursor import Span
from splitserve.kv.layout import Cut, Shard, Slice, part_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """A worker's parallelism and blocks. `windowed`: every other layer belongs to a second KV group."""

    tensor: int = 1
    pipeline: int = 1
    block_size: int = 4
    windowed: bool = False

    def shards(self, layers: int, heads: int) -> list[Shard]:
        """One per rank, stage by stage; the layers that do not divide evenly go to the last stages."""
        return [
            Shard(part_of(rank, self.tensor, heads, begin, end - begin), self.block_size, self._groups(begin, end))
            for begin, end in self._stages(layers)
            for rank in range(self.tensor)
        ]

    def _stages(self, layers: int) -> Iterator[tuple[int, int]]:
        bounds = [layers * stage // self.pipeline for stage in range(self.pipeline + 1)]
        return pairwise(bounds)

    def _groups(self, begin: int, end: int) -> tuple[int, ...]:
        return tuple(layer % 2 if self.windowed else 0 for layer in range(begin, end))


def format_of(shape: Shape, layers: int, heads: int, slot: int) -> KvFormat:
    """`slot` bytes for one token of one head of one layer."""
    size = shape.block_size
    return KvFormat("m", "uint8", size, layers, heads, slot, size * heads * slot, KvMode.PUSH, "nixl")


def memory_of(shard: Shard, blocks: int, slot: int, fill: int, dtype: Any) -> Array:
    part = shard.part
    return np.full((part.layers, blocks, part.heads, shard.block_size, slot), fill, dtype)


def place(
    memory: Array,
    shard: Shard,
    tables: Sequence[Sequence[int]],
    whole: Array,
    tokens: range,
    only: int | None = None,
) -> None:
    """Puts these tokens of the whole model's KV, an array of (layer, head, token, element), where this rank has them.
    `only`: in this one of its layers."""
    for layer, ours in _layers(shard, whole):
        if only not in (None, layer):
            continue
        blocks, offsets = _slots(tables[shard.groups[layer]], shard.block_size, tokens)
        memory[layer][blocks, :, offsets] = ours[:, tokens.start : tokens.stop].transpose(1, 0, 2)


def held(memory: Array, shard: Shard, tables: Sequence[Sequence[int]], whole: Array, tokens: Sequence[range]) -> bool:
    """Whether this rank has the whole model's KV of `tokens[g]` in its tables, for each group g."""
    pairs = zip(there(memory, shard, tables, tokens), due(shard, whole, tokens), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def there(memory: Array, shard: Shard, tables: Sequence[Sequence[int]], tokens: Sequence[range]) -> Iterator[Array]:
    """What this rank has of `tokens[g]`, layer by layer: arrays of (token, head, element)."""
    for layer, group in enumerate(shard.groups):
        blocks, offsets = _slots(tables[group], shard.block_size, tokens[group])
        yield memory[layer][blocks, :, offsets]


def due(shard: Shard, whole: Array, tokens: Sequence[range]) -> Iterator[Array]:
    """What it should have."""
    for layer, ours in _layers(shard, whole):
        wanted = tokens[shard.groups[layer]]
        yield ours[:, wanted.start : wanted.stop].transpose(1, 0, 2)


def elements(cut: Slice, end: Cut, shard: Shard, slot: int, layer: int, cells: Sequence[int]) -> tuple[Array, Array]:
    """Where these cells lie in a rank's memory, in order: blocks, and elements within each block. `layer` counts within
    the slice."""
    assert 0 <= layer < cut.layers
    numbers = np.asarray(cells, np.int64)
    runs = np.asarray(end.runs, np.int64)[numbers % end.cells]  # (cell, run, (offset, bytes))
    steps = np.arange(runs[0, 0, 1] if len(numbers) else 0)
    within = (runs[:, :, :1] + steps).reshape(len(numbers), -1)
    assert not within.size or within.max() < shard.part.heads * shard.block_size * slot
    return np.broadcast_to((numbers // end.cells)[:, None], within.shape), within


def copy(cut: Slice, layer: int, span: Span, source: tuple[Shard, Array], destination: tuple[Shard, Array]) -> None:
    """What a transport does with a span of the slice's layer, first to last."""
    (from_shard, taken), (to_shard, given) = source, destination
    slot = taken.shape[-1]
    here = elements(cut, cut.source, from_shard, slot, layer, span.source)
    there = elements(cut, cut.destination, to_shard, slot, layer, span.destination)
    flat(given)[(cut.destination.first_layer + layer, *there)] = flat(taken)[(cut.source.first_layer + layer, *here)]


def flat(memory: Array) -> Array:
    """A view of (layer, block, element of the block)."""
    return memory.reshape(memory.shape[0], memory.shape[1], -1)


def holders(part: KvPart, layers: int, heads: int) -> Array:
    """Of (layer, head): whether this rank has it."""
    has = np.zeros((layers, heads), bool)
    has[part.first_layer : part.first_layer + part.layers, part.first_head : part.first_head + part.heads] = True
    return has


def _layers(shard: Shard, whole: Array) -> Iterator[tuple[int, Array]]:
    part = shard.part
    for layer in range(part.layers):
        yield layer, whole[part.first_layer + layer, part.first_head : part.first_head + part.heads]


def _slots(table: Sequence[int], block_size: int, tokens: range) -> tuple[Array, Array]:
    positions = np.arange(tokens.start, tokens.stop)
    return np.asarray(table, np.int64)[positions // block_size], positions % block_size
