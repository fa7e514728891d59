"""A gateway on loopback in front of a backend that does as told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from prometheus_client import CollectorRegistry

from splitserve.core.errors import SplitserveError
from splitserve.core.request import Chat, Chunk, FinishReason, GenerateRequest, Logprob, Model, Usage
from splitserve.core.sink import Send, Sink
from splitserve.gateway.endpoints import Limits
from splitserve.gateway.serve import HttpServer

WITHIN_S = 10.0
MODELS = (Model("demo", 4096, created=1700000000), Model("poet", 4096, "demo", 1700000000))

Script = Callable[[GenerateRequest, Send], Awaitable[None]]


class LettersAsTokens:
    """Token 65 is A."""

    def text_of(self, token_id: int) -> str:
        return chr(token_id)


def filling(sink: Sink) -> Send:
    """As a router does it: what is in the middle goes the short way if it can."""
    begun = False

    async def send(chunk: Chunk) -> None:
        nonlocal begun
        if not (begun and chunk.usage is None and sink.put(chunk)):
            begun = True
            await sink.send(chunk)

    return send


@dataclass
class Told:
    """A backend whose generations are scripts; keeps what it was asked."""

    script: Script
    requests: list[GenerateRequest] = field(default_factory=list)
    bearers: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    serves: bool = True
    error: SplitserveError | None = None

    async def generate(self, request: GenerateRequest, sink: Sink, bearer: str = "") -> None:
        self.requests.append(request)
        self.bearers.append(bearer)
        if self.error is not None:
            raise self.error
        try:
            await self.script(request, filling(sink))
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise

    async def tokenize(self, prompt: str | Chat, model: str = "", bearer: str = "") -> tuple[int, ...]:
        text = prompt if isinstance(prompt, str) else "".join(message.content for message in prompt.messages)
        return tuple(text.encode())

    async def models(self, bearer: str = "") -> tuple[Model, ...]:
        return MODELS

    async def can_serve(self) -> bool:
        return self.serves


def says(*texts: str, finish: FinishReason = FinishReason.STOP) -> Script:
    """Each text is one token, whose id is its first letter's; every choice says the same."""

    async def script(request: GenerateRequest, send: Send) -> None:
        count = request.sampling.n
        for choice in range(count):
            for at, text in enumerate(texts):
                chunk = Chunk(request.request_id, at, (ord(text[:1] or "\0"),), text, choice=choice)
                last = at == len(texts) - 1
                usage = Usage(3, len(texts) * count) if last and choice == count - 1 else None
                await send(replace(chunk, finish_reason=finish if last else None, usage=usage))

    return script


def sends(*chunks: Chunk) -> Script:
    """These, each with the request's own id."""

    async def script(request: GenerateRequest, send: Send) -> None:
        for chunk in chunks:
            await send(replace(chunk, request_id=request.request_id))

    return script


def last(index: int = 1, usage: Usage | None = None, finish: FinishReason = FinishReason.STOP) -> Chunk:
    return Chunk("", index, (), "", finish_reason=finish, usage=usage or Usage(3, index))


def likely(text: str, *others: str) -> tuple[Logprob, ...]:
    """A token's log probabilities: it is the likeliest, the others follow."""
    return tuple(Logprob(ord(one), -0.5 - at, at + 1) for at, one in enumerate((text, *others)))


@asynccontextmanager
async def gateway(
    backend: Told, limits: Limits | None = None, registry: CollectorRegistry | None = None, texts: bool = True
) -> AsyncIterator[HttpServer]:
    vocabulary = LettersAsTokens() if texts else None
    async with HttpServer(backend, "127.0.0.1:0", None, registry, limits, vocabulary) as server:
        yield server


def url(server: HttpServer, path: str = "") -> str:
    return f"http://{server.address}{path}"


def events_of(body: bytes) -> Sequence[bytes]:
    return [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event]
