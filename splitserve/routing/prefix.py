"""Which workers have the beginning of a prompt cached: an index of what their engines say of their prefix caches.

Each worker's events come as a stream of numbered batches. A number that is missing is told to the caller, who has the
publisher send those batches again or lets the worker's entries go; nothing after a gap is believed before that. A
router can't compute an engine's block hashes, so blocks are known here by a chain of its own: each key is made of the
key before it, the block's tokens and whatever else the engine keys the block by. `Chain` is a prompt's, worked out once
per request.

Memory is bounded: of all workers' blocks together those go first that neither an event nor a prompt has named for
longest. So the index may know less than the workers have, and what it knows may be gone a moment later: it is a hint
for `policy`, and the engine alone decides what it finds. Pure state with one owner: no clock, no I/O.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from splitserve.core.cached import CacheEvent, Extra, Removed, Stored


@dataclass(frozen=True, slots=True)
class Chain:
    """The whole blocks of a prompt that a cache can have, as the index knows them. Good in this process only."""

    block_size: int
    keys: tuple[int, ...]


def chain_of(tokens: Sequence[int], block_size: int, lora: str = "", salt: str = "") -> Chain:
    """Of a prompt for workers whose blocks have so many tokens. The last token is always computed: from it comes the
    next one. As vLLM does, the adapter keys every block and the salt the first."""
    blocks = max(0, len(tokens) - 1) // block_size
    every: Extra = (lora,) if lora else None
    first: Extra = (*(every or ()), salt) if salt else every
    extras = [first, *[every] * (blocks - 1)][:blocks] if first is not None else ()
    return Chain(block_size, tuple(_keys(_root(block_size), tokens[: blocks * block_size], block_size, extras)))


@dataclass(slots=True)
class _Held:
    """What one worker has, both ways round. `bit` stands for the worker in sets of workers."""

    bit: int
    expected: int = 0  # number of its next batch
    keys: dict[int, int] = field(default_factory=dict)  # by the worker's own hash
    hashes: dict[int, int] = field(default_factory=dict)  # by key


class PrefixIndex:
    """Of at most `limit` blocks; one that several workers have counts for each. Worker uuids that have not joined raise
    KeyError: naming one is our mistake."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks = 0
        self._held: dict[str, _Held] = {}
        self._uuids: dict[int, str] = {}  # by bit
        self._holders: OrderedDict[int, int] = OrderedDict()  # by key, the bits of who has it; named last is last

    def __len__(self) -> int:
        """Blocks, of all workers together."""
        return self._blocks

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._held

    # Who is there ------------------------------------------------------------------------------------------------
    def join(self, uuid: str) -> None:
        """Its first batch is number 0; whoever joins it later has missed some."""
        assert uuid not in self._held
        bit = 1
        while bit in self._uuids:
            bit <<= 1
        self._held[uuid] = _Held(bit)
        self._uuids[bit] = uuid

    def leave(self, uuid: str) -> None:
        """With all its entries."""
        held = self._held.pop(uuid)
        self._clear(held)
        del self._uuids[held.bit]

    # What they say -----------------------------------------------------------------------------------------------
    def apply(self, uuid: str, number: int, events: Iterable[CacheEvent]) -> range:
        """The numbers of the batches that are missing before this one: none, and it is applied, or was before. Else
        nothing is done, and the caller applies those and then this one again, or calls `restart`."""
        held = self._held[uuid]
        if number > held.expected:
            return range(held.expected, number)
        if number == held.expected:
            held.expected += 1
            for event in events:
                self._apply(held, event)
        return range(0)

    def restart(self, uuid: str, number: int) -> None:
        """The worker's entries go; its next batch is the one with this number."""
        held = self._held[uuid]
        self._clear(held)
        held.expected = number

    # What can be asked -------------------------------------------------------------------------------------------
    def cached_tokens(self, chain: Chain) -> dict[str, int]:
        """By worker, how many of the prompt's leading tokens are cached there, the most last; without those that have
        none."""
        found: dict[str, int] = {}
        holders, depth = -1, 0
        for key in chain.keys:
            still = holders & self._holders.get(key, 0)
            if still != holders and depth:
                found.update(dict.fromkeys(self._names(holders ^ still), depth * chain.block_size))
            if not still:
                break
            holders, depth = still, depth + 1
        else:
            found.update(dict.fromkeys(self._names(holders if depth else 0), depth * chain.block_size))
        self._named(chain.keys[:depth])
        return found

    # -------------------------------------------------------------------------------------------------------------
    def _apply(self, held: _Held, event: CacheEvent) -> None:
        if isinstance(event, Stored):
            self._store(held, event)
        elif isinstance(event, Removed):
            for block in event.hashes:
                self._drop(held, block)
        else:
            self._clear(held)

    def _store(self, held: _Held, event: Stored) -> None:
        """What follows an unknown block is left out: no prompt is known to begin so. So are events that leave blocks
        out, as those of sliding windows do."""
        blocks = len(event.hashes)
        parent = _root(event.block_size) if event.parent is None else held.keys.get(event.parent)
        if parent is None or len(event.tokens) != blocks * event.block_size or len(event.extras) not in (0, blocks):
            return
        keys = _keys(parent, event.tokens, event.block_size, event.extras)
        for block, key in zip(event.hashes, keys, strict=True):
            self._hold(held, block, key)
        self._named(keys)
        while self._blocks > self._limit:
            self._forget_oldest()

    def _hold(self, held: _Held, block: int, key: int) -> None:
        known = held.keys.get(block)
        if known == key:
            return
        if known is not None:
            self._drop(held, block)
        if key in held.hashes:
            self._drop(held, held.hashes[key])
        held.keys[block], held.hashes[key] = key, block
        self._holders[key] = self._holders.get(key, 0) | held.bit
        self._blocks += 1

    def _drop(self, held: _Held, block: int) -> None:
        key = held.keys.pop(block, None)
        if key is None:
            return
        del held.hashes[key]
        self._blocks -= 1
        left = self._holders[key] ^ held.bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]

    def _clear(self, held: _Held) -> None:
        for block in tuple(held.keys):
            self._drop(held, block)

    def _named(self, keys: Sequence[int]) -> None:
        """The end of a prompt goes before its beginning, without which it can't be found."""
        for key in reversed(keys):
            self._holders.move_to_end(key)

    def _forget_oldest(self) -> None:
        key, holders = self._holders.popitem(last=False)
        for uuid in self._names(holders):
            held = self._held[uuid]
            del held.keys[held.hashes.pop(key)]
            self._blocks -= 1

    def _names(self, holders: int) -> Iterator[str]:
        while holders:
            bit = holders & -holders
            yield self._uuids[bit]
            holders ^= bit


# Keys -----------------------------------------------------------------------------------------------------------------
def _root(block_size: int) -> int:
    return hash((block_size,))


def _keys(parent: int, tokens: Sequence[int], block_size: int, extras: Sequence[Extra]) -> list[int]:
    """Of each block. Python's own hash of bytes: keyed by the process's secret, and twice as fast as any digest."""
    packed = array("I", tokens).tobytes()
    size = block_size * array("I").itemsize
    blocks = [packed[start : start + size] for start in range(0, len(packed), size)]
    keys: list[int] = []
    for block, extra in zip(blocks, extras or repeat(None, len(blocks)), strict=True):
        parent = hash((parent, block) if extra is None else (parent, block, extra))
        keys.append(parent)
    return keys
