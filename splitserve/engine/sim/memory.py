"""The simulated engine's KV: which blocks are free, and what a block holds.

Where a real model keeps every token's keys and values, a block of each layer keeps 4 bytes for every token. Before them
stand 16 bytes that say what the block follows: a hash of all that *lies in* the block before it, or a secret of the
layer. So wrong, stale or foreign KV anywhere in a context changes what is read from it, and what is computed on top of
it, as with a real model. And the first tokens of a block can be used, or copied, while more are written behind them.

Used by the engine's thread only; the memory itself belongs to the transport, into which peers write.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from splitserve.kv.layout import blocks_for

CHAIN_BYTES = 16
TOKEN_BYTES = 4

BlockView = Callable[[int, int], memoryview]  # (layer, block) to its bytes


def digest_bytes(block_size: int) -> int:
    """What a block of so many tokens takes in memory."""
    return CHAIN_BYTES + TOKEN_BYTES * block_size


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
    """New tokens of one block, as they lie in every layer's."""

    block: int  # index in the sequence's table
    first: int  # token of the block
    tokens: bytes


class ChainedKv:
    """Writes tokens into the worker's blocks, and reads what lies there."""

    def __init__(self, view: BlockView, layers: int, block_size: int, secret: str) -> None:
        self._view = view
        self._block_size = block_size
        self._starts = [_chain(f"{secret}:{layer}".encode()) for layer in range(layers)]
        self._views: list[dict[int, memoryview]] = [{} for _ in range(layers)]

    def segments(self, tokens: Sequence[int], begin: int, end: int) -> list[Segment]:
        """tokens[begin:end], block by block; the same for all layers."""
        size, segments = self._block_size, []
        while begin < end:
            stop = min(end, (begin // size + 1) * size)
            segments.append(Segment(begin // size, begin % size, _encode(tokens[begin:stop])))
            begin = stop
        return segments

    def write(self, layer: int, table: Sequence[int], segments: Iterable[Segment], lora: str = "") -> None:
        """Computes these segments in one layer, into the blocks of `table`, with an adapter or without."""
        for segment in segments:
            block = self._block(layer, table[segment.block])
            if segment.first == 0:
                block[:CHAIN_BYTES] = self._before(layer, table, segment.block, lora)
            begin = digest_bytes(segment.first)
            block[begin : begin + len(segment.tokens)] = segment.tokens

    def read(self, table: Sequence[int], tokens: int) -> bytes:
        """What the blocks hold of so many tokens, all layers: what the next token depends on."""
        *full, last = table[: blocks_for(tokens, self._block_size)]
        used = digest_bytes(tokens - len(full) * self._block_size)
        parts: list[memoryview] = []
        for layer in range(len(self._starts)):
            parts += [self._block(layer, block) for block in full]
            parts.append(self._block(layer, last)[:used])
        return b"".join(parts)

    def _before(self, layer: int, table: Sequence[int], block: int, lora: str) -> bytes:
        """What a block that is begun now follows."""
        if block:
            return _chain(self._block(layer, table[block - 1]))
        return _chain(self._starts[layer] + lora.encode()) if lora else self._starts[layer]

    def _block(self, layer: int, block: int) -> memoryview:
        views = self._views[layer]
        view = views.get(block)
        if view is None:
            view = views[block] = self._view(layer, block)
        return view


def _encode(tokens: Sequence[int]) -> bytes:
    """None is all zeros, so that memory never written holds no token."""
    return array("I", [token + 1 for token in tokens]).tobytes()


def _chain(content: bytes | memoryview) -> bytes:
    return blake2b(content, digest_size=CHAIN_BYTES).digest()
