"""A backend that is somewhere else: one router or several, called by the Python client. For one event loop."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing

from splitserve.client import AsyncClient
from splitserve.core.request import Chat, GenerateRequest, Model
from splitserve.core.sink import Sink
from splitserve.gateway.backend import Oversight
from splitserve.rpc.names import Place


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


class Overseen(Mapping[str, Oversight]):
    """The routers that a client's calls go round, each by itself, for the console: those that there are now. By the
    names that were said as well, which is all that is known before they have been looked up."""

    def __init__(self, said: Sequence[str], client: AsyncClient, opened: Callable[[str | Place], AsyncClient]) -> None:
        self._said = said
        self._client = client
        self._opened = opened
        self._clients: dict[str | Place, AsyncClient] = {}

    def __iter__(self) -> Iterator[str]:
        return iter([str(place) for place in self._client.routers()] or self._said)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Oversight:
        places: dict[str, str | Place] = {said: said for said in self._said}
        places |= {str(place): place for place in self._client.routers()}
        place = places[name]
        if place not in self._clients:
            self._clients[place] = self._opened(place)
        return self._clients[place]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()
