"""How far a prefill is computed and written, layer by layer. Pure; owned by its source ticket.

A claim that comes late is caught up from here: whatever is computed and not yet written is due. It counts in cells
(`layout.Slice`): a block where both ends' blocks are of one size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from splitserve.kv.layout import Slice, blocks_for
from splitserve.kv.ticket import Table


@dataclass(frozen=True, slots=True)
class Span:
    """Cells of one layer to copy: `source[i]` into `destination[i]`, numbered through from block 0 of each end."""

    source: tuple[int, ...]
    destination: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)


class PrefillProgress:
    """How far a prefill is computed at this rank. `tables[g]` is its block table in group g; layers count over the
    whole model, and those of other ranks are ignored."""

    def __init__(self, first_layer: int, layers: int) -> None:
        self._first_layer = first_layer
        self.tables: tuple[tuple[int, ...], ...] = ()
        self._ready = [0] * layers

    def computing(self, tables: Sequence[Sequence[int]]) -> None:
        """The block tables so far."""
        self.tables = tuple(map(tuple, tables))

    def computed(self, layer: int | None, tokens: int) -> None:
        """So many tokens are there in this layer (None: in all)."""
        own = range(len(self._ready))
        for index in own if layer is None else [layer - self._first_layer]:
            if index in own:
                self._ready[index] = max(self._ready[index], tokens)

    def preempted(self) -> None:
        """Its blocks are taken away. What was written stays written: the destination has it."""
        self.tables = ()
        self._ready = [0] * len(self._ready)

    def ready(self, layer: int) -> int:
        """Tokens computed in this layer, as far as their blocks are known."""
        return self._ready[layer - self._first_layer] if self.tables else 0


class Cursor:
    """One claim against that progress: which cells have been handed to the transport, per layer of the slice."""

    def __init__(self, progress: PrefillProgress, cut: Slice, tokens: int, claimed: Sequence[Table]) -> None:
        self._progress = progress
        self._slice = cut
        self._tokens = tokens
        self._claimed = claimed
        self._end = blocks_for(tokens, cut.cell_tokens)
        self._first = [self._claim(layer).first_block * cut.destination.cells for layer in self.layers]
        self._written = [min(first, self._end) for first in self._first]

    def take(self, layer: int, most: int) -> Span:
        """Copies due in this layer, at most so many cells; they count as written from now on."""
        begin, end = self._written[self._index(layer)], min(self._due(layer), self._written[self._index(layer)] + most)
        if end <= begin:
            return Span((), ())
        self._written[self._index(layer)] = end
        cells = range(begin, end)
        source, destination = self._slice.source, self._slice.destination
        table = self._progress.tables[source.groups[self._index(layer)]]
        claim = self._claim(layer)
        return Span(
            tuple(table[cell // source.cells] * source.cells + cell % source.cells for cell in cells),
            tuple(
                claim.blocks[cell // destination.cells - claim.first_block] * destination.cells
                + cell % destination.cells
                for cell in cells
            ),
        )

    def due(self, layer: int) -> bool:
        return self._due(layer) > self._written[self._index(layer)]

    @property
    def layers(self) -> range:
        return range(self._slice.first_layer, self._slice.first_layer + self._slice.layers)

    @property
    def complete(self) -> bool:
        """All that was claimed has been handed to the transport."""
        return min(self._written) >= self._end

    @property
    def written(self) -> int:
        """Cells handed to the transport, summed over layers."""
        return sum(self._written) - sum(min(first, self._end) for first in self._first)

    def _due(self, layer: int) -> int:
        """Cells that are computed in this layer. The last one may be partly filled, once all its tokens are there."""
        ready = self._progress.ready(layer)
        whole = self._end if ready >= self._tokens else ready // self._slice.cell_tokens
        return min(whole, self._blocks_known(layer))

    def _blocks_known(self, layer: int) -> int:
        tables = self._progress.tables
        group = self._slice.source.groups[self._index(layer)]
        return len(tables[group]) * self._slice.source.cells if group < len(tables) else 0

    def _claim(self, layer: int) -> Table:
        return self._claimed[self._slice.destination.groups[self._index(layer)]]

    def _index(self, layer: int) -> int:
        return layer - self._slice.first_layer
