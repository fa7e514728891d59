"""One simulated worker: continuous batching with chunked prefill, as vLLM's scheduler does it.

At every boundary between steps it retires what has ended, takes in what has arrived, and decides what runs next:

- only prompts: steps of up to `max_batched_tokens`, first come, first served. With pipeline stages the next step
  starts once the first stage is free;
- only decodes: steps until the batch changes, all of them as one event (`Stretch`);
- both: one round at a time. With pipeline stages a round is one microbatch per stage, each with its share of the
  decodes.

Out of blocks (`memory`), the sequence that joined last is preempted and computed anew. It is one event loop's: nothing
here waits.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from splitserve.kv.layout import blocks_for
from splitserve.latency.model import Step, pairs
from splitserve.planner.deployment import WorkerSpec
from splitserve.planner.simulator.clock import Clock
from splitserve.planner.simulator.decodes import Decodes
from splitserve.planner.simulator.journal import NEVER, Journal
from splitserve.planner.simulator.links import Links
from splitserve.planner.simulator.memory import Memory
from splitserve.planner.simulator.outcome import WorkerUse
from splitserve.planner.simulator.pacing import Pacing
from splitserve.planner.simulator.prefix_cache import PrefixCache
from splitserve.planner.simulator.room import candidate_of
from splitserve.planner.simulator.router import Router
from splitserve.planner.simulator.stretch import Stretch
from splitserve.routing.admission import decode_blocks
from splitserve.routing.lengths import OutputLengths
from splitserve.routing.pace import Batch, Prompt
from splitserve.routing.slack import TOO_SHORT
from splitserve.workload.requests import Prefixes


@dataclass(slots=True, eq=False)
class Reading:
    """A prompt: tokens to compute before a token can be made. `left` is how many tokens the request then still owes."""

    request: int
    tokens: int
    blocks: int
    to: "Worker | None"  # who decodes it; None is this worker
    left: int
    done: int = 0
    kv_ready: float = 0.0  # when the last byte that was sent arrives


Chunk = tuple[Reading, int, bool]  # of which prompt, how many tokens, whether they are its last


class Worker:
    """See the module's docstring. `number` is its place in the deployment."""

    def __init__(
        self,
        number: int,
        spec: WorkerSpec,
        clock: Clock,
        journal: Journal,
        links: Links,
        router: Router,
        prefixes: Prefixes | None,
        prefill_answers: bool,
        tpot_s: float,
        lengths: OutputLengths,
    ) -> None:
        self.number = number
        self.spec = spec
        self.candidate, self._room = candidate_of(spec, number, tpot_s)
        self._clock = clock
        self._journal = journal
        self._links = links
        self._router = router
        self._step_s = spec.latency.step_s
        self._stage_s = spec.latency.stage_s
        self._stages = spec.latency.stages
        self._block = spec.block_tokens
        self._prefill_answers = prefill_answers
        self._prefixes = prefixes if spec.prefix_caching else None
        self._cache = PrefixCache(prefixes.block_tokens) if self._prefixes is not None and prefixes else None
        # Prompts
        self._prompts: deque[Reading] = deque()
        self._preempted: deque[Reading] = deque()  # without blocks, until there is room again
        self._in_flight = 0  # prefill steps under way
        self._stage_free_at = 0.0
        self._last_end = 0.0
        # Decodes
        self._arrived: list[int] = []  # their KV is here; they join at the next boundary
        self._decodes = Decodes()
        self._parked: set[int] = set()
        self._pacing = Pacing(spec.latency, tpot_s, self._decodes, self._decode_s, clock, journal, lengths)
        self._stretch: Stretch | None = None
        self._round: list[Chunk] | None = None  # the chunks of a mixed round under way
        self._wake_number = 0
        self._deciding = False
        # Memory and use
        self._memory = Memory(spec, self._room, self._decodes, self._tokens_to_come)
        self._busy_s = 0.0
        self._served = 0
        self._preemptions = 0
        if spec.cold_start_s > 0:
            clock.at(spec.cold_start_s, self._started, None)

    @property
    def longest(self) -> int:
        """Tokens of prompt and output that it can hold at most."""
        return self._memory.longest

    # What the router asks for ------------------------------------------------------------------------------------
    def compute(self, request: int, to: "Worker | None" = None) -> None:
        """Computes the prompt: for another worker, or to decode it here."""
        tokens = self._journal.prompt[request]
        local = to is None
        blocks = decode_blocks(tokens, self._block) if local else blocks_for(tokens, self._block)
        prompt = Reading(request, tokens, blocks, to, self._journal.output[request])
        self._room.prefill_tokens += tokens
        self._room.running += 1
        if local:
            self._room.free_sequences -= 1
        self._prompts.append(prompt)
        self._memory.changes()
        self._memory.hold(blocks)
        self._nudge()

    def park(self, request: int) -> None:
        """Blocks for KV that is on its way."""
        blocks = decode_blocks(self._journal.prompt[request], self._block)
        self._parked.add(request)
        self._room.free_sequences -= 1
        self._room.parked_limit_blocks -= blocks
        self._memory.changes()
        self._memory.hold(blocks)

    def received(self, request: int) -> None:
        """The KV is here."""
        self._parked.discard(request)
        self._room.parked_limit_blocks += decode_blocks(self._journal.prompt[request], self._block)
        self._room.running += 1
        self._arrived.append(request)
        self._nudge()

    def use(self, simulated_s: float) -> WorkerUse:
        busy = self._busy_s / simulated_s if simulated_s else 0.0
        peak = self._memory.peak_blocks / self.spec.kv_blocks
        name = self.candidate.info.name
        return WorkerUse(name, str(self.spec.role), self._served, min(1.0, busy), peak, self._preemptions)

    # Boundaries --------------------------------------------------------------------------------------------------
    def _started(self, _: None) -> None:
        self.candidate.accepting = True
        self._router.changed(self)

    def _nudge(self) -> None:
        """There is something new to do: at once if the worker is idle, else at the next boundary."""
        if self._deciding or self._round is not None:
            return
        stretch, now = self._stretch, self._clock.now
        if stretch is not None:
            steps = stretch.steps_by(now)
            if steps < stretch.steps:
                stretch.steps = steps
                self._wake_at(stretch.end_of(steps))
        elif not self._in_flight:
            self._wake_at(now)
        elif self._stages > 1 and now >= self._stage_free_at:
            self._next_prefill(None)

    def _wake_at(self, time: float) -> None:
        """Replaces whatever wake-up there was."""
        self._wake_number += 1
        self._clock.at(time, self._wake, self._wake_number)

    def _wake(self, number: int) -> None:
        if number == self._wake_number:
            self._boundary()

    def _boundary(self) -> None:
        self._deciding = True
        freed = self._account()
        if freed:
            self._router.changed(self)
        self._take_in()
        if self._pacing.heeds:
            self.candidate.slack_s = self._pacing.slack_s(TOO_SHORT)
            self.candidate.changed()
        self._run()
        self._deciding = False

    def _account(self) -> bool:
        """Books what ran until now; whether that made room."""
        now, stretch, freed = self._clock.now, self._stretch, False
        if stretch is not None:
            self._decodes.advance(stretch.steps)
            self._busy_s += now - stretch.began
            self._stretch = None
            freed = self._retire()
        if self._round is not None:
            chunks, self._round = self._round, None
            self._computed(chunks)
            freed = True
        return freed

    def _retire(self) -> bool:
        """Sequences whose last token is out leave."""
        ended = self._decodes.ended()
        for sequence in ended:
            self._memory.expectations.lengths.add(self._journal.output[sequence.request])
            self._memory.changes()
            self._end(sequence.request)
        self._memory.see()
        return bool(ended)

    def _end(self, request: int) -> None:
        self._journal.last_token[request] = self._clock.now
        self._pacing.ended(self._journal.output[request])
        self._room.free_sequences += 1
        self._room.running -= 1
        self._served += 1
        self._keep_history(request)
        self._router.ended(request)

    def _keep_history(self, request: int) -> None:
        """What it read and wrote is cached here for the next turn of its session: of an answer the blocks have no name
        but as that turn's. The last token's KV was never computed."""
        following = self._journal.next_turn[request]
        if self._cache is None or self._prefixes is None or following < 0:
            return
        tokens = self._journal.prompt[request] + self._journal.output[request] - 1
        self._cached(self._prefixes.of(following)[: tokens // self._cache.block_tokens])

    def _cached(self, blocks: npt.NDArray[np.int64]) -> None:
        assert self._cache is not None
        self._router.cached(self, self._cache.add(blocks, self._memory.free * self._block))

    def _take_in(self) -> None:
        """What has arrived joins the batch; what was preempted gets its blocks back if there is room."""
        if self._arrived:
            journal = self._journal
            for request in self._arrived:
                prompt = journal.prompt[request]
                self._memory.held -= decode_blocks(prompt, self._block)
                left = journal.output[request] - self._prefill_answers
                if left:
                    self._join(request, prompt + self._prefill_answers, left)
                else:
                    self._end(request)
            self._arrived.clear()
            self._memory.see()
        while self._preempted and self._memory.free >= self._preempted[0].blocks:
            prompt_again = self._preempted.popleft()
            self._memory.wanted -= prompt_again.blocks
            self._prompts.appendleft(prompt_again)
            self._memory.hold(prompt_again.blocks)

    def _join(self, request: int, context: int, left: int) -> None:
        made = self._journal.output[request] - left
        sequence = self._decodes.join(request, context, left, made, self._memory.expectations.share())
        self._memory.changes()
        if self._journal.first_token[request] != NEVER:
            self._pacing.add(sequence)

    def _run(self) -> None:
        """What runs until the next boundary."""
        if self._in_flight:
            return
        if self._decodes.count and self._prompts:
            self._begin_round()
        elif self._decodes.count:
            self._begin_stretch()
        elif self._prompts:
            self._begin_prefill()

    # Decodes only ------------------------------------------------------------------------------------------------
    def _begin_stretch(self) -> None:
        decodes, memory = self._decodes, self._memory
        while memory.steps_of_room() < 1 and decodes.count > 1:
            self._preempt()
        n, context = decodes.count, decodes.context
        steps = max(1, min(decodes.steps_to_an_end(), memory.steps_of_room()))
        first_s = self._decode_s(n, context)
        more_s = (self._decode_s(n, context + n * (steps - 1)) - first_s) / (steps - 1) if steps > 1 else 0.0
        now = self._clock.now
        self._stretch = stretch = Stretch(now, steps, first_s, max(0.0, more_s))
        self._note_first_tokens(now + first_s)
        self._wake_at(stretch.end_of(steps))

    def _decode_s(self, sequences: int, context: int) -> float:
        stages = self._stages
        if stages == 1:
            return self._step_s(Step(0, 0, 0, sequences, context))
        batch = -(-sequences // stages)
        return stages * self._stage_s(Step(0, 0, 0, batch, context * batch // sequences))

    def _note_first_tokens(self, time: float) -> None:
        """Whoever joined just now has its first token after the first step."""
        first_token = self._journal.first_token
        for sequence in self._decodes.newcomers():
            if first_token[sequence.request] == NEVER:
                first_token[sequence.request] = time
                self._pacing.add(sequence)

    def _preempt(self) -> None:
        victim = self._decodes.pop_last()
        context = self._decodes.context_of(victim)
        left = victim.until - self._decodes.step
        self._preemptions += 1
        blocks = decode_blocks(context, self._block)
        self._preempted.append(Reading(victim.request, context, blocks, None, left))
        self._memory.wanted += blocks
        self._memory.changes()

    # Prompts -----------------------------------------------------------------------------------------------------
    def _begin_prefill(self) -> None:
        """One step of prompts alone; with stages another may start before it has ended."""
        now = self._clock.now
        chunks, step = self._chunks(self.spec.max_batched_tokens, 0, 0)
        whole_s = self._step_s(step)
        stage_s = whole_s if self._stages == 1 else self._stage_s(step)
        end = max(now + whole_s, self._last_end + stage_s)
        self._last_end = end
        self._busy_s += stage_s
        self._in_flight += 1
        self._send(chunks, now, end)
        self._clock.at(end, self._prefill_ended, chunks)
        if self._stages > 1:
            self._stage_free_at = now + stage_s
            self._clock.at(self._stage_free_at, self._next_prefill, None)

    def _next_prefill(self, _: None) -> None:
        """The first stage is free while the others compute."""
        waits = self._in_flight and self._prompts and self._clock.now >= self._stage_free_at
        if waits and not self._decodes.count and not self._arrived:
            self._begin_prefill()

    def _prefill_ended(self, chunks: list[Chunk]) -> None:
        self._deciding = True
        self._in_flight -= 1
        self._computed(chunks)
        self._router.changed(self)
        self._take_in()
        self._deciding = False
        if not self._in_flight:
            self._boundary()

    def _chunks(self, budget: int, decodes: int, context: int) -> tuple[list[Chunk], Step]:
        """The next prompt tokens up to the budget, and the step that computes them beside so many decodes."""
        prompts, chunks = self._prompts, []
        tokens = visited = 0
        while prompts and budget > 0:
            prompt = prompts[0]
            if prompt.done == 0:
                self._first_chunk(prompt)
            take = min(prompt.tokens - prompt.done, budget)
            visited += pairs(take, prompt.done)
            prompt.done += take
            tokens += take
            budget -= take
            last = prompt.done == prompt.tokens
            chunks.append((prompt, take, last))
            if last:
                prompts.popleft()
        return chunks, Step(tokens, visited, len(chunks), decodes, context)

    def _first_chunk(self, prompt: Reading) -> None:
        """Its computing begins: what the prefix cache has need not be computed, but has to be sent."""
        journal, request = self._journal, prompt.request
        if journal.prefill_start[request] != journal.prefill_start[request]:
            journal.prefill_start[request] = self._clock.now
        if self._cache is not None and self._prefixes is not None:
            cached = self._cache.hit(self._prefixes.of(request), prompt.tokens)
            journal.cached[request] = prompt.done = cached
            if cached and prompt.to is not None:
                now = self._clock.now
                prompt.kv_ready = self._links.push(self.number, prompt.to.number, cached, now, now)

    def _send(self, chunks: list[Chunk], began: float, end: float) -> None:
        for prompt, tokens, _ in chunks:
            if prompt.to is not None:
                ready = self._links.push(self.number, prompt.to.number, tokens, began, end)
                prompt.kv_ready = max(prompt.kv_ready, ready)

    def _computed(self, chunks: list[Chunk]) -> None:
        for prompt, _, last in chunks:
            if last:
                self._prompt_computed(prompt)

    def _prompt_computed(self, prompt: Reading) -> None:
        journal, request, now = self._journal, prompt.request, self._clock.now
        first = journal.prefill_end[request] != journal.prefill_end[request]
        if first:
            journal.prefill_end[request] = now
            self._room.prefill_tokens -= prompt.tokens
            if self._cache is not None and self._prefixes is not None:
                self._cached(self._prefixes.of(request))
        if prompt.to is not None:
            self._room.running -= 1
            if self._prefill_answers:
                journal.first_token[request] = now
            self._clock.at(max(now, prompt.kv_ready), self._sent, prompt)
            return
        if first:
            journal.kv_ready[request] = now
        if journal.first_token[request] == NEVER:
            journal.first_token[request] = now
        self._memory.held -= prompt.blocks
        if prompt.left > 1:
            self._join(request, prompt.tokens + 1, prompt.left - 1)
        else:
            self._end(request)
        self._memory.see()

    def _sent(self, prompt: Reading) -> None:
        """All of its KV is where it is decoded: the blocks here are free."""
        assert prompt.to is not None
        self._journal.kv_ready[prompt.request] = self._clock.now
        self._served += 1
        self._memory.hold(-prompt.blocks)
        prompt.to.received(prompt.request)
        self._router.changed(self)

    # Both --------------------------------------------------------------------------------------------------------
    def _begin_round(self) -> None:
        running = self._decodes
        if self._memory.steps_of_room() < 1 and running.count > 1:
            self._preempt()
        now, stages, n = self._clock.now, self._stages, running.count
        share, rest = divmod(n, stages)
        round_s = longest_s = 0.0
        chunks: list[Chunk] = []
        for stage in range(stages):
            decodes = share + (stage < rest)
            context = running.context * decodes // n
            some, step = self._chunks(self._prompt_tokens(decodes, context), decodes, context)
            if step.prefills or step.decodes:
                chunks += some
                round_s += self._step_s(step) if stages == 1 else self._stage_s(step)
                longest_s = max(longest_s, 0.0 if stages == 1 else self._step_s(step))
        round_s = max(round_s, longest_s)
        self._send(chunks, now, now + round_s)
        self._round = chunks
        self._stretch = Stretch(now, 1, round_s, 0.0)
        self._note_first_tokens(now + round_s)
        self._wake_at(now + round_s)

    def _prompt_tokens(self, decodes: int, context: int) -> int:
        """How many a step may compute beside so many decodes."""
        most = self.spec.max_batched_tokens - decodes
        if not self._pacing.heeds or not self._prompts:
            return most
        head = self._prompts[0]
        due_in_s = self._journal.due[head.request] - self._clock.now
        prompt = Prompt(head.tokens - head.done, head.done, due_in_s)
        return self._pacing.chunk(prompt, Batch(decodes, context), most, self._parked)

    def _tokens_to_come(self) -> list[int]:
        """Of each prompt whose decode is to run here and does not yet."""
        parked = [self._journal.prompt[request] for request in self._parked]
        return parked + [prompt.tokens for prompt in (*self._prompts, *self._preempted) if prompt.to is None]
