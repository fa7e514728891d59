"""A router, asked over gRPC through the Python client."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Protocol

from splitserve.bench.open_loop import Answer, Send
from splitserve.bench.targets.opened import Ask, Heard, Opened, greedy, sender
from splitserve.bench.targets.options import Options, vocabulary_of
from splitserve.client import AsyncClient, Retries
from splitserve.core.errors import Unavailable
from splitserve.core.request import Chunk, SamplingParams
from splitserve.workload.requests import Requests

_ASK_AGAIN_S = 0.1


class Client(Protocol):
    """What is needed of `splitserve.client.AsyncClient`. Give it no retries: a request that was retried is another
    one's load, and hides an error."""

    def generate(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None, *, slo_class: str = ""
    ) -> AsyncGenerator[Chunk, None]: ...


def to_router(client: Client, requests: Requests, vocabulary: int, seed: int = 0, slo_class: str = "") -> Send:
    """Sends the workload's requests through a client that is there already; the router's default class if none is
    named."""
    return sender(asking(client, slo_class), requests, vocabulary, seed)


def asking(client: Client, slo_class: str = "") -> Ask:
    return partial(_ask, client, slo_class)


@asynccontextmanager
async def open_router(name: str, address: str, options: Options) -> AsyncIterator[Opened]:
    """`address` is host:port, or several with commas between them. Raises ConfigError for options that can't be used,
    Unavailable if no router answers or none has a worker, Unauthenticated and what else a router says."""
    vocabulary = vocabulary_of(options)
    async with AsyncClient(address, Retries(most=0), tls=options.tls, api_key=options.api_key) as client:
        model = await _serving(client, options.answer_within_s)
        yield Opened(name, vocabulary, asking(client), {"kind": "router", "server": address, "model": model})


async def _ask(
    client: Client, slo_class: str, prompt_ids: Sequence[int], output_tokens: int, heard: Heard | None = None
) -> Answer:
    async with aclosing(client.generate(prompt_ids, greedy(output_tokens), slo_class=slo_class)) as chunks:
        async for chunk in chunks:
            if heard is not None:
                heard(chunk.token_ids)
            yield len(chunk.token_ids)


async def _serving(client: AsyncClient, within_s: float) -> str:
    """The name of the model, once a worker serves it."""
    missing = "no router answers there; start one with `splitserve up`, or look at the address and at TLS"
    try:
        async with asyncio.timeout(within_s):
            model = (await client.models())[0].name
            missing = "a router answers, but none of its workers takes requests; look at `splitserve status`"
            while not await client.can_serve():  # noqa: ASYNC110 - the router's state has no event to wait for
                await asyncio.sleep(_ASK_AGAIN_S)
    except Unavailable as error:
        raise Unavailable(f"{missing} ({error})") from error
    except TimeoutError as error:
        raise Unavailable(f"{missing} (within {within_s:g} s)") from error
    return model
