"""How far a prefill is computed and written, layer by layer. Pure; owned by its source ticket.

A claim that comes late is caught up from here: whatever is computed and not yet written is due.
"""

from collections.abc import Sequence

from splitserve.kv.layout import Span, span


class Cursor:
    """Counts the prompt's blocks from its start: in layer l blocks below `ready[l]` are computed, and those from the
    claim's first block to below `written[l]` have been handed to the transport."""

    def __init__(self, layers: int) -> None:
        self.table: tuple[int, ...] = ()
        self._ready = [0] * layers
        self._written = [0] * layers
        self._first = 0
        self._claimed: tuple[int, ...] = ()

    def computing(self, table: Sequence[int], ready: int) -> None:
        """The block table so far; its first `ready` blocks are computed in every layer."""
        self.table = tuple(table)
        self._ready = [min(max(old, ready), len(table)) for old in self._ready]

    def computed(self, layer: int, ready: int) -> None:
        self._ready[layer] = max(self._ready[layer], min(ready, len(self.table)))

    def preempted(self) -> None:
        """Its blocks are taken away. What was written stays written: the destination has it."""
        self.table = ()
        self._ready = [0] * len(self._ready)

    def claim(self, first_block: int, blocks: Sequence[int]) -> None:
        self._first = first_block
        self._claimed = tuple(blocks)
        self._written = [first_block] * len(self._written)

    def take(self, layer: int) -> Span:
        """All copies due in this layer, which count as written from now on."""
        begin = self._written[layer]
        end = min(self._ready[layer], self._first + len(self._claimed))
        if end <= begin:
            return Span((), ())
        self._written[layer] = end
        return span(self.table, self._claimed, self._first, begin, end)

    @property
    def layers(self) -> range:
        return range(len(self._ready))

    @property
    def complete(self) -> bool:
        """All that was claimed has been handed to the transport."""
        return min(self._written) >= self._first + len(self._claimed)

    @property
    def written(self) -> int:
        """Blocks handed to the transport, summed over layers."""
        return sum(self._written) - self._first * len(self._written)
