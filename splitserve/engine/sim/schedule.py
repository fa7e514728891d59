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

    @property
    def decodes(self) -> bool:
        """It reads its context and makes a token, rather than reading a prompt."""
        return self.left == 1 and self.computed > 0

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
        return self.sequence.decodes


@dataclass(slots=True)
class Plan:
    chunks: list[Chunk] = field(default_factory=list)
    parked: list[Sequence] = field(default_factory=list)  # got their blocks now, wait for KV
    preempted: list[Sequence] = field(default_factory=list)  # their blocks are given back by `Schedule.preempt`


class Schedule:
    """Owns the queue, the running list and the blocks."""

    def __init__(self, pool: BlockPool, block_size: int, max_sequences: int, max_batched_tokens: int) -> None:
        self.pool = pool
        self.preemptions = 0
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

    @property
    def decodes(self) -> list[Sequence]:
        """Those that will make a token in the next step, if there is room; those that have just got their KV too."""
        return [each for each in (*self._running, *self._waiting) if each.decodes and not each.waits_for_kv]

    @property
    def prompt(self) -> Sequence | None:
        """The one that is read next."""
        reading = (each for each in (*self._running, *self._waiting) if not each.decodes and not each.waits_for_kv)
        return next(reading, None)

    @property
    def max_batched_tokens(self) -> int:
        return self._max_batched_tokens

    def plan(self, prompt_tokens: int | None = None) -> Plan:
        """The next step: blocks are taken, and lost by what is preempted. `commit` follows once it is computed.
        `prompt_tokens`: of all prompts together at most so many; None: as the step's budget allows."""
        plan = Plan()
        budget = _Budget(self._max_batched_tokens, self._max_batched_tokens if prompt_tokens is None else prompt_tokens)
        self._continue_running(budget, plan)
        if not plan.preempted:
            self._start_waiting(budget, plan)
        return plan

    def commit(self, chunk: Chunk) -> None:
        """The chunk is computed."""
        chunk.sequence.computed += chunk.tokens

    def _continue_running(self, budget: "_Budget", plan: Plan) -> None:
        for sequence in list(self._running):
            tokens = budget.tokens_for(sequence)
            if tokens > 0 and sequence in self._running and self._make_room(sequence, tokens, plan):
                budget.spend(sequence, tokens)
                plan.chunks.append(Chunk(sequence, tokens))

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
        self.preemptions += 1
        victim.computed = 0
        self.add(victim)

    def _start_waiting(self, budget: "_Budget", plan: Plan) -> None:
        """In order; but a prompt that gets no time in this step holds up none that has or awaits its KV."""
        for sequence in tuple(self._waiting):
            tokens = 0 if sequence.waits_for_kv else budget.tokens_for(sequence)
            if not tokens and not sequence.waits_for_kv and budget.prompts_wait:
                continue
            if not self._start(sequence, tokens, plan):
                return
            self._waiting.remove(sequence)
            budget.spend(sequence, tokens)

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


@dataclass(slots=True)
class _Budget:
    """Tokens that are left of a step, and how many of them prompts may have."""

    step: int
    prompts: int

    def tokens_for(self, sequence: Sequence) -> int:
        return min(sequence.left, self.step if sequence.decodes else min(self.step, self.prompts))

    def spend(self, sequence: Sequence, tokens: int) -> None:
        self.step -= tokens
        if not sequence.decodes:
            self.prompts -= tokens

    @property
    def prompts_wait(self) -> bool:
        """It is not the step that is full."""
        return self.step > 0 and self.prompts <= 0


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
