"""The running decodes of one simulated worker, each a token further with every step. It counts steps and no time."""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(slots=True, eq=False)
class Sequence:
    """`context` tokens when it joined, at step `since`, with `made` output tokens out; it ends after step `until`."""

    request: int
    context: int
    since: int
    until: int
    made: int
    share: float  # of outputs that it is taken to be longer than: `routing/peak`
    expected: int = 0
    running: bool = True
    first_token: float = 0.0


class Decodes:
    """`count` of them, which hold `context` tokens together, after `step` steps."""

    def __init__(self) -> None:
        self.count = 0
        self.context = 0
        self.step = 0
        self._ends: list[tuple[int, int, Sequence]] = []  # heap of (until, request, sequence)
        self._joined: list[Sequence] = []  # in that order; the last one is preempted first

    def join(self, request: int, context: int, left: int, made: int, share: float) -> Sequence:
        """It has `left` tokens to make."""
        sequence = Sequence(request, context, self.step, self.step + left, made, share)
        heappush(self._ends, (sequence.until, request, sequence))
        self._joined.append(sequence)
        self.count += 1
        self.context += context
        if len(self._joined) > 4 * self.count + 64:
            self._joined = list(self.running())
        return sequence

    def advance(self, steps: int) -> None:
        self.step += steps
        self.context += self.count * steps

    def ended(self) -> list[Sequence]:
        """Those whose last token is out; they leave."""
        ends, found = self._ends, []
        while ends and ends[0][0] <= self.step:
            _, _, sequence = heappop(ends)
            if sequence.running:
                self._leave(sequence)
                found.append(sequence)
        return found

    def pop_last(self) -> Sequence:
        """The one that joined last leaves."""
        last = self._joined.pop()
        while not last.running:
            last = self._joined.pop()
        self._leave(last)
        return last

    def steps_to_an_end(self) -> int:
        """Until the next one ends."""
        while not self._ends[0][2].running:
            heappop(self._ends)
        return self._ends[0][0] - self.step

    def newcomers(self) -> Iterator[Sequence]:
        """Those that joined since the last step."""
        for sequence in reversed(self._joined):
            if sequence.since != self.step:
                return
            yield sequence

    def running(self) -> Iterator[Sequence]:
        return (sequence for sequence in self._joined if sequence.running)

    def context_of(self, sequence: Sequence) -> int:
        return sequence.context + self.step - sequence.since

    def made_by(self, sequence: Sequence) -> int:
        """Its output tokens so far."""
        return sequence.made + self.step - sequence.since

    def _leave(self, sequence: Sequence) -> None:
        sequence.running = False
        self.count -= 1
        self.context -= self.context_of(sequence)
