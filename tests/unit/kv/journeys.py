"""What engines do in a faulty world: a few transfers between the same two workers, each by its own luck. Claims come
before, with, after or without their prefill; prompts are read in chunks, layer by layer, with fences, preempted,
aborted; requests are given up or are patient; some ask for the wrong thing.
"""

from functools import partial

from splitserve.kv.ticket import TransferKey
from tests.unit.kv.blocks import GROUPS, Prompt
from tests.unit.kv.faults import FaultyWorld
from tests.unit.kv.rank import Rank, peers

LIMITS_S = (0.3, 0.8, 2.0, 5.0, 10.0)  # of claims


class Journeys(FaultyWorld):
    """A run of one seed."""

    def plan(self) -> None:
        for number in range(self.dice.randint(2, 4)):
            key = TransferKey(f"t{number}", 1)
            prompt = Prompt.of(self.dice.getrandbits(32), self.dice.randint(1, 14), self.layers, self.heads)
            ways = (self.a, self.b), (self.b, self.a)
            source, destination = ways[self.dice.random() < 0.2]
            self._plan_transfer(key, prompt, source, destination)

    def finish_engines(self, rank: Rank) -> None:
        for key, prefill in list(rank.prefills.items()):
            if not prefill.over:
                rank.end_prefill(key)

    def chance(self, share: float) -> bool:
        return self.dice.random() < share

    def _plan_transfer(self, key: TransferKey, prompt: Prompt, source: list[Rank], destination: list[Rank]) -> None:
        begins, takes_s = self.dice.uniform(0.0, 1.5), self.dice.choice((0.05, 0.5, 2.0, 3.5))
        claims = begins + self.dice.choice((-0.4, 0.0, 0.5 * takes_s, takes_s + 0.3, takes_s + 2.5))
        if not self.chance(0.08):
            self._plan_prefill(key, prompt, source, destination, begins, takes_s)
        if not self.chance(0.08):
            self._plan_claim(key, prompt, source, destination, max(0.0, claims))

    # The source's engine ---------------------------------------------------------------------------------------------
    def _plan_prefill(
        self,
        key: TransferKey,
        prompt: Prompt,
        source: list[Rank],
        destination: list[Rank],
        begins: float,
        takes_s: float,
    ) -> None:
        tokens = len(prompt.tokens)
        hit = self.dice.randint(0, tokens - 1) if self.chance(0.3) else 0
        ends = sorted(self.dice.randint(1, tokens) for _ in range(self.dice.randint(0, 2)))
        fenced, aborts, preempts = self.chance(0.3), self.chance(0.25), self.chance(0.2)
        over_s = takes_s * self.dice.random() if aborts else takes_s
        preempted_s, aborted_again = takes_s * self.dice.random(), self.chance(0.15)
        again = Prompt.of(self.dice.getrandbits(32), 3, self.layers, self.heads) if self.chance(0.1) else None
        for rank in source:
            late = begins + self.dice.uniform(0.0, 0.2)
            self._soon(rank, late, partial(rank.offer, key, prompt, peers(destination), hit))
            for number, end in enumerate(ends):
                layers = 1 if self.chance(0.2) else None
                step = late + takes_s * (number + 1) / (len(ends) + 1)
                self._soon(rank, step, partial(rank.chunk, key, end, layers, fenced))
                self._soon(rank, step + self.dice.expovariate(10.0), partial(rank.open_fences))
            if preempts:
                self._soon(rank, late + preempted_s, partial(rank.preempt, key))
            self._soon(rank, late + over_s, partial(rank.abort_prefill if aborts else rank.end_prefill, key))
            if aborted_again:
                self._soon(rank, late + takes_s + self.dice.expovariate(5.0), partial(rank.abort_prefill, key))
            if again is not None:
                self._soon(rank, late + takes_s + 2.0, partial(rank.offer, key, again, peers(destination)))
            if self.chance(0.1):
                self._soon(rank, late + takes_s * self.dice.random(), partial(self._refuse_a_write, rank))

    def _refuse_a_write(self, rank: Rank) -> None:
        self.transports[rank.uuid].refuses = 1

    # The destination's engine ----------------------------------------------------------------------------------------
    def _plan_claim(
        self, key: TransferKey, prompt: Prompt, source: list[Rank], destination: list[Rank], at_s: float
    ) -> None:
        limit_s = self.dice.choice(LIMITS_S)
        tokens = max(0, len(prompt.tokens) - self.dice.choice((0, 1, 1, 3)))
        expects = None
        if self.chance(0.1):  # It takes the ticket for another request's, of which the prompt may be longer.
            tokens = len(prompt.tokens) + self.dice.choice((0, 2))
            expects = Prompt.of(self.dice.getrandbits(32), max(1, tokens), self.layers, self.heads)
        hits = self.dice.choice(((0,) * GROUPS, (0, 1), (1, 1), (2, 0)))
        abandons_s = at_s + self.dice.uniform(0.0, 2.0) if self.chance(0.25) else at_s + limit_s + 1.0
        for rank in destination:
            late = at_s + self.dice.uniform(0.0, 0.2)
            claim = partial(rank.claim, key, prompt, peers(source), tokens, hits, limit_s, expects)
            self._soon(rank, late, claim)
            self._soon(rank, max(late, abandons_s), partial(rank.abandon, key))
            if self.chance(0.2):
                self._soon(rank, max(late, abandons_s) + 0.1, partial(rank.abandon, key))
            if self.chance(0.05):
                self._soon(rank, late + limit_s + 1.5, claim)

    def _soon(self, rank: Rank, at_s: float, action: "partial[None]") -> None:
        self.at(at_s, partial(self.do, rank, action))
