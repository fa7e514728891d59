"""Two thousand streams at once over three protocols, while clients hang up and workers die and join.

Each round sends the same requests and draws anew who hangs up and when workers are killed, all from one seed. When a
kill meets which stream is the machine's affair; whatever it meets, a stream whose client stays is whole and the same.
"""

import asyncio
import random
import re
import statistics
import urllib.request
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import aiohttp
import grpc
import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import SimSettings
from splitserve.core.request import SamplingParams
from splitserve.core.worker import Pool
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from tests.cluster.asking import greedy, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.events import completion, events, token_ids_of
from tests.cluster.processes import ROUTER, Cluster, cluster_of
from tests.slow.memory import resident_kib

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEED = 5
STREAMS = 2000
ROUNDS = 4
COMPARED = 60  # with the oracle; each is compared with itself in the other rounds
HANGS_UP = 0.2  # share of the clients; half of them after some tokens, half after some time
HANGS_UP_WITHIN_S = 20.0
KILLS = (Pool.DECODE, Pool.PREFILL, Pool.DECODE)  # in each round; for each a new worker joins
KILL_GAP_S = (3.0, 6.0)
ROUND_WITHIN_S = 180.0
# Room for all of them in any decode worker: none has to wait for another's end.
ENGINE = SimSettings(total_blocks=STREAMS * 16, max_num_seqs=STREAMS, step_s=0.3)
# Two busy cores and 2,000 streams must not look like a dead worker or a stuck one; a killed one ends its connection.
PATIENT = ROUTER.model_copy(
    update={"http": "127.0.0.1:0", "heartbeat_timeout_s": 60.0, "inter_token_deadline_s": 300.0, "probe_after_s": 600.0}
)
MOST_GROWTH_KIB = 2 * STREAMS  # as in test_load


@dataclass(frozen=True, slots=True)
class Wish:
    """What one client asks for, the same in every round."""

    number: int
    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Whim:
    """When a client hangs up: after so many tokens, or so long; with neither it stays."""

    tokens: int | None = None
    after_s: float | None = None

    @property
    def stays(self) -> bool:
        return self.tokens is None and self.after_s is None


@dataclass(slots=True)
class Heard:
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    complete: bool = False


@dataclass(slots=True)
class Told:
    """What came at once. `index` is None where the protocol does not say it."""

    token_ids: list[int]
    text: str
    index: int | None = None
    is_last: bool = False


def wish(number: int) -> Wish:
    """A prompt of 4 to 67 tokens, and 40 to 90 tokens to make; every other one is sampled with a seed."""
    plain = greedy(40 + number * 7 % 51)
    sampling = plain if number // 3 % 2 else replace(plain, temperature=0.9, top_p=0.95, seed=number)
    return Wish(number, prompt_of(4 + number % 64, seed=number), sampling)


def whim(rng: random.Random, asked: Wish) -> Whim:
    if rng.random() >= HANGS_UP:
        return Whim()
    if rng.random() < 0.5:
        assert asked.sampling.max_tokens is not None
        return Whim(tokens=rng.randint(1, asked.sampling.max_tokens - 1))
    return Whim(after_s=rng.uniform(0, HANGS_UP_WITHIN_S))


