"""Processes that die, stop and come back, under requests: each request ends, exact or with a named error."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import SimSettings
from splitserve.core.errors import DeadlineExceeded, SplitserveError, Unavailable
from splitserve.core.worker import Pool
from tests.cluster.asking import Answer, ask, eventually, greedy, holds, prompt_of, settled, worker_status
from tests.cluster.conftest import Expected
from tests.cluster.processes import Cluster, Process, cluster_of

# Slow enough that a test can act while a prompt is read (2,000 tokens: 0.5 s) and while tokens come (40: 0.2 s).
ENGINE = SimSettings(step_s=0.005, prefill_token_s=0.00025, decode_token_s=0.00001, max_num_batched_tokens=256)
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
PROMPT = prompt_of(2000)
OUTPUT = greedy(60)
PATIENCE_S = 1.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("failures"), prefill=2, decode=2, engine=ENGINE) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """After each test whatever died is started again; then all memory is free on every worker."""
    async with AsyncClient(cluster.address, Retries(most=0)) as connected:
        yield connected
        for name, process in list(cluster.workers.items()):
            if process.exited:
                cluster.restart(name)
        for process in cluster.workers.values():
            process.ready()
        await settled(connected, len(WORKERS))


class Asking:
    """A request under way: `seen` waits for so many tokens."""

    def __init__(self, client: AsyncClient, prompt: tuple[int, ...], patience_s: float = PATIENCE_S) -> None:
        self._tokens = 0
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(ask(client, prompt, OUTPUT, self._on_chunk, inter_token_deadline_s=patience_s))

    async def seen(self, tokens: int) -> None:
        while self._tokens < tokens and not self.task.done():
            self._changed.clear()
            await self._changed.wait()

    async def answer(self) -> Answer:
        return await self.task

    def _on_chunk(self, tokens: int) -> None:
        self._tokens = tokens
        self._changed.set()


async def busy(client: AsyncClient, pool: Pool) -> str:
    """The worker of this pool that holds a job, once there is one."""
    found: list[str] = []

    async def check() -> bool:
        workers = (await client.fleet()).workers
        held = [
            s.worker.name for s in workers if s.pool is pool and (s.prefills if pool is Pool.PREFILL else s.decodes)
        ]
        found[:] = held
        return bool(held)

    await eventually(check, f"a busy {pool} worker")
    return found[0]


@contextmanager
def stopped(process: Process) -> Iterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


async def test_a_prefill_worker_killed_before_a_request_is_not_missed(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    cluster.kill("prefill-0")
    answer = await ask(client, PROMPT, OUTPUT)
    assert answer.same_as(await expected(PROMPT, OUTPUT))
    assert answer.timings.prefill_worker == "prefill-1"


async def test_a_prefill_worker_killed_while_it_reads_the_prompt_is_replaced(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    asking = Asking(client, PROMPT)
    killed = await busy(client, Pool.PREFILL)
    cluster.kill(killed)
    answer = await asking.answer()
    assert answer.same_as(await expected(PROMPT, OUTPUT))
    assert answer.timings.prefill_worker != killed
    assert answer.timings.attempts == 2


async def test_a_prefill_worker_killed_after_its_push_is_no_loss(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    asking = Asking(client, PROMPT)
    prefill = await busy(client, Pool.PREFILL)
    await asking.seen(1)
    cluster.kill(prefill)
    answer = await asking.answer()
    assert answer.same_as(await expected(PROMPT, OUTPUT))


@pytest.mark.parametrize("tokens", [1, 17, 59])
async def test_a_decode_worker_killed_in_mid_stream_leaves_neither_gap_nor_duplicate(
    cluster: Cluster, client: AsyncClient, expected: Expected, tokens: int
) -> None:
    """`ask` checks every index."""
    asking = Asking(client, PROMPT)
    decode = await busy(client, Pool.DECODE)
    await asking.seen(tokens)
    cluster.kill(decode)
    answer = await asking.answer()
    assert answer.same_as(await expected(PROMPT, OUTPUT))


async def test_a_decode_worker_killed_while_its_kv_arrives_is_replaced(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    asking = Asking(client, PROMPT)
    killed = await busy(client, Pool.DECODE)
    cluster.kill(killed)
    answer = await asking.answer()
    assert answer.same_as(await expected(PROMPT, OUTPUT))
    assert answer.timings.decode_worker != killed


async def test_many_streams_survive_the_loss_of_a_decode_worker(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    prompts = [prompt_of(100 + 13 * number, seed=number) for number in range(24)]
    asking = [Asking(client, prompt) for prompt in prompts]
    await asyncio.gather(*(one.seen(3) for one in asking[:12]))
    cluster.kill("decode-1")
    answers = [await one.answer() for one in asking]
    oracle = await asyncio.gather(*(expected(prompt, OUTPUT) for prompt in prompts))
    assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
    assert max(answer.timings.attempts for answer in answers) > 1


async def test_without_a_prefill_worker_the_decode_worker_prefills(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    cluster.kill("prefill-0")
    cluster.kill("prefill-1")
    answer = await ask(client, PROMPT, OUTPUT)
    assert answer.same_as(await expected(PROMPT, OUTPUT))
    assert answer.timings.prefill_worker == ""


async def test_without_a_decode_worker_a_prefill_worker_decodes(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    cluster.kill("decode-0")
    cluster.kill("decode-1")
    assert (await ask(client, PROMPT, OUTPUT)).same_as(await expected(PROMPT, OUTPUT))


async def test_without_any_worker_a_request_is_told_so(cluster: Cluster, client: AsyncClient) -> None:
    for name in WORKERS:
        cluster.kill(name)
    with pytest.raises(Unavailable, match="no worker"):
        await ask(client, PROMPT, deadline_s=10)


async def test_a_worker_started_again_is_a_new_one_and_serves(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    before = cluster.workers["decode-0"].facts["uuid"]
    cluster.kill("decode-0")
    cluster.kill("decode-1")
    after = cluster.restart("decode-0").ready()
    assert after["uuid"] != before
    answer = await ask(client, PROMPT, OUTPUT)
    assert answer.timings.decode_worker == "decode-0"
    assert answer.same_as(await expected(PROMPT, OUTPUT))


@pytest.mark.parametrize("pool", [Pool.PREFILL, Pool.DECODE])
async def test_a_stopped_worker_delays_a_request_and_does_not_hang_it(
    cluster: Cluster, client: AsyncClient, expected: Expected, pool: Pool
) -> None:
    asking = Asking(client, PROMPT)
    name = await busy(client, pool)
    if pool is Pool.DECODE:
        await asking.seen(5)
    with stopped(cluster.workers[name]):
        answer = await asking.answer()
    assert answer.same_as(await expected(PROMPT, OUTPUT))
    assert answer.timings.attempts > 1
    await holds(client, name, lambda status: status.health == "ready")


async def test_blocks_that_a_stopped_worker_may_still_write_are_kept_until_it_answers(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    """The fixture sees that they come back."""
    asking = Asking(client, PROMPT)
    prefill, decode = await busy(client, Pool.PREFILL), await busy(client, Pool.DECODE)
    with stopped(cluster.workers[prefill]):
        answer = await asking.answer()
        status = await worker_status(client, decode)
        assert status is not None
        assert status.load.quarantined_blocks > 0
    assert answer.same_as(await expected(PROMPT, OUTPUT))


async def test_blocks_are_kept_from_a_stopped_worker_until_it_is_dead(cluster: Cluster, client: AsyncClient) -> None:
    asking = Asking(client, PROMPT)
    prefill, decode = await busy(client, Pool.PREFILL), await busy(client, Pool.DECODE)
    with stopped(cluster.workers[prefill]):
        await asking.answer()
        await holds(client, decode, lambda status: status.load.quarantined_blocks > 0)
        cluster.kill(prefill)
        await holds(client, decode, lambda status: status.load.quarantined_blocks == 0)


async def test_with_everything_stopped_a_request_ends_at_its_deadline(cluster: Cluster, client: AsyncClient) -> None:
    asking = asyncio.create_task(ask(client, PROMPT, OUTPUT, deadline_s=1.5))
    await busy(client, Pool.PREFILL)
    for name in WORKERS:
        cluster.workers[name].signal(signal.SIGSTOP)
    try:
        with pytest.raises(SplitserveError) as ended:
            async with asyncio.timeout(10):
                await asking
    finally:
        for name in WORKERS:
            cluster.workers[name].signal(signal.SIGCONT)
    assert isinstance(ended.value, DeadlineExceeded)
    assert "deadline" in str(ended.value)
