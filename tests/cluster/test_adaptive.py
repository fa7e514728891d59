"""Routes by what is predicted of them against a request's SLO class, with real processes."""

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import Late, SimSettings, SloClass
from splitserve.core.errors import InvalidRequest, Overloaded
from splitserve.core.fleet import ClassStatus
from splitserve.core.worker import KvMode
from tests.cluster.asking import WAIT_S, Answer, ask, eventually, greedy, holds, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import KV, ROUTER, Cluster, cluster_of

# A prompt of 600 tokens takes 0.15 s and three steps, a token 5 ms.
ENGINE = SimSettings(step_s=0.005, prefill_token_s=0.00025, decode_token_s=0.00001, max_num_batched_tokens=256)
WORKERS = 4
CLASSES = {
    "soon": SloClass(ttft_s=1.0, tpot_s=1.0),
    "smooth": SloClass(ttft_s=30.0, tpot_s=0.02),
    "easy": SloClass(ttft_s=60.0, tpot_s=10.0, itl_p99_s=10.0),
    "hopeless": SloClass(ttft_s=0.000001),
}
ADAPTIVE = ROUTER.model_copy(update={"slo_classes": CLASSES})
SHORT, LONG = greedy(32), greedy(600)

# A prompt of 500 tokens takes 0.5 s, on one worker that reads one such prompt at a time.
SLOW_PREFILL = SimSettings(step_s=0.001, prefill_token_s=0.001, max_num_batched_tokens=64)
FIRM = SloClass(ttft_s=0.8, priority=1, late=Late.REFUSE)
PATIENT = SloClass(ttft_s=0.8, late=Late.QUEUE)
STRICT = ROUTER.model_copy(update={"slo_classes": {"firm": FIRM, "patient": PATIENT}})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("adaptive")
    with cluster_of(directory, prefill=2, decode=2, engine=ENGINE, router=ADAPTIVE) as started:
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
        await settled(connected, WORKERS)


class Streaming:
    """A long output under way, once `begun`."""

    def __init__(self, client: AsyncClient, prompt: tuple[int, ...], slo_class: str) -> None:
        self._begun = asyncio.Event()
        self.task = asyncio.create_task(ask(client, prompt, LONG, lambda _: self._begun.set(), slo_class=slo_class))

    async def begun(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self._begun.wait()


async def test_an_idle_fleet_computes_a_prompt_where_it_decodes(client: AsyncClient, expected: Expected) -> None:
    """Nobody is disturbed by that, and moving its KV would take longer."""
    prompt = prompt_of(600)
    answer = await ask(client, prompt, SHORT, slo_class="soon")
    assert answer.timings.prefill_worker == ""
    assert answer.same_as(await expected(prompt, SHORT))


async def test_a_class_without_objectives_goes_through_both_pools(client: AsyncClient, expected: Expected) -> None:
    prompt = prompt_of(600)
    answer = await ask(client, prompt, SHORT)
    assert answer.timings.prefill_worker.startswith("prefill")
    assert answer.timings.decode_worker.startswith("decode")
    assert answer.same_as(await expected(prompt, SHORT))


async def test_with_tight_gaps_decodes_gather_on_one_worker_and_others_read(
    client: AsyncClient, expected: Expected
) -> None:
    first = Streaming(client, prompt_of(600), "smooth")
    await first.begun()
    prompts = [prompt_of(600, seed=number) for number in range(1, 4)]
    answers = [await ask(client, prompt, SHORT, slo_class="smooth") for prompt in prompts]
    assert not first.task.done()
    whole = await first.task
    assert {answer.timings.decode_worker for answer in answers} == {whole.timings.decode_worker}
    readers = {answer.timings.prefill_worker for answer in answers}
    assert readers.isdisjoint({"", whole.timings.decode_worker})
    assert all([answer.same_as(await expected(prompt, SHORT)) for answer, prompt in zip(answers, prompts, strict=True)])


async def test_a_prompt_that_can_not_wait_is_read_by_a_decode_worker_while_the_other_pool_is_busy(
    tmp_path: Path, expected: Expected
) -> None:
    """The prefill worker would take another prompt, but reads for 3 s yet."""
    engine = SLOW_PREFILL.model_copy(update={"max_num_batched_tokens": 2048})
    with cluster_of(tmp_path, engine=engine, router=ADAPTIVE) as cluster:
        async with AsyncClient(cluster.address, Retries(most=0)) as client:
            long = asyncio.create_task(ask(client, prompt_of(3000), SHORT))
            await _reads(client, "prefill-0")
            answer = await ask(client, prompt_of(200), SHORT, slo_class="soon")
            assert not long.done()
            assert (answer.timings.prefill_worker, answer.timings.decode_worker) == ("", "decode-0")
            assert answer.same_as(await expected(prompt_of(200), SHORT))
            assert (await long).same_as(await expected(prompt_of(3000), SHORT))


async def test_answers_are_exact_whatever_the_class_and_the_route(client: AsyncClient, expected: Expected) -> None:
    names = [*CLASSES, "standard", "interactive", "batch"]
    prompts = [prompt_of(100 + 50 * number, seed=number) for number in range(3 * len(names))]
    asking = [ask(client, prompt, SHORT, slo_class=names[at % len(names)]) for at, prompt in enumerate(prompts)]
    answers = await asyncio.gather(*asking)
    oracle = await asyncio.gather(*(expected(prompt, SHORT) for prompt in prompts))
    assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
    assert "" in (readers := {answer.timings.prefill_worker for answer in answers})
    assert len(readers) > 1, "both kinds of routes were taken"


async def test_routes_are_as_adaptive_and_as_exact_where_kv_is_pulled(tmp_path: Path, expected: Expected) -> None:
    pull = KV.model_copy(update={"mode": KvMode.PULL})
    with cluster_of(tmp_path, engine=ENGINE, router=ADAPTIVE, kv=pull) as cluster:
        async with AsyncClient(cluster.address, Retries(most=0)) as client:
            first = Streaming(client, prompt_of(600), "smooth")
            await first.begun()
            prompts = [prompt_of(300 + 50 * number, seed=number) for number in range(6)]
            answers = await asyncio.gather(*(ask(client, prompt, SHORT, slo_class="smooth") for prompt in prompts))
            assert not first.task.done()
            assert any(answer.timings.prefill_worker for answer in answers)
            oracle = await asyncio.gather(*(expected(prompt, SHORT) for prompt in prompts))
            assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
            assert (await first.task).same_as(await expected(prompt_of(600), LONG))
            await settled(client, 2)


async def test_a_worker_that_is_killed_mid_stream_costs_no_token(
    cluster: Cluster, client: AsyncClient, expected: Expected
) -> None:
    prompts = [prompt_of(600, seed=number) for number in range(4)]
    streams = [Streaming(client, prompt, "smooth") for prompt in prompts]
    for stream in streams:
        await stream.begun()
    cluster.kill(killed := await _busiest(client))
    answers: list[Answer] = [await stream.task for stream in streams]
    assert any(answer.timings.attempts > 1 for answer in answers)
    assert killed not in {answer.timings.decode_worker for answer in answers}
    oracle = [await expected(prompt, LONG) for prompt in prompts]
    assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))


