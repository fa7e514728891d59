"""What users of other routers suffer from, and what a router of ours does instead: the rows of docs/pains.md that no
other test has."""

import asyncio
import re
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import RouterConfig, SimSettings
from splitserve.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    SplitserveError,
    Unavailable,
    UnknownWorker,
)
from splitserve.core.fleet import Health
from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.worker import Outcome, Pool
from splitserve.rpc import convert
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from tests.cluster.asking import WAIT_S, ask, eventually, greedy, prompt_of, settled
from tests.cluster.events import completion, events
from tests.cluster.processes import ROUTER, Cluster, cluster_of
from tests.unit.router.wired import WiredWorker

ENGINE = SimSettings(step_s=0.005, prefill_token_s=0.00005, decode_token_s=0.00001)
PROMPT = prompt_of(100)
ONCE = Retries(most=0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("pains"), 1, 1, ENGINE) as started:
        yield started


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, ONCE) as connected:
        yield connected
        await settled(connected, 2)


async def sample(cluster: Cluster, name: str) -> float:
    """The sum over a router's metric's labels."""

    def read() -> str:
        with urllib.request.urlopen(f"http://{cluster.router.facts['metrics']}/metrics", timeout=10) as response:
            return str(response.read().decode())

    page = await asyncio.to_thread(read)
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{\S*)? (\S+)$", page, re.MULTILINE))


# A worker that is gone ------------------------------------------------------------------------------------------------
async def test_who_names_a_gone_worker_hears_so_in_one_round_trip(cluster: Cluster, client: AsyncClient) -> None:
    """The name lives on in a new process; the identity does not."""
    gone = cluster.workers["prefill-0"].facts["uuid"]
    cluster.kill("prefill-0")
    await asyncio.to_thread(cluster.restart("prefill-0").ready)
    await settled(client, 2)
    async with aclosing(client.generate(PROMPT, greedy(400), request_id="moves")) as chunks:
        await anext(chunks)
        for question in (client.migrate("moves", gone), client.drain(gone), client.set_pool(gone, Pool.DECODE)):
            with pytest.raises(UnknownWorker, match="no live worker"):
                await question


async def test_a_prefill_worker_that_came_back_is_the_new_one_for_every_request(
    cluster: Cluster, client: AsyncClient
) -> None:
    failed = await sample(cluster, "splitserve_failed_attempts_total")
    cluster.kill("prefill-0")
    await asyncio.to_thread(cluster.restart("prefill-0").ready)
    await settled(client, 2)
    answers = await asyncio.gather(*(ask(client, prompt_of(100, seed), greedy(4)) for seed in range(20)))
    assert {answer.timings.prefill_worker for answer in answers} == {"prefill-0"}
    assert await sample(cluster, "splitserve_failed_attempts_total") == failed


# Only a worker's own faults -------------------------------------------------------------------------------------------
async def test_requests_that_are_wrong_count_against_no_worker(cluster: Cluster, client: AsyncClient) -> None:
    """Nor do requests that run out of time."""
    failed = await sample(cluster, "splitserve_failed_attempts_total")
    probed = await sample(cluster, "splitserve_worker_probes_total")
    for _ in range(10):
        with pytest.raises(InvalidRequest):
            await ask(client, PROMPT, SamplingParams(max_tokens=10**6))
        with pytest.raises(InvalidRequest):
            await ask(client, (2**31,))
        with pytest.raises(ModelNotFound):
            await ask(client, PROMPT, model="nobody")
        with pytest.raises(InvalidRequest):
            await ask(client, PROMPT, replace(greedy(4), temperature=-1.0))
        with pytest.raises(DeadlineExceeded):
            await ask(client, PROMPT, greedy(4000), deadline_s=0.05)
    fleet = await client.fleet()
    assert {status.health for status in fleet.workers} == {Health.READY}
    assert await client.can_serve()
    assert await sample(cluster, "splitserve_failed_attempts_total") == failed
    assert await sample(cluster, "splitserve_worker_probes_total") == probed


# A worker that is there and serves nobody -----------------------------------------------------------------------------
class Zombie:
    """It attaches and reports its load like any worker, and answers no job until it is told to."""

    def __init__(self, worker: WiredWorker) -> None:
        self.worker = worker
        self.answers = False
        self._answered = 0

    async def live(self) -> None:
        while True:
            if self.answers:
                for job in self.worker.jobs[self._answered :]:
                    self.worker.say(job, 300, outcome=Outcome(FinishReason.LENGTH))
                self._answered = len(self.worker.jobs)
            self.worker.report()
            await asyncio.sleep(0.05)


