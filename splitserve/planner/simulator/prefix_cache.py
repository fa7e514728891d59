"""What a worker's prefix cache holds, and what the router knows of it.

A cache is block ids in order of last use, evicted from the oldest, and of one prompt's from its end (as vLLM does).
Cached blocks lie in memory that nothing else uses now: what is free bounds them. The router knows of them by its own
index (`routing/prefix`), which a simulated worker tells at once what it stored and evicted.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from splitserve.core.cached import Removed, Stored
from splitserve.routing.prefix import Chain, PrefixIndex, chain_of
from splitserve.workload.requests import Prefixes

_MOST_BLOCKS = 2_000_000  # that the router keeps in mind
_PARTS = 2  # a block's id as the index takes it: as many tokens of 32 bits


@dataclass(frozen=True, slots=True)
class Change:
    """Of a prompt's blocks those from `first` on are new, and others are gone."""

    blocks: list[int]
    first: int
    gone: list[int]


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
        hits = list(takewhile(self._blocks.__contains__, ids.tolist()))
        for block in reversed(hits):
            self._blocks.move_to_end(block)
        return min(len(hits) * self.block_tokens, max(0, prompt_tokens - 1))

    def add(self, ids: npt.NDArray[np.int64], room_tokens: int) -> Change:
        """These blocks are computed now; the least recently used go until all fit into so many tokens."""
        blocks, known = ids.tolist(), self._blocks
        first = next((at for at, block in enumerate(blocks) if block not in known), len(blocks))
        for block in reversed(blocks):
            known[block] = None
            known.move_to_end(block)
        room, gone = max(0, room_tokens) // self.block_tokens, []
        while len(known) > room:
            gone.append(known.popitem(last=False)[0])
        return Change(blocks, first, gone)


class KnownPrefixes:
    """The router's side, for workers by uuid."""

    def __init__(self, prefixes: Prefixes, workers: Iterable[str]) -> None:
        self._prefixes = prefixes
        self._index = PrefixIndex(_MOST_BLOCKS)
        self._told: dict[str, int] = {}  # batches
        self._chains: dict[int, Chain] = {}  # of requests that are asked for
        for uuid in workers:
            self._index.join(uuid)

    def told(self, uuid: str, change: Change) -> None:
        number = self._told.get(uuid, 0)
        self._told[uuid] = number + 1
        parent = change.blocks[change.first - 1] if change.first else None
        new = change.blocks[change.first :]
        self._index.apply(uuid, number, (Stored(new, parent, _tokens(new), _PARTS), Removed(change.gone)))

    def cached(self, request: int) -> dict[str, int]:
        """By worker, how many of its leading tokens are cached there."""
        chain = self._chains.get(request)
        if chain is None:
            chain = self._chains[request] = chain_of([*_tokens(self._prefixes.of(request).tolist()), 0], _PARTS)
        found, tokens = self._index.cached_tokens(chain), self._prefixes.block_tokens
        return {uuid: blocks // _PARTS * tokens for uuid, blocks in found.items()}

    def forget(self, request: int) -> None:
        """It is asked for no more."""
        self._chains.pop(request, None)


def _tokens(blocks: list[int]) -> Sequence[int]:
    return array("I", array("q", blocks).tobytes())