async def test_who_would_be_late_is_refused_or_waits_as_its_class_says(tmp_path: Path, expected: Expected) -> None:
    with cluster_of(tmp_path, prefill=0, decode=1, engine=SLOW_PREFILL, router=STRICT) as cluster:
        async with AsyncClient(cluster.address, Retries(most=0)) as client:
            served = await ask(client, prompt_of(300), SHORT, slo_class="firm")
            assert served.same_as(await expected(prompt_of(300), SHORT)), "an idle fleet has it in time"
            prompts = [prompt_of(500, seed=number) for number in range(5)]
            asking = [asyncio.create_task(ask(client, each, SHORT, slo_class="patient")) for each in prompts]
            await _waiting(client, 3)
            with pytest.raises(Overloaded, match="slo_class firm") as refused:
                await ask(client, prompt_of(300), SHORT, slo_class="firm")
            assert refused.value.retry_after_s > 0.0
            assert not all(task.done() for task in asking)
            oracle = [await expected(prompt, SHORT) for prompt in prompts]
            answers = await asyncio.gather(*asking)
            assert all(answer.same_as(whole) for answer, whole in zip(answers, oracle, strict=True))
            await settled(client, 1)


async def test_a_prompt_that_takes_longer_than_its_class_allows_is_refused_by_an_idle_fleet(tmp_path: Path) -> None:
    with cluster_of(tmp_path, prefill=0, decode=1, engine=SLOW_PREFILL, router=STRICT) as cluster:
        async with AsyncClient(cluster.address, Retries(most=0)) as client:
            with pytest.raises(Overloaded, match=r"later than the 0\.80 s"):
                await ask(client, prompt_of(1000), SHORT, slo_class="firm")
            await settled(client, 1)


async def test_outputs_are_counted_by_class_and_by_whether_they_met_it(cluster: Cluster, client: AsyncClient) -> None:
    easy, hopeless = await _counted(client, "easy"), await _counted(client, "hopeless")
    for slo_class, outputs in (("easy", 3), ("hopeless", 2)):
        await asyncio.gather(*(ask(client, prompt_of(50), SHORT, slo_class=slo_class) for _ in range(outputs)))
    easy_now, hopeless_now = await _counted(client, "easy"), await _counted(client, "hopeless")
    assert (easy_now.ended - easy.ended, easy_now.met - easy.met) == (3, 3)
    assert (hopeless_now.ended - hopeless.ended, hopeless_now.met - hopeless.met) == (2, 0)
    assert (easy_now.ttft_s, easy_now.tpot_s, easy_now.itl_p99_s) == (60.0, 10.0, 10.0)
    assert easy_now.goodput_rps > 0.0
    page = await asyncio.to_thread(_metrics, cluster)
    assert f'splitserve_slo_outputs_total{{met="yes",slo_class="easy"}} {easy_now.met:.1f}' in page
    assert f'splitserve_slo_outputs_total{{met="no",slo_class="hopeless"}} {hopeless_now.ended:.1f}' in page


async def test_a_class_that_the_router_lacks_is_refused_with_those_that_it_has(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match=r"slo_class.*hopeless"):
        await ask(client, prompt_of(20), SHORT, slo_class="unheard-of")


async def _reads(client: AsyncClient, name: str) -> None:
    """Waits until this worker reads a prompt."""
    await holds(client, name, lambda status: status.load.prefill_tokens > 0)


async def _busiest(client: AsyncClient) -> str:
    """The name of the worker that decodes most."""
    workers = (await client.fleet()).workers
    return max(workers, key=lambda status: status.decodes).worker.name


async def _waiting(client: AsyncClient, requests: int) -> None:
    async def check() -> bool:
        return (await client.fleet()).waiting_requests >= requests

    await eventually(check, f"{requests} requests that wait")


async def _counted(client: AsyncClient, slo_class: str) -> ClassStatus:
    (found,) = [status for status in (await client.fleet()).classes if status.name == slo_class]
    return found


def _metrics(cluster: Cluster) -> str:
    with urllib.request.urlopen(f"http://{cluster.router.facts['metrics']}/metrics", timeout=10) as response:
        return str(response.read(), "utf-8")