# Three ways to ask --------------------------------------------------------------------------------------------------
class Callers:
    """A third of the streams each."""

    def __init__(self, client: AsyncClient, channel: grpc.aio.Channel, session: aiohttp.ClientSession) -> None:
        self._client = client
        self._stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        self._session = session

    def ask(self, asked: Wish) -> AsyncGenerator[Told, None]:
        return (self._shared, self._generate, self._http)[asked.number % 3](asked)

    async def _shared(self, asked: Wish) -> AsyncGenerator[Told, None]:
        async with aclosing(self._client.generate(asked.prompt, asked.sampling)) as chunks:
            async for chunk in chunks:
                yield Told(list(chunk.token_ids), chunk.text, chunk.index, chunk.usage is not None)

    async def _generate(self, asked: Wish) -> AsyncGenerator[Told, None]:
        message = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=asked.prompt), sampling=convert.sampling_to_proto(asked.sampling)
        )
        call = self._stub.Generate(message)
        try:
            async for part in call:
                yield Told(list(part.token_ids), part.text, part.index, part.HasField("usage"))
        finally:
            call.cancel()

    async def _http(self, asked: Wish) -> AsyncGenerator[Told, None]:
        sampling = asked.sampling
        assert sampling.max_tokens is not None
        said = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        body = completion(asked.prompt, sampling.max_tokens, **said)
        async with self._session.post("/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for event in events(answer.content):
                (choice,) = event["choices"]
                yield Told(token_ids_of(event), choice["text"], is_last=choice["finish_reason"] is not None)


async def hear(callers: Callers, asked: Wish, mood: Whim) -> Heard:
    """What the client has when the stream ends, or when it hangs up."""
    heard = Heard()
    with suppress(TimeoutError):
        async with asyncio.timeout(mood.after_s), aclosing(callers.ask(asked)) as parts:
            async for told in parts:
                assert not heard.complete, "something came after the last"
                assert told.index in (None, len(heard.token_ids)), "a token came twice or was left out"
                heard.token_ids += told.token_ids
                heard.text += told.text
                heard.complete = told.is_last
                if mood.tokens is not None and len(heard.token_ids) >= mood.tokens:
                    return heard
    return heard


# Workers come and go ------------------------------------------------------------------------------------------------
class Churn:
    """Kills the busiest worker of a pool, and has a new one join, under a name that nobody had."""

    def __init__(self, cluster: Cluster, client: AsyncClient) -> None:
        self._cluster = cluster
        self._client = client
        self.killed: Counter[Pool] = Counter()
        self.added: Counter[Pool] = Counter()
        self.most_at_once = 0

    async def run(self, rng: random.Random) -> None:
        for pool in KILLS:
            await self._watch(rng.uniform(*KILL_GAP_S))
            await self._kill(pool)
            await self._add(pool)

    async def _watch(self, for_s: float) -> None:
        """How many streams there are at once, meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                while True:
                    fleet = await self._client.fleet()
                    self.most_at_once = max(self.most_at_once, fleet.waiting_requests + fleet.running_requests)
                    await asyncio.sleep(0.5)

    async def _kill(self, pool: Pool) -> None:
        mine = [each for each in (await self._client.fleet()).workers if each.pool is pool]
        busiest = max(mine, key=lambda each: (each.decodes + each.prefills, each.load.running)).worker.name
        await asyncio.to_thread(self._cluster.kill, busiest)
        self._cluster.workers.pop(busiest).close()
        self.killed[pool] += 1

    async def _add(self, pool: Pool) -> None:
        process = self._cluster.add(f"{pool}-new-{self.added[pool]}", pool)
        await asyncio.to_thread(process.ready)
        self.added[pool] += 1


# A round ------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Tally:
    """Of all rounds."""

    whole: dict[int, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    streams: int = 0
    cancelled: int = 0
    held_kib: list[int] = field(default_factory=list)

    def take(self, asked: Wish, mood: Whim, heard: Heard) -> None:
        self.streams += 1
        self.cancelled += not heard.complete
        got = (tuple(heard.token_ids), heard.text)
        if heard.complete:
            assert len(heard.token_ids) == asked.sampling.max_tokens
            assert self.whole.setdefault(asked.number, got) == got, "not what an earlier round answered"
        else:
            assert not mood.stays, (
                f"stream {asked.number} ended after {len(heard.token_ids)} tokens, and nobody said why"
            )


async def one_round(callers: Callers, churn: Churn, tally: Tally, rng: random.Random) -> None:
    wishes = [wish(number) for number in range(STREAMS)]
    moods = [whim(rng, asked) for asked in wishes]
    async with asyncio.timeout(ROUND_WITHIN_S), asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(hear(callers, *both)) for both in zip(wishes, moods, strict=True)]
        tasks.create_task(churn.run(rng))
    for asked, mood, stream in zip(wishes, moods, streams, strict=True):
        tally.take(asked, mood, stream.result())


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("churn"), 2, 3, ENGINE, PATIENT) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, Retries(most=0)) as connected:
        yield connected


@pytest.fixture
async def callers(cluster: Cluster, client: AsyncClient) -> AsyncIterator[Callers]:
    connector, limit = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    http = aiohttp.ClientSession(f"http://{cluster.router.facts['http']}", connector=connector, timeout=limit)
    async with http as session, grpc.aio.insecure_channel(cluster.address) as channel:
        yield Callers(client, channel, session)


async def counted(cluster: Cluster, name: str) -> dict[str, float]:
    """The samples of one of the router's counters, by their labels."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{cluster.router.facts['metrics']}/metrics", timeout=10) as response:
            return str(response.read().decode())

    page = await asyncio.to_thread(read)
    return {labels: float(value) for labels, value in re.findall(rf"^{name}(\S*) (\S+)$", page, re.MULTILINE)}


async def test_streams_survive_what_their_workers_do_not_and_nothing_stays_behind(
    cluster: Cluster, client: AsyncClient, callers: Callers, expected: Expected
) -> None:
    rng, churn, tally = random.Random(SEED), Churn(cluster, client), Tally()
    for _ in range(ROUNDS):
        await one_round(callers, churn, tally, rng)
        await settled(client, len(cluster.workers))
        tally.held_kib.append(resident_kib(cluster.router))
    resumed = sum((await counted(cluster, "splitserve_resumed_requests_total")).values())
    setbacks, codes = [await counted(cluster, f"splitserve_{name}_total") for name in ("failed_attempts", "requests")]
    print(
        f"\n{tally.streams} streams, {tally.cancelled} cancelled, at most {churn.most_at_once} at once; killed "
        f"{dict(churn.killed)}, added {dict(churn.added)}; {resumed:.0f} resumed, failed attempts {setbacks}; requests "
        f"{codes}; router {tally.held_kib} KiB"
    )
    for asked in map(wish, range(COMPARED)):
        if asked.number in tally.whole:
            answer = await expected(asked.prompt, asked.sampling)
            assert tally.whole[asked.number] == (answer.token_ids, answer.text)
    assert churn.most_at_once > STREAMS * (1 - HANGS_UP) * 0.9, "they were not there at once"
    assert min(churn.killed[pool] for pool in Pool) >= 3
    assert resumed > 0, "no kill met a stream"
    assert sum((await counted(cluster, "splitserve_running_requests")).values()) == 0
    assert STREAMS * ROUNDS * HANGS_UP * 0.7 < tally.cancelled < STREAMS * ROUNDS * HANGS_UP * 1.3
    growth_kib = [after - before for before, after in pairwise(tally.held_kib)]
    assert statistics.median(growth_kib) <= MOST_GROWTH_KIB, f"after each round the router holds {tally.held_kib} KiB"