@asynccontextmanager
async def zombie_of(cluster: Cluster) -> AsyncIterator[Zombie]:
    async with WiredWorker(cluster.address, "d0", Pool.DECODE, model="demo") as worker:
        zombie = Zombie(worker)
        life = asyncio.create_task(zombie.live())
        try:
            yield zombie
        finally:
            life.cancel()
            await asyncio.wait({life})


async def test_a_worker_that_hangs_while_its_heartbeats_come_is_found_and_taken_back(tmp_path: Path) -> None:
    probing = ROUTER.model_copy(update={"probe_after_s": 1.0, "probe_timeout_s": 0.5})
    with cluster_of(tmp_path, 0, 0, router=probing) as cluster:
        async with (
            AsyncClient(cluster.address, ONCE) as client,
            grpc.aio.insecure_channel(cluster.address) as channel,
            zombie_of(cluster) as zombie,
        ):

            async def health() -> set[int]:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                services = ("", "splitserve.v1.Inference", "decode")
                checks = [stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in services]
                return {(await check).status for check in checks}

            async def serves() -> bool:
                return await health() == {health_pb2.HealthCheckResponse.SERVING}

            async def does_not() -> bool:
                return await health() == {health_pb2.HealthCheckResponse.NOT_SERVING}

            await eventually(serves, "a worker that seems well")
            await eventually(does_not, "a hung worker that is found")
            (status,) = (await client.fleet()).workers
            assert status.health is Health.FAILING
            with pytest.raises(Unavailable, match="d0"):
                await ask(client, PROMPT, deadline_s=WAIT_S)
            zombie.answers = True
            await eventually(serves, "a worker that makes tokens again")
            assert (await ask(client, PROMPT, greedy(1))).token_ids == (300,)


@pytest.mark.parametrize("field", ["deadline_s", "inter_token_deadline_s", "heartbeat_timeout_s", "probe_after_s"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), None])
def test_no_deadline_can_be_turned_off(field: str, value: float | None) -> None:
    assert getattr(RouterConfig(), field) < 3600
    with pytest.raises(ValidationError):
        RouterConfig.model_validate({field: value})


# Permits --------------------------------------------------------------------------------------------------------------
KEYS: dict[str, dict[str, Any]] = {
    "one": {"concurrent_requests": 1},
    "ops": {"scopes": ["admin"]},
    "fleet": {"scopes": ["worker"]},
}


def key_of(tenant: str) -> str:
    return f"key-of-{tenant}-0123456789"


