"""A rank's KV blocks in plain memory, layer after layer, and which of their bytes a slice takes: what the transports
that copy (`shm`, `tcp`) have in common. Pure.
"""

import mmap
from dataclasses import dataclass

from splitserve.kv.layout import Cut, Slice
from splitserve.kv.transport import TransportError

Run = tuple[int, int]  # offset in the memory, bytes


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the blocks lie: block b of layer l begins at `(l * blocks + b) * block_bytes`."""

    layers: int
    blocks: int
    block_bytes: int

    @property
    def layer_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def total_bytes(self) -> int:
        return self.layers * self.layer_bytes

    def offset(self, layer: int, block: int) -> int:
        """Raises TransportError for a block that is not there."""
        if not (0 <= layer < self.layers and 0 <= block < self.blocks):
            raise TransportError(f"block {block} of layer {layer} is outside {self.layers} x {self.blocks} blocks")
        return layer * self.layer_bytes + block * self.block_bytes

    def runs(self, cut: Slice, end: Cut, layer: int, cell: int) -> list[Run]:
        """One cell at this end of a slice; `layer` counts within the slice. Raises TransportError."""
        begin = self.offset(end.first_layer + layer, cell // end.cells)
        if cut.whole_blocks:
            return [(begin, self.block_bytes)]
        return [(begin + offset, size) for offset, size in end.runs[cell % end.cells]]


@dataclass(frozen=True, slots=True)
class Blocks:
    """The memory itself: `view[header_bytes:]` is laid out as `grid` says."""

    view: memoryview
    grid: Grid
    header_bytes: int = 0

    @classmethod
    def made(cls, layers: int, blocks: int, block_bytes: int) -> "Blocks":
        """New memory of this process, all zeros."""
        grid = Grid(layers, blocks, block_bytes)
        return cls(memoryview(mmap.mmap(-1, grid.total_bytes)), grid)

    def block(self, layer: int, block: int) -> memoryview:
        """Raises TransportError for a block that is not there."""
        return self.at((self.grid.offset(layer, block), self.grid.block_bytes))

    def at(self, run: Run) -> memoryview:
        begin = self.header_bytes + run[0]
        return self.view[begin : begin + run[1]]


def check_slice(cut: Slice, source: Grid, destination: Grid) -> None:
    """Raises TransportError unless the slice lies within the memory at both ends."""
    _check_end(source, cut.source, cut)
    _check_end(destination, cut.destination, cut)
    if cut.whole_blocks and source.block_bytes != destination.block_bytes:
        raise TransportError(f"the peer's blocks have {destination.block_bytes} bytes, ours {source.block_bytes}")


def _check_end(grid: Grid, end: Cut, cut: Slice) -> None:
    last = 0 if cut.whole_blocks else max(offset + size for runs in end.runs for offset, size in runs)
    if end.first_layer + cut.layers > grid.layers or last > grid.block_bytes:
        raise TransportError(
            f"the slice takes {end.first_layer + cut.layers} layers and {last} bytes of a block; "
            f"there are {grid.layers} layers with blocks of {grid.block_bytes} bytes"
        )
