"""Clients that do not read, one for each way to ask: over real sockets, with a real router and simulated engines."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import RequestLimits, SimSettings
from splitserve.core.errors import Overloaded, SplitserveError
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from splitserve.rpc.status import from_rpc_error
from tests.cluster.asking import ask, eventually, greedy, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.events import completion, events, token_ids_of
from tests.cluster.processes import ROUTER, Cluster, cluster_of

# What sockets and HTTP/2 windows hold by themselves is a part of it: a message a token, and large ones.
PROMPT, TOKENS, LOGPROBS = prompt_of(40), 6000, 5
LONG = replace(greedy(TOKENS), logprobs=LOGPROBS)
SMALL_SEGMENT = 536  # bytes: the sender's kernel makes its buffer as large as so many segments need
SMALL_BUFFER = 4096  # bytes
QUICK = SimSettings(step_s=0.0002, prefill_token_s=0.0, decode_token_s=0.0)
BUFFER_TOKENS = 64
WITHIN_S = 60.0
ENDS = ("generate", "shared", "http")


def limited(client_stall_s: float) -> Any:
    limits = RequestLimits(client_buffer_tokens=BUFFER_TOKENS, client_stall_s=client_stall_s)
    return ROUTER.model_copy(update={"http": "127.0.0.1:0", "limits": limits, "chunk_gap_s": 0.0})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("slow-client"), 1, 1, QUICK, limited(120.0)) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, Retries(most=0)) as connected:
        yield connected
        await settled(connected, 2)


class Unread(Protocol):
    """A stream that is read only when told to."""

    async def some(self) -> list[int]:
        """The first tokens."""

    async def rest(self, index: int) -> list[int]:
        """What comes from this position of the output on. Raises a SplitserveError, or ConnectionError."""

    async def neighbour(self) -> list[int]:
        """Another request's whole output, on the same connection where one connection carries several."""


class Generate:
    """gRPC, a call of its own."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        self.call = self._stub.Generate(_message(PROMPT, TOKENS))

    async def some(self) -> list[int]:
        return list((await self.call.read()).token_ids)

    async def rest(self, index: int) -> list[int]:
        return await self._read(self.call, index)

    async def neighbour(self) -> list[int]:
        return await self._read(self._stub.Generate(_message(PROMPT[:20], 200)), 0)

    async def _read(self, call: Any, index: int) -> list[int]:
        token_ids: list[int] = []
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                assert message.index == index + len(token_ids), "a token came twice or was left out"
                token_ids.extend(message.token_ids)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return token_ids


class SharedCall:
    """gRPC, one call for all of a client's requests."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self.chunks: AsyncGenerator[Any, None] = client.generate(PROMPT, LONG)

    async def some(self) -> list[int]:
        return list((await anext(self.chunks)).token_ids)

    async def rest(self, index: int) -> list[int]:
        token_ids: list[int] = []
        async for chunk in self.chunks:
            assert chunk.index == index + len(token_ids), "a token came twice or was left out"
            token_ids.extend(chunk.token_ids)
        return token_ids

    async def neighbour(self) -> list[int]:
        return list((await ask(self._client, PROMPT[:20], greedy(200))).token_ids)


class Http:
    """An event stream on a socket with little room. HTTP/1.0: the body is not in pieces, and ends with the stream."""

    def __init__(self, address: str, prompt: tuple[int, ...] = PROMPT, tokens: int = TOKENS) -> None:
        self._address = address
        self._body = json.dumps(completion(prompt, tokens, logprobs=LOGPROBS)).encode()

    async def __aenter__(self) -> "Http":
        host, _, port = self._address.rpartition(":")
        made = socket.socket()
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, (host, int(port)))
        self.reader, self.writer = await asyncio.open_connection(sock=made, limit=SMALL_BUFFER * 4)
        head = b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(self._body)
        self.writer.write(head + self._body)
        self._events = events(self.reader)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()
        with suppress(ConnectionError):
            await self.writer.wait_closed()

    async def some(self) -> list[int]:
        return token_ids_of(await anext(self._events))

    async def rest(self, index: int) -> list[int]:
        return [token async for event in self._events for token in token_ids_of(event)]

    async def neighbour(self) -> list[int]:
        async with Http(self._address, PROMPT[:20], 200) as other:
            return await other.rest(0)


