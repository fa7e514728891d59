"""Whom the load generator sends to: a router, through the Python client, with prompts made of token ids."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

import numpy as np

from splitserve.bench.open_loop import Send
from splitserve.core.request import Chunk, SamplingParams
from splitserve.workload.lengths import Tokens
from splitserve.workload.requests import Requests


class Client(Protocol):
    """What is needed of `splitserve.client.asynchronous.AsyncClient`. Give it no retries: a request that was retried
    is another one's load, and hides an error."""

    def generate(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None
    ) -> AsyncGenerator[Chunk, None]: ...


async def ask_router(client: Client, prompt_ids: Sequence[int], output_tokens: int) -> AsyncGenerator[int, None]:
    """Tokens of each chunk. The output has the length asked for, whatever the model would rather say."""
    sampling = SamplingParams(max_tokens=output_tokens, min_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    async with aclosing(client.generate(prompt_ids, sampling)) as chunks:
        async for chunk in chunks:
            yield len(chunk.token_ids)


def router(client: Client, requests: Requests, vocabulary: int, seed: int = 0) -> Send:
    """Sends the workload's requests with made-up prompts, see `prompt_ids`."""

    def send(index: int) -> AsyncGenerator[int, None]:
        prompt = prompt_ids(requests, index, vocabulary, seed).tolist()
        return ask_router(client, prompt, int(requests.output_tokens[index]))

    return send


def prompt_ids(requests: Requests, index: int, vocabulary: int, seed: int = 0) -> Tokens:
    """As many token ids as the request's prompt has, each below `vocabulary`. Prompts share their leading blocks as
    `requests.prefixes` say, and are otherwise different; the same seed gives the same ones."""
    assert vocabulary > 1
    length = int(requests.prompt_tokens[index])
    own = np.random.default_rng((seed, _OWN, index)).integers(0, vocabulary, length)
    if requests.prefixes is None:
        return own
    size = requests.prefixes.block_tokens
    blocks = requests.prefixes.of(index).tolist()
    for position, block in enumerate(blocks):
        shared = np.random.default_rng((seed, _SHARED, block)).integers(0, vocabulary, size)
        own[position * size : (position + 1) * size] = shared
    return own


_OWN, _SHARED = 0, 1  # streams of random numbers
