"""The simulated engine's KV: which blocks are free, and what a block holds.

Where a real model keeps keys and values, each block of each layer keeps 16 bytes: the state of a hash chain over the
prompt's tokens up to the block's last one. The chain of a layer starts from a secret of its own and each block starts
from what *lies in* the block before it, so wrong, stale or foreign KV anywhere in a context changes what is read from
it, and everything computed on top of it, as with a real model.

    state after token t = state * MULTIPLIER + t + 1   (mod 2**128)

The chain is linear, so it doesn't matter in which chunks a prompt is computed. Used by the engine's thread only; the
memory itself belongs to the transport, into which peers write.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from splitserve.kv.layout import blocks_for

DIGEST_BYTES = 16
MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645  # odd and large: PCG's 128-bit constant
_MASK = (1 << 8 * DIGEST_BYTES) - 1

BlockView = Callable[[int, int], memoryview]  # (layer, block) to its bytes


class BlockPool:
    """Ids of free blocks. The one that has been free longest is taken first."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = deque(range(total))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """So many blocks, or none at all."""
        if count > len(self._free):
            return None
        return [self._free.popleft() for _ in range(count)]

    def give_back(self, blocks: Iterable[int]) -> None:
        self._free.extend(blocks)
        assert len(self._free) <= self.total, "a block was given back twice"


@dataclass(frozen=True, slots=True)
class Segment:
    """New tokens of one block, folded into what every layer's chain needs of them."""

    block: int  # index in the sequence's table
    starts_block: bool
    factor: int
    addend: int


class ChainedKv:
    """Reads and writes the chain's states in the worker's blocks."""

    def __init__(self, view: BlockView, layers: int, block_size: int, secret: str) -> None:
        self._view = view
        self._block_size = block_size
        self._starts = [_secret_of_layer(secret, layer) for layer in range(layers)]
        self._views: list[dict[int, memoryview]] = [{} for _ in range(layers)]

    def fold(self, tokens: Sequence[int], begin: int, end: int) -> list[Segment]:
        """tokens[begin:end], block by block; layer-independent, so done once for all layers."""
        size = self._block_size
        segments = []
        while begin < end:
            stop = min(end, (begin // size + 1) * size)
            segments.append(_fold(tokens[begin:stop], begin // size, begin % size == 0))
            begin = stop
        return segments

    def write(self, layer: int, table: Sequence[int], segments: Iterable[Segment]) -> None:
        """Computes one layer's states for these segments into the blocks of `table`."""
        for segment in segments:
            state = self._state_before(layer, table, segment)
            state = (state * segment.factor + segment.addend) & _MASK
            self._block(layer, table[segment.block])[:] = state.to_bytes(DIGEST_BYTES, "little")

    def read(self, table: Sequence[int], tokens: int) -> bytes:
        """What the blocks of so many tokens hold, all layers: what the next token depends on."""
        used = table[: blocks_for(tokens, self._block_size)]
        return b"".join(self._block(layer, block) for layer in range(len(self._starts)) for block in used)

    def _state_before(self, layer: int, table: Sequence[int], segment: Segment) -> int:
        if segment.starts_block and segment.block == 0:
            return self._starts[layer]
        block = table[segment.block - segment.starts_block]
        return int.from_bytes(self._block(layer, block), "little")

    def _block(self, layer: int, block: int) -> memoryview:
        views = self._views[layer]
        view = views.get(block)
        if view is None:
            view = views[block] = self._view(layer, block)
        return view


def _fold(tokens: Sequence[int], block: int, starts_block: bool) -> Segment:
    addend = 0
    for token in tokens:
        addend = (addend * MULTIPLIER + token + 1) & _MASK
    return Segment(block, starts_block, pow(MULTIPLIER, len(tokens), _MASK + 1), addend)


def _secret_of_layer(secret: str, layer: int) -> int:
    digest = blake2b(f"{secret}:{layer}".encode(), digest_size=DIGEST_BYTES).digest()
    return int.from_bytes(digest, "little")
