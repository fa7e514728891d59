"""Continuous batching for the simulated engine: which sequences compute how many tokens in the next step.

Pure state of the engine's thread, following vLLM's scheduler: running sequences first, then waiting ones in order of
priority and arrival, chunks of a prompt up to the step's token budget; out of blocks, the last running sequence is
preempted and computed anew. The queue stops at the first sequence that doesn't fit. It knows no jobs and no clock.
"""

import bisect
from dataclasses import dataclass, field

from splitserve.engine.sim_memory import BlockPool
from splitserve.kv.layout import blocks_for


@dataclass(slots=True, eq=False)
class Sequence:
    """A token list and the blocks of its KV. `computed` tokens need no more work; `written` ones are in the blocks."""

    tokens: list[int]
    rank: tuple[int, int]  # priority, arrival: the lowest runs first
    waits_for_kv: bool = False
    table: list[int] = field(default_factory=list)
    computed: int = 0
    written: int = 0

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed

    def received(self) -> None:
        """Its KV has arrived. The last token is computed once more: that gives the next one."""
        self.waits_for_kv = False
        self.written = len(self.tokens)
        self.computed = len(self.tokens) - 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence computes its next `tokens` tokens in a step."""

    sequence: Sequence
    tokens: int

    @property
    def end(self) -> int:
        return self.sequence.computed + self.tokens

    @property
    def ends_prompt_or_decodes(self) -> bool:
        return self.tokens == self.sequence.left

    @property
    def decodes(self) -> bool:
        return self.tokens == 1 and self.ends_prompt_or_decodes and self.sequence.computed > 0


@dataclass(slots=True)
class Plan:
    chunks: list[Chunk] = field(default_factory=list)
    parked: list[Sequence] = field(default_factory=list)  # got their blocks now, wait for KV
    preempted: list[Sequence] = field(default_factory=list)  # their blocks are given back by `Schedule.preempt`


class Schedule:
    """Owns the queue, the running list and the blocks."""

    def __init__(self, pool: BlockPool, block_size: int, max_sequences: int, max_batched_tokens: int) -> None:
        self.pool = pool
        self._block_size = block_size
        self._max_sequences = max_sequences
        self._max_batched_tokens = max_batched_tokens
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """A new sequence, or one whose KV has arrived."""
        bisect.insort(self._waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """It computes no more; its blocks stay its own until `release`."""
        for queue in (self._waiting, self._running):
            if sequence in queue:
                queue.remove(sequence)

    def release(self, sequence: Sequence) -> None:
        """Gives its blocks back."""
        self.pool.give_back(sequence.table)
        sequence.table = []

    def plan(self) -> Plan:
        """The next step. Blocks are taken; `commit` moves the sequences on once it is computed."""
        plan = Plan()
        budget = self._max_batched_tokens
        for sequence in list(self._running):
            if sequence in self._running and budget > 0:
                budget -= self._continue(sequence, budget, plan)
        while self._waiting and not plan.preempted and self._start(self._waiting[0], budget, plan):
            self._waiting.pop(0)
            if plan.chunks and plan.chunks[-1].sequence is self._running[-1 if self._running else 0]:
                pass
        return plan

    def commit(self, chunk: Chunk) -> None:
        chunk.sequence.computed += chunk.tokens
        chunk.sequence.written = max(chunk.sequence.written, chunk.sequence.computed)
