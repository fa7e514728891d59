"""A target that is ready to be sent to, and how a workload's requests get to it.

What all targets share. Each kind (`router`, `openai`, `worker`) gives one function, `Ask`; the rest follows from it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from splitserve.bench.open_loop import Answer, Send
from splitserve.bench.targets.histories import Histories
from splitserve.bench.targets.prompts import prompt_ids
from splitserve.core.request import SamplingParams
from splitserve.workload.requests import Requests

Heard = Callable[[Sequence[int]], object]


class Ask(Protocol):
    def __call__(self, prompt_ids: Sequence[int], output_tokens: int, heard: Heard | None = None) -> Answer:
        """Sends a prompt of these token ids, and yields how many tokens have come whenever some have. The output is as
        long as said, whatever the model would rather say. `heard` is told which tokens came, as far as the server says
        so. Raises SplitserveError or OSError; closed early, it cancels the request."""


@dataclass(frozen=True, slots=True)
class Opened:
    """`name` is the target as `address.parse` takes it. Prompts have tokens below `vocabulary`. `facts` go into a run's
    archive."""

    name: str
    vocabulary: int
    ask: Ask
    facts: Mapping[str, str] = field(default_factory=dict)

    def send(self, requests: Requests, seed: int = 0) -> Send:
        """For `open_loop.run`: the workload's requests with made-up prompts; the same seed gives the same ones."""
        return sender(self.ask, requests, self.vocabulary, seed)


def sender(ask: Ask, requests: Requests, vocabulary: int, seed: int = 0) -> Send:
    """Sends the workload's requests with made-up prompts, see `prompt_ids`."""

    if requests.follows is not None:
        return _session_sender(ask, requests, Histories(requests, vocabulary, seed))

    def send(index: int) -> Answer:
        prompt = prompt_ids(requests, index, vocabulary, seed).tolist()
        return ask(prompt, int(requests.output_tokens[index]))

    return send


def _session_sender(ask: Ask, requests: Requests, histories: Histories) -> Send:
    def send(index: int) -> Answer:
        return answer(index, histories.prompt(index))

    async def answer(index: int, prompt: list[int]) -> Answer:
        heard: list[int] = []
        async with aclosing(ask(prompt, int(requests.output_tokens[index]), heard.extend)) as chunks:
            async for tokens in chunks:
                yield tokens
        histories.answered(index, prompt, heard)

    return send


def greedy(output_tokens: int) -> SamplingParams:
    """Exactly so many tokens, always the same ones."""
    return SamplingParams(max_tokens=output_tokens, min_tokens=output_tokens, temperature=0.0, ignore_eos=True)
