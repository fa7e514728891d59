"""Two thousand streams at once through one router: each is whole, and nothing of them stays behind."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from itertools import pairwise

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import SimSettings
from tests.cluster.asking import greedy, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import ROUTER, Cluster, cluster_of
from tests.slow.memory import resident_kib

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = 2000
ROUNDS = 6
COMPARED = 50  # with the oracle; each is compared with itself in the other round
OPEN_WITHIN_S = 300.0
UNREAD_TOKENS = 1000  # of streams that are cut off: far from done when they are
# Room for all of them at once, in either decode worker: none has to wait for another's end. Steps so slow that the
# router keeps up: beyond about 10,000 tokens a second it takes up new calls slowly.
ENGINE = SimSettings(total_blocks=STREAMS * (UNREAD_TOKENS // 16 + 8), max_num_seqs=STREAMS, step_s=0.3)
# Two busy cores and 2,000 streams must not look like a dead worker or a stuck one.
PATIENT = ROUTER.model_copy(update={"heartbeat_timeout_s": 60.0, "inter_token_deadline_s": 300.0})
# Of the router from one round to the next: 2 KiB a stream, less than its prompt and journey take. A round may grow
# more, where streams pile up higher than before and the allocator keeps the room; what each stream leaves behind shows
# in every round.
MOST_GROWTH_KIB = 2 * STREAMS


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("load"), 2, 2, ENGINE, PATIENT) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, Retries(most=0)) as connected:
        yield connected
        await settled(connected, len(cluster.workers))


class Gate:
    """Opens once every stream has its first token; nobody reads on before."""

    def __init__(self, streams: int) -> None:
        self._missing = streams
        self._open = asyncio.Event()

    async def passed(self) -> None:
        self._missing -= 1
        if self._missing == 0:
            self._open.set()
        async with asyncio.timeout(OPEN_WITHIN_S):
            await self._open.wait()


def wish(number: int) -> tuple[tuple[int, ...], int]:
    """A prompt of 4 to 67 tokens, and how many tokens to make: 8 to 40."""
    return prompt_of(4 + number % 64, seed=number), 8 + number * 7 % 33


async def stream(client: AsyncClient, number: int, gate: Gate) -> tuple[int, ...]:
    """The tokens of one whole stream, each of which came exactly once and in order."""
    prompt, tokens = wish(number)
    token_ids: list[int] = []
    async for chunk in client.generate(prompt, greedy(tokens)):
        assert chunk.index == len(token_ids), "a token came twice or was left out"
        if not token_ids:
            await gate.passed()
        token_ids.extend(chunk.token_ids)
    assert len(token_ids) == tokens
    assert chunk.usage is not None
    assert (chunk.usage.prompt_tokens, chunk.usage.output_tokens) == (len(prompt), tokens)
    return tuple(token_ids)


async def all_streams(client: AsyncClient) -> list[tuple[int, ...]]:
    gate = Gate(STREAMS)
    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(stream(client, number, gate)) for number in range(STREAMS)]
    return [one.result() for one in streams]


async def test_two_thousand_streams_at_once_are_whole_and_leave_nothing_behind(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    first = await all_streams(client)
    await settled(client, len(cluster.workers))
    held_kib = [resident_kib(cluster.router)]
    for _ in range(ROUNDS - 1):
        assert await all_streams(client) == first
        await settled(client, len(cluster.workers))
        held_kib.append(resident_kib(cluster.router))
    oracle = [await expected(prompt, greedy(tokens)) for prompt, tokens in map(wish, range(COMPARED))]
    assert first[:COMPARED] == [answer.token_ids for answer in oracle]
    growth_kib = [after - before for before, after in pairwise(held_kib)]
    assert statistics.median(growth_kib) <= MOST_GROWTH_KIB, f"after each round the router holds {held_kib} KiB"


async def test_two_thousand_streams_cut_off_at_once_leave_nothing_behind(client: AsyncClient) -> None:
    """The clients hang up after their first tokens; the fixture waits until all memory is free."""
    gate = Gate(STREAMS)

    async def hang_up(number: int) -> None:
        prompt, _ = wish(number)
        async with aclosing(client.generate(prompt, greedy(UNREAD_TOKENS))) as chunks:
            async for _ in chunks:
                await gate.passed()
                return

    async with asyncio.TaskGroup() as tasks:
        for number in range(STREAMS):
            tasks.create_task(hang_up(number))
