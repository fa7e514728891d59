"""One colocated worker, simulated one step at a time and as plainly as can be: what the fast simulator must agree with.

Memory is endless here. First come, first served, and the router binds two steps of prompts ahead; decodes go before
prompts; a prompt's last chunk makes a token.
"""

from dataclasses import dataclass

from splitserve.latency.model import LatencyModel, PrefillChunk, Step
from splitserve.routing.admission import PREFILL_STEPS_AHEAD
from splitserve.workload.requests import Requests


@dataclass
class _Request:
    number: int
    prompt: int
    output: int
    computed: int = 0
    made: int = 0


def stepwise(latency: LatencyModel, requests: Requests, max_batched_tokens: int) -> tuple[list[float], list[float]]:
    """When each request's first and last token come out."""
    coming = [_Request(n, int(requests.prompt_tokens[n]), int(requests.output_tokens[n])) for n in range(len(requests))]
    first, last = [0.0] * len(coming), [0.0] * len(coming)
    waiting: list[_Request] = []
    running: list[_Request] = []
    now, ahead_limit = 0.0, PREFILL_STEPS_AHEAD * max_batched_tokens  # prompt tokens that the router binds
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, float(requests.arrival_s[coming[0].number]))
        ahead = sum(request.prompt for request in waiting)
        while coming and requests.arrival_s[coming[0].number] <= now and ahead < ahead_limit:
            ahead += coming[0].prompt
            waiting.append(coming.pop(0))
        budget = max_batched_tokens - len(running)
        chunks, computing = [], []
        for request in waiting:
            take = min(budget, request.prompt - request.computed)
            if take > 0:
                chunks.append(PrefillChunk(take, request.computed))
                computing.append((request, take))
                budget -= take
        now += latency.step_s(Step.of(chunks, [request.prompt + request.made for request in running]))
        made = list(running)
        for request, take in computing:
            request.computed += take
            if request.computed == request.prompt:
                made.append(request)
                waiting.remove(request)
                running.append(request)
        for request in made:
            request.made += 1
            if request.made == 1:
                first[request.number] = now
            if request.made == request.output:
                last[request.number] = now
                running.remove(request)
    return first, last
