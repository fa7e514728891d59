"""Real vLLM workers behind a real router, NIXL between them: exactness, and what is left when workers die or stop."""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from splitserve.client import AsyncClient
from splitserve.core.config import KvTransferSettings, RouterConfig, VllmSettings
from splitserve.core.request import SamplingParams
from splitserve.core.worker import Pool
from tests.cluster.asking import Answer, ask, eventually, greedy, prompt_of, settled
from tests.cluster.processes import Cluster, cluster_of
from tests.vllm.oracle import Oracle

EPSILON = 1e-3  # between log-probabilities

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MAX_MODEL_LEN = 8192
LONG = 4000  # tokens: half a second of prefill, time enough to kill somebody
ENGINE = VllmSettings(dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=256, kv_cache_gib=0.25)
ROUTER = RouterConfig(
    listen="127.0.0.1:0", metrics="127.0.0.1:0", heartbeat_interval_s=0.2, heartbeat_timeout_s=4.0, deadline_s=120.0
)
KV = KvTransferSettings(peer_silent_s=2.0, lease_s=10.0)


@pytest.fixture(scope="module")
def oracle(sensitive_model: Path, cores: tuple[int, int]) -> Iterator[Oracle]:
    started = Oracle(sensitive_model, MAX_MODEL_LEN, cores[1])
    yield started
    started.close()


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, sensitive_model: Path, cores: tuple[int, int], oracle: Oracle
) -> Iterator[Cluster]:
    """Two of each kind, so that somebody is left when one dies."""
    router = ROUTER.model_copy(update={"model": str(sensitive_model)})
    with cluster_of(tmp_path_factory.mktemp("vllm"), 0, 0, ENGINE, router, KV) as started:
        for index in range(2):
            started.add(f"prefill-{index}", Pool.PREFILL, model=str(sensitive_model), cpu_core=cores[0])
            started.add(f"decode-{index}", Pool.DECODE, model=str(sensitive_model), cpu_core=cores[1])
        for worker in started.workers.values():
            worker.ready()
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """Each test starts and ends with four workers at rest, all blocks free."""
    async with AsyncClient(cluster.address) as connected:
        yield connected
        for name, worker in list(cluster.workers.items()):
            if worker.exited:
                cluster.restart(name).ready()
        await settled(connected, len(cluster.workers))


def exact(oracle: Oracle, prompt: tuple[int, ...], answer: Answer) -> bool:
    """Token by token. Where the oracle's two best are EPSILON apart or closer, the other one passes too and ends the
    comparison: float32 sums depend on the size of a batch, and its chunks are not ours."""
    given, expected = list(answer.token_ids), oracle.continue_each([prompt], len(answer.token_ids))[0]
    differs = next((i for i, pair in enumerate(zip(given, expected, strict=True)) if pair[0] != pair[1]), None)
    if differs is None:
        return True
    (token, best), (other, second) = oracle.next_two([*prompt, *expected[:differs]])
    print(f"token {differs} of {len(given)} differs; the oracle's two best are {best - second:.6f} apart")
    return given[differs] in (token, other) and best - second <= EPSILON


async def test_requests_of_many_lengths_at_once_are_each_exact(client: AsyncClient, oracle: Oracle) -> None:
    prompts = [prompt_of(length) for length in (1, 15, 127, 128, 129, 600, 1000, LONG)]
    answers = await asyncio.gather(*(ask(client, prompt, greedy(24)) for prompt in prompts))
    assert [exact(oracle, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)] == [True] * 8
    assert all(answer.timings.prefill_worker for answer in answers[1:])
    assert all(answer.timings.kv_bytes > 0 for answer in answers[1:])


async def test_a_worker_listens_on_loopback_alone(cluster: Cluster, client: AsyncClient) -> None:
    """Also NIXL, which would take every interface of the machine."""
    for worker in cluster.workers.values():
        assert worker.listens_on == {"127.0.0.1"}, worker.name


async def test_kv_of_a_long_prompt_moves_while_it_is_read(client: AsyncClient) -> None:
    timings = (await ask(client, prompt_of(LONG, seed=1), greedy(4))).timings
    assert timings.kv_bytes_before_prefill_ended == timings.kv_bytes


