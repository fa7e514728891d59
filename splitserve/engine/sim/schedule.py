"""Continuous batching for the simulated engine: which sequences compute how many tokens in the next step.

Pure state of the engine's thread, following vLLM's scheduler: running sequences first, then waiting ones in order of
priority and arrival, chunks of a prompt up to the step's token budget; out of blocks, the last running sequence is
preempted and computed anew. The queue stops at the first sequence that doesn't fit. It knows no jobs and no clock.
"""

import bisect
from dataclasses import dataclass, field

from splitserve.engine.sim.memory import BlockPool
from splitserve.kv.layout import blocks_for, tokens_to_move


@dataclass(slots=True, eq=False)
class Sequence:
    """A token list and the blocks of its KV, which hold the first `computed` tokens."""

    job_id: str
    tokens: list[int]
    rank: tuple[int, int]  # priority, arrival: the lowest runs first
    waits_for_kv: bool = False
    table: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed

    def received(self) -> None:
        """Its KV has arrived: all but the last token's, which is computed here and gives the next one."""
        self.waits_for_kv = False
        self.computed = tokens_to_move(len(self.tokens))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence computes its next `tokens` tokens in a step."""

    sequence: Sequence
    tokens: int

    @property
    def end(self) -> int:
        return self.sequence.computed + self.tokens

    @property
    def decodes(self) -> bool:
        """It reads its context and makes a token, rather than reading a prompt."""
        return self.tokens == self.sequence.left == 1 and self.sequence.computed > 0


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
        """The next step: blocks are taken, and lost by what is preempted. `commit` follows once it is computed."""
        plan = Plan()
        used = self._continue_running(plan)
        if not plan.preempted:
            self._start_waiting(self._max_batched_tokens - used, plan)
        return plan

    def commit(self, chunk: Chunk) -> None:
        """The chunk is computed."""
        chunk.sequence.computed += chunk.tokens

    def _continue_running(self, plan: Plan) -> int:
        used = 0
        for sequence in list(self._running):
            tokens = min(sequence.left, self._max_batched_tokens - used)
            if tokens > 0 and sequence in self._running and self._make_room(sequence, tokens, plan):
                plan.chunks.append(Chunk(sequence, tokens))
                used += tokens
        return used

    def _make_room(self, sequence: Sequence, tokens: int, plan: Plan) -> bool:
        """Preempts from the end of the running list; False if that took the sequence itself."""
        while not self._allot(sequence, sequence.computed + tokens):
            victim = self._running.pop()
            self._preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.release(victim)
        victim.computed = 0
        self.add(victim)

    def _start_waiting(self, budget: int, plan: Plan) -> None:
        while self._waiting:
            sequence = self._waiting[0]
            tokens = 0 if sequence.waits_for_kv else min(sequence.left, budget)
            if not self._start(sequence, tokens, plan):
                return
            self._waiting.pop(0)
            budget -= tokens

    def _start(self, sequence: Sequence, tokens: int, plan: Plan) -> bool:
        if sequence.waits_for_kv:
            if not self._allot(sequence, len(sequence.tokens)):
                return False
            plan.parked.append(sequence)
            return True
        full = len(self._running) >= self._max_sequences
        if full or tokens < 1 or not self._allot(sequence, sequence.computed + tokens):
            return False
        bisect.insort(self._running, sequence, key=_rank)
        plan.chunks.append(Chunk(sequence, tokens))
        return True

    def _allot(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for its first `tokens` tokens, or none."""
        missing = blocks_for(tokens, self._block_size) - len(sequence.table)
        taken = self.pool.take(max(0, missing))
        if taken is None:
            return False
        sequence.table.extend(taken)
        return True


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
