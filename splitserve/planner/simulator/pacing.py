"""How fast one simulated worker reads prompts beside its decodes: `routing/pace`, asked with what is simulated."""

from collections.abc import Callable, Collection

from splitserve.latency.model import LatencyModel
from splitserve.planner.simulator.clock import Clock
from splitserve.planner.simulator.decodes import Decodes, Sequence
from splitserve.planner.simulator.journal import NEVER, Journal
from splitserve.routing.lengths import OutputLengths
from splitserve.routing.pace import Batch, Pacer, Prompt
from splitserve.routing.slack import slack_of


class Pacing:
    """`tpot_s` is the objective of all decodes; NEVER, or one that no step keeps: prompts heed none. `decode_s`: what a
    step of so many decodes with so much context takes. `lengths`: of outputs of late, on all workers."""

    def __init__(
        self,
        latency: LatencyModel,
        tpot_s: float,
        decodes: Decodes,
        decode_s: Callable[[int, int], float],
        clock: Clock,
        journal: Journal,
        lengths: OutputLengths,
    ) -> None:
        self._pacer = Pacer(latency)
        self.heeds = self._pacer.least_step_s < tpot_s < NEVER
        self._tpot_s, self._decodes, self._decode_s = tpot_s, decodes, decode_s
        self._clock, self._journal, self._lengths = clock, journal, lengths
        self._paced: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Its first token is out, or its time known, and so when the next ones are due."""
        if self.heeds:
            sequence.first_token = self._journal.first_token[sequence.request]
            self._paced.append(sequence)

    def ended(self, output_tokens: int) -> None:
        if self.heeds:
            self._lengths.add(output_tokens)

    def slack_s(self, share: float) -> float:
        """Until the next step must have ended, for every decode to keep its objective, but for a `share` of them whose
        outputs may turn out too short."""
        self._paced = [each for each in self._paced if each.running]
        if not self._paced:
            return NEVER
        decodes, now, tpot_s, lengths = self._decodes, self._clock.now, self._tpot_s, self._lengths
        step_s = self._decode_s(decodes.count, decodes.context)
        running = 0 if lengths.known else sum(map(decodes.made_by, self._paced))
        return min(
            slack_of(now - each.first_token, decodes.made_by(each), tpot_s, step_s, lengths, share, running)
            for each in self._paced
        )

    def chunk(self, prompt: Prompt, batch: Batch, most: int, parked: Collection[int]) -> int:
        """Prompt tokens of the next step, up to `most`. `parked`: requests whose KV is on its way."""

        def within_s(share: float) -> float:
            return min(self.slack_s(share), self._until_first_tokens_s(parked))

        return self._pacer.chunk(prompt, batch, most, self._tpot_s, within_s)

    def _until_first_tokens_s(self, parked: Collection[int]) -> float:
        """For how long a step may keep those waiting whose KV is on its way: their first tokens take another one."""
        now, due = self._clock.now, self._journal.due
        left = [due[request] - now for request in parked]
        step_s = self._decode_s(self._decodes.count + 1, self._decodes.context)
        return min((left_s - step_s for left_s in left if left_s > step_s), default=NEVER)
