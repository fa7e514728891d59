"""A backend that is somewhere else: one router or several, called by the Python client. For one event loop."""

from contextlib import aclosing

from splitserve.client import AsyncClient
from splitserve.core.request import Chat, GenerateRequest, Model
from splitserve.core.sink import Sink


class RemoteBackend:
    """Whoever made `client` closes it. The caller's key goes on to the router, before a key of the client's own."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def generate(self, request: GenerateRequest, sink: Sink, bearer: str = "") -> None:
        """While the sink waits for its client, nothing more is read: the router sees a slow client, as it is."""
        begun = False
        async with aclosing(self._client.send(request, bearer)) as chunks:
            async for chunk in chunks:
                if begun and chunk.usage is None and sink.put(chunk):
                    continue
                begun = True
                await sink.send(chunk)

    async def tokenize(self, prompt: str | Chat, model: str = "", bearer: str = "") -> tuple[int, ...]:
        return await self._client.tokenize(prompt, model, bearer)

    async def models(self, bearer: str = "") -> tuple[Model, ...]:
        return await self._client.models(bearer)

    async def can_serve(self) -> bool:
        return await self._client.can_serve()
