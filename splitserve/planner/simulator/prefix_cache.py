"""What a worker's prefix cache holds: block ids in order of last use, evicted from the oldest (as vLLM does).

Cached blocks lie in memory that nothing else uses now: what is free bounds them.
"""

from collections import OrderedDict

import numpy as np
import numpy.typing as npt


class PrefixCache:
    """Blocks of `block_tokens` tokens, the workload's own."""

    __slots__ = ("_blocks", "block_tokens")

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def hit(self, ids: npt.NDArray[np.int64], prompt_tokens: int) -> int:
        """Leading tokens of a prompt that are cached, all but the last at most (its KV has to give a token)."""
        hits = 0
        for block in ids.tolist():
            if block not in self._blocks:
                break
            self._blocks.move_to_end(block)
            hits += 1
        return min(hits * self.block_tokens, max(0, prompt_tokens - 1))

    def add(self, ids: npt.NDArray[np.int64], room_tokens: int) -> None:
        """These blocks are computed now; the least recently used go until all fit into so many tokens."""
        for block in ids.tolist():
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        room = max(0, room_tokens) // self.block_tokens
        while len(self._blocks) > room:
            self._blocks.popitem(last=False)
