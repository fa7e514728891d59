"""Running decodes that move between real processes: streams that lose no token, whatever dies on the way."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import SimSettings
from splitserve.core.fleet import Health
from splitserve.core.request import SamplingParams
from tests.cluster.asking import Answer, ask, eventually, greedy, holds, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import Cluster, cluster_of

# Slow enough that a test can act while tokens come: 500 take 2.5 s.
ENGINE = SimSettings(step_s=0.005, prefill_token_s=0.00002, decode_token_s=0.00001)
DECODES = ("decode-0", "decode-1", "decode-2")
MANY = 36  # 12 on each decode worker, which move four at a time
OUTPUT = greedy(500)
LONG = greedy(1500)
WAIT_S = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("migration"), prefill=1, decode=3, engine=ENGINE) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """After each test whatever has ended is started again; then all memory is free on every worker."""
    async with AsyncClient(cluster.address, Retries(most=0)) as connected:
        yield connected
        for name, process in list(cluster.workers.items()):
            if process.exited:
                cluster.restart(name)
        for process in cluster.workers.values():
            process.ready()
        await settled(connected, 1 + len(DECODES))


class Streams:
    """Requests stream-0, stream-1, ... under way, and how many tokens each has."""

    def __init__(self, client: AsyncClient, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams) -> None:
        self.prompts, self.sampling = prompts, sampling
        self._tokens = [0] * len(prompts)
        self._changed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._ask(client, number)) for number in range(len(prompts))]

    async def seen(self, tokens: int) -> None:
        """Until every stream has so many."""
        async with asyncio.timeout(WAIT_S):
            while min(self._tokens) < tokens:
                self._changed.clear()
                await self._changed.wait()

    async def check(self, expected: Expected) -> Sequence[Answer]:
        """Every stream has what one colocated worker answers; `ask` has looked at every index."""
        answers = await asyncio.gather(*self._tasks)
        oracle = await asyncio.gather(*(expected(prompt, self.sampling) for prompt in self.prompts))
        assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
        return answers

    async def _ask(self, client: AsyncClient, number: int) -> Answer:
        def on_chunk(tokens: int) -> None:
            self._tokens[number] = tokens
            self._changed.set()

        return await ask(client, self.prompts[number], self.sampling, on_chunk, request_id=f"stream-{number}")


async def streams_of(client: AsyncClient, count: int, sampling: SamplingParams) -> Streams:
    """So many that all decode."""
    streams = Streams(client, [prompt_of(40 + 11 * number, seed=number) for number in range(count)], sampling)
    await streams.seen(3)
    return streams


async def under_way(client: AsyncClient, name: str) -> None:
    """Until the worker drains and has fewer decodes than before: some have moved, others are on their way."""
    before = 0

    async def some_have_moved() -> bool:
        nonlocal before
        status = next(status for status in (await client.fleet()).workers if status.worker.name == name)
        before = max(before, status.decodes)
        return status.health is Health.DRAINING and 0 < status.decodes < before

    await eventually(some_have_moved, f"moves away from {name}")


# Drains -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["order", "signal"])
async def test_a_worker_drained_under_load_hands_its_streams_over(
    cluster: Cluster, client: AsyncClient, expected: Expected, how: str
) -> None:
    streams = await streams_of(client, 20, OUTPUT)
    if how == "order":
        assert (await client.drain("decode-0", timeout_s=WAIT_S)).migrated_requests > 0
    else:
        cluster.workers["decode-0"].signal(signal.SIGTERM)
    assert await asyncio.to_thread(cluster.workers["decode-0"].ended) == 0
    answers = await streams.check(expected)
    assert "decode-0" not in {answer.timings.decode_worker for answer in answers}
    assert {answer.timings.attempts for answer in answers} == {1}, "they moved, KV and all, and were not resumed"


async def test_a_sampler_state_goes_along(client: AsyncClient, expected: Expected) -> None:
    sampling = SamplingParams(
        max_tokens=400, ignore_eos=True, temperature=0.9, seed=7, presence_penalty=0.5, frequency_penalty=0.25
    )
    streams = await streams_of(client, 12, sampling)
    assert (await client.drain("decode-0", timeout_s=WAIT_S)).migrated_requests > 0
    answers = await streams.check(expected)
    assert {answer.timings.attempts for answer in answers} == {1}


async def test_one_worker_after_another_can_be_drained(client: AsyncClient, expected: Expected) -> None:
    streams = await streams_of(client, 9, LONG)
    for name in DECODES[:2]:
        await client.drain(name, timeout_s=WAIT_S)
    answers = await streams.check(expected)
    assert {answer.timings.decode_worker for answer in answers} == {"decode-2"}


# One request --------------------------------------------------------------------------------------------------------
async def test_a_request_moves_by_command(cluster: Cluster, client: AsyncClient, expected: Expected) -> None:
    streams = await streams_of(client, 1, LONG)
    here = next(status.worker.name for status in (await client.fleet()).workers if status.decodes)
    there = next(name for name in DECODES if name != here)
    command = (sys.executable, "-m", "splitserve", "migrate", "stream-0", "--to", there, "--router", cluster.address)
    done = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=WAIT_S, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"stream-0 went from {here} to {there}" in done.stdout
    (answer,) = await streams.check(expected)
    assert (answer.timings.decode_worker, answer.timings.attempts) == (there, 1)


async def test_a_request_may_go_round_and_round(client: AsyncClient, expected: Expected) -> None:
    streams = await streams_of(client, 1, LONG)
    moves = [await client.migrate("stream-0") for _ in range(12)]
    assert [move.to_worker for move in moves[:-1]] == [move.from_worker for move in moves[1:]]
    (answer,) = await streams.check(expected)
    assert (answer.timings.decode_worker, answer.timings.attempts) == (moves[-1].to_worker, 1)


async def test_a_move_is_exact_wherever_the_last_block_ends(client: AsyncClient, expected: Expected) -> None:
    """Blocks hold 16 tokens: here is a stream for each place in one."""
    streams = Streams(client, [prompt_of(16 + place) for place in range(16)], LONG)
    await streams.seen(1)
    for _ in range(2):
        for number in range(16):
            await client.migrate(f"stream-{number}")
    answers = await streams.check(expected)
    assert {answer.timings.attempts for answer in answers} == {1}


# Deaths -------------------------------------------------------------------------------------------------------------
async def test_a_worker_killed_while_it_hands_over_leaves_every_stream_whole(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    streams = await streams_of(client, MANY, OUTPUT)
    drained = asyncio.create_task(client.drain("decode-0", timeout_s=WAIT_S))
    await under_way(client, "decode-0")
    cluster.kill("decode-0")
    await drained
    answers = await streams.check(expected)
    assert "decode-0" not in {answer.timings.decode_worker for answer in answers}


async def test_a_worker_killed_while_it_takes_over_leaves_every_stream_whole(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    streams = await streams_of(client, MANY, OUTPUT)
    drained = asyncio.create_task(client.drain("decode-0", timeout_s=WAIT_S))
    await under_way(client, "decode-0")
    cluster.kill("decode-1")
    assert (await drained).migrated_requests > 0
    assert await asyncio.to_thread(cluster.workers["decode-0"].ended) == 0
    answers = await streams.check(expected)
    assert {answer.timings.decode_worker for answer in answers} == {"decode-2"}


async def test_a_worker_stopped_while_it_takes_over_delays_streams_and_loses_none(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    streams = await streams_of(client, MANY, OUTPUT)
    drained = asyncio.create_task(client.drain("decode-0", timeout_s=WAIT_S))
    await under_way(client, "decode-0")
    cluster.workers["decode-1"].signal(signal.SIGSTOP)
    try:
        await streams.check(expected)
    finally:
        cluster.workers["decode-1"].signal(signal.SIGCONT)
    await drained
    await holds(client, "decode-1", lambda status: status.health is Health.READY)
