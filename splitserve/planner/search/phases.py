"""Light simulations of one phase by itself, the other taking no time: what a pool of a role could serve.

Prefill: one queue, first come, first served, to whichever worker is free; prompts share a step up to its chunk and
follow each other through pipeline stages. Decode and colocated: requests are dealt in turn. Between joins and ends a
batch of n sequences grows by n tokens of context a step, so k steps take k times the step in their middle, which is
exact where a step's time is affine in context. Preemption is left out: these are estimates from above, and judge what
is worth simulating as a whole (`goodput`).
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil, inf

from splitserve.core.slo import Slo
from splitserve.latency.model import LatencyModel, Step
from splitserve.planner.deployment import Role
from splitserve.planner.search.candidates import Option
from splitserve.planner.search.demand import Demand

Line = tuple[float, float]


class DecodeTime:
    """A decode step's time as a straight line in context, for each number of sequences: through two contexts around
    the demand's mean. With pipeline stages each has its share of the sequences. A cache, one a worker option."""

    def __init__(self, latency: LatencyModel, mean_context: float) -> None:
        self._latency = latency
        self._near, self._far = 0.5 * mean_context, 1.5 * mean_context
        self._lines: dict[int, Line] = {}

    def line(self, sequences: int) -> Line:
        """Seconds without context, and seconds per token of context of all sequences."""
        line = self._lines.get(sequences)
        if line is None:
            near, far = int(self._near * sequences), max(int(self._far * sequences), 1)
            low, high = self._step_s(sequences, near), self._step_s(sequences, far)
            slope = max(0.0, (high - low) / (far - near))
            line = self._lines[sequences] = (low - slope * near, slope)
        return line

    def _step_s(self, sequences: int, context: int) -> float:
        batches = min(sequences, self._latency.stages)
        step = Step(decodes=ceil(sequences / batches), context_tokens=context // batches)
        return max(self._latency.step_s(step), batches * self._latency.stage_s(step))


@dataclass(frozen=True, slots=True)
class Times:
    """Of each request: seconds to its first token, and per token after that; inf where it never came."""

    ttft_s: list[float]
    tpot_s: list[float]

    def attainment(self, slo: Slo) -> float:
        met = sum(t <= slo.ttft_s and y <= slo.tpot_s for t, y in zip(self.ttft_s, self.tpot_s, strict=True))
        return met / max(len(self.ttft_s), 1)


def simulate_phase(
    option: Option, workers: int, demand: Demand, rate_rps: float, decode: DecodeTime, max_sequences: int
) -> Times:
    """A pool of so many workers serves the demand at this rate."""
    if option.role is Role.PREFILL:
        return Times(_prefill(option, workers, demand, rate_rps), [0.0] * len(demand))
    serve = _decode if option.role is Role.DECODE else _colocated
    hands = [serve(option, hand, rate_rps, decode, max_sequences) for hand in demand.dealt(workers)]
    return Times([t for hand in hands for t in hand.ttft_s], [y for hand in hands for y in hand.tpot_s])


def _prefill(option: Option, workers: int, demand: Demand, rate_rps: float) -> list[float]:
    """Time to the prompt's end."""
    step_s, stage_s = option.costs.latency.step_s, option.costs.latency.stage_s
    staged, chunk = option.costs.latency.stages > 1, option.chunk_tokens
    arrival, new, visited = [at / rate_rps for at in demand.arrival], demand.new, demand.pairs
    ttft, head, count = [inf] * len(demand), 0, len(demand)
    free: list[tuple[float, int, int, int]] = [(0.0, worker, -1, 0) for worker in range(workers)]
    heapify(free)
    while free:
        at, worker, request, done = heappop(free)  # that worker goes on with a prompt of which so much is done, or none
        if request < 0:
            if head == count:
                continue
            request, head = head, head + 1
            at = max(at, arrival[request])
        room, tokens, attention, ended, carried = chunk, 0, 0.0, [], 0
        while True:
            take = min(room, new[request] - done)
            tokens += take
            attention += _part(visited[request], new[request], done, take)
            room -= take
            if done + take < new[request]:
                carried = done + take
                break
            ended.append(request)
            done = 0
            if not room or head == count or arrival[head] > at:
                request = -1
                break
            request, head = head, head + 1
        step = Step(tokens, int(attention), len(ended) + (carried > 0))
        took = step_s(step)
        for prompt in ended:
            ttft[prompt] = at + took - arrival[prompt]
        heappush(free, (at + (stage_s(step) if staged else took), worker, request, carried))
    return ttft


def _part(visited: int, new: int, done: int, take: int) -> float:
    """Pairs of the tokens from `done` on, of a prompt that has so many pairs in all."""
    if take == new:
        return visited
    context = (visited - new * (new + 1) / 2) / new + done
    return take * context + take * (take + 1) / 2


def _decode(option: Option, demand: Demand, rate_rps: float, decode: DecodeTime, max_sequences: int) -> Times:
    """KV arrives with the request; the first token is the first step's."""
    arrival, prompt, output = [at / rate_rps for at in demand.arrival], demand.prompt, demand.output
    count, room, line = len(demand), option.costs.kv_tokens, decode.line
    first, last = [inf] * count, [inf] * count
    now, steps, context, head = 0.0, 0, 0, 0
    ends: list[tuple[int, int]] = []
    while head < count or ends:
        if not ends:
            now = max(now, arrival[head])
        joined = head
        while (
            head < count
            and arrival[head] <= now
            and len(ends) < max_sequences
            and (context + prompt[head] < room or not ends)
        ):
            heappush(ends, (steps + output[head], head))
            context += prompt[head]
            head += 1
        running = len(ends)
        base, slope = line(running)
        k = 1
        if head == joined:
            k = ends[0][0] - steps
            if head < count and arrival[head] > now and running < max_sequences:
                k = min(k, _steps_until(arrival[head] - now, base, slope, context, running))
        now += k * (base + slope * (context + running * (k - 1) / 2))
        steps, context = steps + k, context + k * running
        first[joined:head] = [now] * (head - joined)
        while ends and ends[0][0] == steps:
            request = heappop(ends)[1]
            last[request] = now
            context -= prompt[request] + output[request]
    return _times(arrival, first, last, output)


def _steps_until(wait_s: float, base: float, slope: float, context: int, running: int) -> int:
    """How many steps until so much time has passed; one at least."""
    rough = wait_s / (base + slope * context)
    return max(1, ceil(wait_s / (base + slope * (context + running * rough / 2))))


def _colocated(option: Option, demand: Demand, rate_rps: float, decode: DecodeTime, max_sequences: int) -> Times:
    """Chunks of prompts ride in decode steps; a prompt's last chunk makes its first token."""
    arrival, prompt, output = [at / rate_rps for at in demand.arrival], demand.prompt, demand.output
    new, visited = demand.new, demand.pairs
    count, room = len(demand), option.costs.kv_tokens
    first, last = [inf] * count, [inf] * count
    now, steps, context, held, head, done = 0.0, 0, 0, 0, 0, 0
    ends: list[tuple[int, int]] = []
    while head < count or ends:
        if not ends:
            now = max(now, arrival[head])
        running = len(ends)
        ended: list[int] = []
        tokens, attention, left = 0, 0.0, option.chunk_tokens * option.costs.latency.stages - running
        while left > 0 and head < count and arrival[head] <= now and running + len(ended) < max_sequences:
            if context + held + prompt[head] >= room and (running or ended):
                break
            take = min(left, new[head] - done)
            tokens, left = tokens + take, left - take
            attention += _part(visited[head], new[head], done, take)
            done += take
            if done == new[head]:
                ended.append(head)
                held += prompt[head]
                head, done = head + 1, 0
        if tokens:
            now += _mixed_s(option, tokens, int(attention), len(ended) + (done > 0), running, context)
            k = 1
        else:
            base, slope = decode.line(running)
            k = ends[0][0] - steps
            if head < count and arrival[head] > now and running < max_sequences:
                k = min(k, _steps_until(arrival[head] - now, base, slope, context, running))
            now += k * (base + slope * (context + running * (k - 1) / 2))
        steps, context, held = steps + k, context + k * running, 0
        while ends and ends[0][0] == steps:
            request = heappop(ends)[1]
            last[request] = now
            context -= prompt[request] + output[request] - 1
        for request in ended:
            first[request] = now
            if output[request] == 1:
                last[request] = now
            else:
                heappush(ends, (steps + output[request] - 1, request))
                context += prompt[request]
    return _times(arrival, first, last, output)


def _mixed_s(option: Option, tokens: int, attention: int, prefills: int, running: int, context: int) -> float:
    """A round: one batch per stage, each with its share of the decodes, as many as needed with a chunk of prompts."""
    latency = option.costs.latency
    stages = latency.stages
    mixed = min(stages, ceil(tokens / option.chunk_tokens))
    step = Step(tokens // mixed, attention // mixed, ceil(prefills / mixed), running // stages, context // stages)
    if stages == 1:
        return latency.step_s(step)
    others = (stages - mixed) * latency.stage_s(Step(decodes=running // stages, context_tokens=context // stages))
    return max(latency.step_s(step), mixed * latency.stage_s(step) + others)


def _times(arrival: list[float], first: list[float], last: list[float], output: list[int]) -> Times:
    rows = zip(first, last, output, strict=True)
    return Times(
        ttft_s=[came - asked for came, asked in zip(first, arrival, strict=True)],
        tpot_s=[(b - a) / (made - 1) if made > 1 else 0.0 for a, b, made in rows],
    )