def _message(prompt: tuple[int, ...], tokens: int) -> inference_pb2.GenerateRequest:
    sampling = convert.sampling_to_proto(replace(LONG, max_tokens=tokens))
    ids = inference_pb2.TokenIds(ids=prompt)
    return inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling)


@asynccontextmanager
async def unread(cluster: Cluster, end: str) -> AsyncIterator[Unread]:
    """Begun, and closed in the end."""
    if end == "generate":
        # Else the client's HTTP/2 window grows until the whole output fits into it.
        options = [("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(cluster.address, options) as channel:
            slow = Generate(channel)
            yield slow
            slow.call.cancel()
    elif end == "shared":
        async with AsyncClient(cluster.address, Retries(most=0)) as client:
            shared = SharedCall(client)
            async with aclosing(shared.chunks):
                yield shared
    else:
        async with Http(cluster.router.facts["http"]) as http:
            yield http


async def _nothing_held(client: AsyncClient) -> bool:
    fleet = await client.fleet()
    return all(each.load.free_blocks == each.worker.total_blocks and not each.decodes for each in fleet.workers)


@pytest.mark.parametrize("end", ENDS)
async def test_a_client_that_does_not_read_holds_no_block_and_gets_every_token_once_it_reads(
    cluster: Cluster, client: AsyncClient, expected: Expected, end: str
) -> None:
    async with asyncio.timeout(WITHIN_S), unread(cluster, end) as slow:
        first = await slow.some()
        await eventually(lambda: _nothing_held(client), "no block held")
        assert (await client.fleet()).running_requests == 1, "all of it fitted into the sockets: nothing is tested"
        neighbour = await slow.neighbour()
        other = await ask(client, prompt_of(50), greedy(200))
        token_ids = (*first, *await slow.rest(len(first)))
    assert token_ids == (await expected(PROMPT, greedy(TOKENS))).token_ids
    assert tuple(neighbour) == (await expected(PROMPT[:20], greedy(200))).token_ids
    assert other.same_as(await expected(prompt_of(50), greedy(200)))


@pytest.mark.parametrize("end", ENDS)
async def test_a_client_that_never_reads_is_ended_and_holds_up_neither_others_nor_the_routers_end(
    tmp_path: Path, end: str
) -> None:
    with cluster_of(tmp_path, 1, 1, QUICK, limited(0.5)) as cluster:
        async with AsyncClient(cluster.address) as client, asyncio.timeout(WITHIN_S), unread(cluster, end) as slow:
            first = await slow.some()
            await eventually(lambda: _nothing_runs(client), "nothing running")
            await settled(client, 2)
            with pytest.raises((SplitserveError, ConnectionError)) as ended:
                await slow.rest(len(first))
            # A socket that takes nothing takes no error event either: it is cut off.
            assert isinstance(ended.value, ConnectionError if end == "http" else Overloaded)
            assert "RESOURCE_EXHAUSTED" in cluster.router.log.read_text()
        cluster.router.signal(signal.SIGTERM)
        assert await asyncio.to_thread(cluster.router.ended) == 0


@pytest.mark.parametrize("end", ENDS)
async def test_a_router_that_ends_does_not_wait_for_a_client_that_does_not_read(tmp_path: Path, end: str) -> None:
    hurried = limited(120.0).model_copy(update={"drain_timeout_s": 0.2})
    with cluster_of(tmp_path, 1, 1, QUICK, hurried) as cluster:
        async with AsyncClient(cluster.address) as client, asyncio.timeout(WITHIN_S), unread(cluster, end) as slow:
            await slow.some()
            await eventually(lambda: _nothing_held(client), "no block held")
            cluster.router.signal(signal.SIGTERM)
            assert await asyncio.to_thread(cluster.router.ended) == 0


async def _nothing_runs(client: AsyncClient) -> bool:
    return (await client.fleet()).running_requests == 0
