"""A rank's blocks in tests: who holds which, for which prompt. The last given back is the first given out, and wiped,
so that whoever reads or writes too late meets another owner.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from splitserve.kv.ticket import TransferKey
from tests.unit.kv.numbered import Array

BLOCKS, SLOT = 256, 2  # blocks of a rank; bytes of one token of one head of one layer
GROUPS = 2  # every prompt has a block table in each


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """`kv`: what the model computes for it, an array of (layer, head, token, byte)."""

    tokens: tuple[int, ...]
    kv: Array

    @classmethod
    def of(cls, number: int, tokens: int, layers: int, heads: int, slot: int = SLOT) -> "Prompt":
        """The same for the same numbers, in any process."""
        dice = np.random.default_rng(number)
        kv = dice.integers(1, 255, (layers, heads, tokens, slot), dtype=np.uint8)
        return cls(tuple(dice.integers(0, 1 << 30, tokens).tolist()), kv)


@dataclass(eq=False, slots=True)
class Holding:
    """Blocks of one transfer at one rank, `tables[g]` from the prompt's block `first[g]` on. `open`: they may be read
    (source) or written (destination)."""

    key: TransferKey
    prompt: Prompt
    tokens: int
    first: tuple[int, ...]
    tables: list[list[int]]
    open: bool = True

    @property
    def blocks(self) -> list[int]:
        return [block for table in self.tables for block in table]


@dataclass(eq=False, slots=True)
class Prefill:
    """`over`: ended or aborted; `draining`: it is preempted, and its WRITEs are awaited."""

    holding: Holding
    done: int = 0
    over: bool = False
    draining: threading.Event | None = None


class DeviceFence:
    """Of one layer of one forward: once the device has computed it, its bytes are there."""

    def __init__(self, compute: Callable[[], None]) -> None:
        self._compute = compute
        self.passed = False

    def open(self) -> None:
        if not self.passed:
            self._compute()
            self.passed = True

    def __call__(self) -> bool:
        return self.passed


class Pool:
    """A rank's blocks. The last given back is the first given out."""

    def __init__(self, *memories: Array) -> None:
        self._memories = memories
        self._free = list(range(memories[0].shape[1]))
        self.owner: list[Holding | None] = [None] * len(self._free)

    def take(self, holding: Holding, counts: Sequence[int]) -> None:
        holding.tables = [[self._take(holding) for _ in range(count)] for count in counts]

    def give_back(self, holding: Holding) -> None:
        for block in holding.blocks:
            assert self.owner[block] is holding
            self.owner[block] = None
            self._free.append(block)
            for memory in self._memories:
                memory[:, block] = 0

    @property
    def whole(self) -> bool:
        """All blocks are free, and nobody has touched one since."""
        return len(self._free) == len(self.owner) and not any(memory.any() for memory in self._memories)

    def _take(self, holding: Holding) -> int:
        block = self._free.pop()
        assert not any(memory[:, block].any() for memory in self._memories), "a free block was written to"
        self.owner[block] = holding
        return block