async def test_stop_strings_end_the_text_before_them(client: AsyncClient) -> None:
    prompt = prompt_of(200, seed=2)
    whole = (await ask(client, prompt, greedy(48))).text
    stop = whole[len(whole) // 2 :][:3]
    answer = await ask(client, prompt, SamplingParams(max_tokens=48, temperature=0, ignore_eos=True, stop=(stop,)))
    assert answer.text == whole[: whole.index(stop)]


async def test_a_prefill_worker_killed_before_its_push_costs_time_but_no_token(
    client: AsyncClient, cluster: Cluster, oracle: Oracle
) -> None:
    """It is stopped when the request comes, so it can't have pushed anything."""
    prompt = prompt_of(LONG, seed=10)
    for index in range(2):
        cluster.workers[f"prefill-{index}"].signal(signal.SIGSTOP)
    asking = asyncio.create_task(ask(client, prompt, greedy(24)))
    victim = await _busy(client, Pool.PREFILL)
    cluster.kill(victim)
    cluster.workers[_other(victim)].signal(signal.SIGCONT)
    assert exact(oracle, prompt, await asking)


@pytest.mark.parametrize("delay_s", [0.1, 0.3, 0.5])
async def test_a_prefill_worker_killed_during_its_push_costs_time_but_no_token(
    client: AsyncClient, cluster: Cluster, oracle: Oracle, delay_s: float
) -> None:
    """Wherever in its push of about 0.7 s the signal finds it."""
    prompt = prompt_of(LONG, seed=11 + int(10 * delay_s))
    asking = asyncio.create_task(ask(client, prompt, greedy(24)))
    victim = await _busy(client, Pool.PREFILL)
    await asyncio.sleep(delay_s)
    cluster.kill(victim)
    assert exact(oracle, prompt, await asking)


async def test_a_prefill_worker_killed_after_its_push_costs_nothing(
    client: AsyncClient, cluster: Cluster, oracle: Oracle
) -> None:
    prompt, streaming = prompt_of(LONG, seed=12), asyncio.Event()
    asking = asyncio.create_task(ask(client, prompt, greedy(400), lambda tokens: streaming.set()))
    victim = await _busy(client, Pool.PREFILL)
    await asyncio.wait_for(streaming.wait(), 60)
    cluster.kill(victim)
    answer = await asking
    assert answer.timings.attempts == 1
    assert exact(oracle, prompt, answer)


async def test_a_decode_worker_killed_in_mid_stream_is_resumed_without_gap_or_duplicate(
    client: AsyncClient, cluster: Cluster, oracle: Oracle
) -> None:
    prompt, enough = prompt_of(700, seed=20), asyncio.Event()
    asking = asyncio.create_task(ask(client, prompt, greedy(300), lambda tokens: enough.set() if tokens > 5 else None))
    await asyncio.wait_for(enough.wait(), 60)
    cluster.kill(await _busy(client, Pool.DECODE))
    answer = await asking
    assert answer.timings.attempts == 2
    assert exact(oracle, prompt, answer)


@pytest.mark.parametrize("pool", list(Pool))
async def test_a_stopped_worker_delays_its_requests_and_leaks_nothing(
    client: AsyncClient, cluster: Cluster, oracle: Oracle, pool: Pool
) -> None:
    """SIGSTOP; its requests are served by others, and its blocks come back once it goes on or is replaced."""
    prompt = prompt_of(LONG, seed=30 + len(pool))
    asking = asyncio.create_task(ask(client, prompt, greedy(24)))
    victim = cluster.workers[await _busy(client, pool)]
    victim.signal(signal.SIGSTOP)
    try:
        assert exact(oracle, prompt, await asking)
    finally:
        victim.signal(signal.SIGCONT)


async def test_without_a_prefill_worker_the_decode_workers_read_prompts(
    client: AsyncClient, cluster: Cluster, oracle: Oracle
) -> None:
    for index in range(2):
        cluster.kill(f"prefill-{index}")
    prompts = [prompt_of(length, seed=40) for length in (5, 300, 900)]
    answers = await asyncio.gather(*(ask(client, prompt, greedy(24)) for prompt in prompts))
    assert all(exact(oracle, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
    assert {answer.timings.prefill_worker for answer in answers} == {""}


async def _busy(client: AsyncClient, pool: Pool) -> str:
    """The worker of a pool that holds the one request there is."""
    holder = ""

    async def found() -> bool:
        nonlocal holder
        workers = (await client.fleet()).workers
        holders = [status.worker.name for status in workers if status.pool is pool and status.prefills + status.decodes]
        holder = holders[0] if holders else ""
        return bool(holder)

    await eventually(found, f"a {pool} worker that holds the request")
    return holder


def _other(name: str) -> str:
    return {"prefill-0": "prefill-1", "prefill-1": "prefill-0"}[name]