@dataclass(frozen=True, slots=True)
class Keyed:
    """A cluster where one tenant may have one request at a time."""

    cluster: Cluster

    def client(self, tenant: str = "one") -> AsyncClient:
        return AsyncClient(self.cluster.address, ONCE, api_key=key_of(tenant))

    async def is_taken(self) -> None:
        async with self.client() as client:
            with pytest.raises(Overloaded, match="run already"):
                await ask(client, PROMPT, greedy(1))

    async def is_given_back(self) -> None:
        async def admitted() -> bool:
            async with self.client() as client:
                try:
                    await ask(client, PROMPT, greedy(1))
                except Overloaded:
                    return False
            return True

        await eventually(admitted, "the permit given back")
        async with self.client("ops") as operator:
            await settled(operator, 2)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    directory = tmp_path_factory.mktemp("keyed")
    entries = [{"name": name, "key": key_of(name), **said} for name, said in KEYS.items()]
    (directory / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    (directory / "worker.key").write_text(key_of("fleet"))
    config = ROUTER.model_copy(update={"api_keys": str(directory / "keys.yaml"), "http": "127.0.0.1:0"})
    with cluster_of(directory, 0, 0, ENGINE, config) as cluster:
        for pool in Pool:
            cluster.add(f"{pool}-0", pool, api_key_file=str(directory / "worker.key")).ready()
        yield Keyed(cluster)


async def _hangs_up_on_the_shared_call(keyed: Keyed) -> None:
    async with keyed.client() as client, aclosing(client.generate(PROMPT, greedy(4000))) as chunks:
        await anext(chunks)
        await keyed.is_taken()


async def _closes_its_channel(keyed: Keyed) -> None:
    async with grpc.aio.insecure_channel(keyed.cluster.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        ids, sampling = inference_pb2.TokenIds(ids=PROMPT), convert.sampling_to_proto(greedy(4000))
        request = inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling)
        await stub.Generate(request, metadata=(("authorization", f"Bearer {key_of('one')}"),)).read()
        await keyed.is_taken()


async def _closes_its_connection(keyed: Keyed) -> None:
    url, headers = (
        f"http://{keyed.cluster.router.facts['http']}/v1/completions",
        {"Authorization": f"Bearer {key_of('one')}"},
    )
    async with (
        aiohttp.ClientSession(headers=headers, raise_for_status=True) as session,
        session.post(url, json=completion(PROMPT, 4000)) as answer,
        aclosing(events(answer.content)) as stream,
    ):
        await anext(stream)
        await keyed.is_taken()


async def _asks_for_nonsense(keyed: Keyed) -> None:
    async with keyed.client() as client:
        with pytest.raises(InvalidRequest):
            await ask(client, PROMPT, SamplingParams(max_tokens=10**6))


async def _runs_out_of_time(keyed: Keyed) -> None:
    async with keyed.client() as client:
        with pytest.raises(DeadlineExceeded):
            await ask(client, PROMPT, greedy(4000), deadline_s=0.3)


async def _loses_its_only_workers(keyed: Keyed) -> None:
    async with keyed.client() as client:
        asking = asyncio.create_task(ask(client, PROMPT, greedy(4000)))
        async with keyed.client("ops") as operator:

            async def runs() -> bool:
                return (await operator.fleet()).running_requests == 1

            await eventually(runs, "a request that runs")
        for name in keyed.cluster.workers:
            await asyncio.to_thread(keyed.cluster.kill, name)
        with pytest.raises(SplitserveError):
            await asking
        for name in tuple(keyed.cluster.workers):
            await asyncio.to_thread(keyed.cluster.restart(name).ready)


async def _gets_its_answer(keyed: Keyed) -> None:
    async with keyed.client() as client:
        await ask(client, PROMPT, greedy(4))


@pytest.mark.parametrize(
    "ending",
    [
        _hangs_up_on_the_shared_call,
        _closes_its_channel,
        _closes_its_connection,
        _asks_for_nonsense,
        _runs_out_of_time,
        _loses_its_only_workers,
        _gets_its_answer,
    ],
)
async def test_a_keys_permit_is_given_back_however_its_request_ends(
    keyed: Keyed, ending: Callable[[Keyed], Awaitable[None]]
) -> None:
    await ending(keyed)
    await keyed.is_given_back()


# Cancels --------------------------------------------------------------------------------------------------------------
async def test_a_cancel_does_not_queue_behind_a_burst_of_jobs(tmp_path: Path) -> None:
    """The worker takes nothing for a while, so that jobs wait to be written to it."""
    burst, plenty = 500, 1 << 20
    with cluster_of(tmp_path, 0, 0) as cluster:
        wired = WiredWorker(
            cluster.address,
            "d0",
            Pool.DECODE,
            model="demo",
            total_blocks=plenty,
            max_sequences=plenty,
            max_model_len=8192,
        )
        wired.grants = replace(wired.grants, prefill_token_limit=plenty * 100)
        # Else the window of HTTP/2 grows until the whole burst fits into it.
        wired._channel = grpc.aio.insecure_channel(cluster.address, [("grpc.http2.bdp_probe", 0)])
        async with AsyncClient(cluster.address, ONCE) as client, wired as worker:
            first = asyncio.create_task(ask(client, PROMPT))
            await worker.job()
            worker.reads.clear()
            rest = [asyncio.create_task(ask(client, prompt_of(4000, seed))) for seed in range(burst)]
            reporting = asyncio.create_task(_reports(worker))

            async def all_sent() -> bool:
                (status,) = (await client.fleet()).workers
                return status.decodes == burst + 1

            await eventually(all_sent, "jobs that wait to be written")
            first.cancel()

            async def given_up() -> bool:
                return (await client.fleet()).running_requests == burst

            await eventually(given_up, "the request that was cancelled")
            worker.reads.set()
            await worker.until(lambda: bool(worker.cancelled))
            before = len(worker.jobs)
            for task in (*rest, reporting):
                task.cancel()
            await asyncio.wait({first, *rest, reporting}, timeout=WAIT_S)
    assert before < burst / 2, f"the cancel came after {before} jobs"


async def _reports(worker: WiredWorker) -> None:
    """Heartbeats; they also say that the jobs so far leave room."""
    while True:
        worker.report()
        await asyncio.sleep(0.05)
