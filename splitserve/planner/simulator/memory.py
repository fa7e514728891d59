"""The KV blocks of one simulated worker: what is held, and what of it the router may count on.

What prompts being computed, parked and pinned KV hold is counted in whole blocks; of running decodes the expected
number: half a block per sequence is unused.
"""

from collections.abc import Callable, Iterator

from splitserve.planner.deployment import WorkerSpec
from splitserve.planner.simulator.decodes import Decodes
from splitserve.planner.simulator.room import Room
from splitserve.routing.peak import Expectations, growth_blocks, peak_tokens


class Memory:
    """`held`: blocks of all but running decodes; `wanted`: of those that were preempted. `to_come`: tokens of each
    context whose decode is to run here and does not yet. `longest`: tokens of prompt and output that fit at most.
    `room` is kept up to date by `hold` and `see`."""

    def __init__(self, spec: WorkerSpec, room: Room, decodes: Decodes, to_come: Callable[[], list[int]]) -> None:
        self._blocks, self._block = spec.kv_blocks, spec.block_tokens
        self.longest = min(spec.max_model_len, spec.kv_blocks * spec.block_tokens)
        self._by_peak = spec.admits_by_peak
        self._room, self._decodes, self._to_come = room, decodes, to_come
        self.expectations = Expectations()
        self.held = 0
        self.wanted = 0
        self.peak_blocks = 0
        self._peak: int | None = None  # tokens of its decodes at their fullest moment; None: to be worked out

    def hold(self, blocks: int) -> None:
        self.held += blocks
        self.see()

    def see(self) -> None:
        used = self._used()
        self._room.free_blocks = max(0, self._blocks - used - self.wanted)
        self._room.growth_blocks = self._growth_blocks(used)
        if used > self.peak_blocks:
            self.peak_blocks = used

    def changes(self) -> None:
        """Who decodes here, or will, is not who it was."""
        self._peak = None

    @property
    def free(self) -> int:
        return self._blocks - self._used()

    def steps_of_room(self) -> int:
        """Decode steps until the blocks run out."""
        n = self._decodes.count
        free_tokens = (self._blocks - self.held) * self._block - n * (self._block - 1) // 2 - self._decodes.context
        return free_tokens // n

    def _used(self) -> int:
        decodes = self._decodes
        return self.held + -(-(decodes.context + decodes.count * (self._block - 1) // 2) // self._block)

    def _growth_blocks(self, used: int) -> int:
        """As `admission.Capacity` reckons it; but while half of the blocks are free nothing is kept back."""
        if not self._by_peak or 2 * used < self._blocks or not self.expectations.known:
            return 0
        to_come = self._to_come()
        if self._peak is None:
            more = self.expectations.lengths.remaining(0, 0.5)
            self._peak = peak_tokens([*self._running(), *((tokens, more) for tokens in to_come), (0, more)])
        return growth_blocks(self._peak, self._decodes.context + sum(to_come), self._blocks, self._block)

    def _running(self) -> Iterator[tuple[int, int]]:
        """Tokens that each decode holds, and that it is expected to make yet."""
        decodes = self._decodes
        for each in decodes.running():
            made = decodes.made_by(each)
            if made >= each.expected:
                each.expected = self.expectations.tokens(each.share, made, self.longest)
            yield decodes.context_of(each), max(0, each.expected - made)
