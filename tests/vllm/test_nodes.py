"""A decode worker whose engine spans two machines: a network namespace each, vLLM's ranks and KV over the wire between.

`spanning` holds one rank of two on each machine. `alone` is a worker on one machine, of which a router of its own makes
the oracle: what one colocated engine writes. The prefill worker is beside the leader, on a machine with one rank.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from splitserve.client import AsyncClient
from splitserve.core.config import KvTransferSettings, RouterConfig, VllmSettings
from splitserve.core.worker import Pool
from tests.cluster.asking import Answer, ask, eventually, greedy, prompt_of, settled, worker_status
from tests.cluster.processes import Cluster, Process
from tests.cluster.test_hosts import Host, hosts

__all__ = ["hosts"]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ENGINE = VllmSettings(dtype="float32", max_model_len=2048, max_num_batched_tokens=256, kv_cache_gib=0.125)
ROUTER = RouterConfig(
    listen="0.0.0.0:0", metrics=None, insecure=True, heartbeat_interval_s=0.2, heartbeat_timeout_s=4.0, deadline_s=120.0
)
KV = KvTransferSettings(peer_silent_s=2.0, lease_s=10.0)
KEY = "a-key-of-this-fleets-workers"
WORKERS = ("prefill-0", "spanning", "alone")


@dataclass
class Machines:
    """`cluster` holds every process; `oracle` is the router that only `alone` has joined."""

    cluster: Cluster
    oracle: Process
    hosts: tuple[Host, Host]
    model: Path

    def start(self, name: str, pool: Pool, at: int, core: int, **changes: Any) -> Process:
        """On one of the machines, and one core; KV goes over the wire alone."""
        host = self.hosts[at]
        variables = ("UCX_NET_DEVICES=kv", "UCX_TLS=tcp,self", f"SPLITSERVE_API_KEY={KEY}")
        within = (*host.within, "taskset", "-c", str(core), "env", *variables)
        kv = {**self.cluster.kv.model_dump(), "host": host.kv}
        common = {"routers": [f"{host.here}:{_port(self.cluster.router)}"], "kv_transfer": kv, "cpu_core": core}
        return self.cluster.add_within(within, name, pool, **{**common, "model": str(self.model), **changes})

    def start_spanning(self, cores: tuple[int, int]) -> None:
        engine = ENGINE.model_copy(update={"tensor_parallel_size": 2})
        nodes = {"count": 2, "leader": self.hosts[0].kv, "silent_s": 5.0}
        for name, rank in (("spanning", 0), ("spanning-1", 1)):
            said = {"engine": engine, "nodes": {**nodes, "rank": rank}, "cpu_core": None}
            self.start(name, Pool.DECODE, rank, cores[rank], **said)

    def spanning_ended(self) -> tuple[int, int]:
        """Waits for the end of both of its nodes; their exit codes."""
        return self.cluster.workers["spanning"].ended(), self.cluster.workers["spanning-1"].ended()

    def log(self, name: str) -> str:
        return self.cluster.workers[name].log.read_text()


@pytest.fixture(scope="module")
def machines(
    tmp_path_factory: pytest.TempPathFactory, sensitive_model: Path, hosts: tuple[Host, Host], cores: tuple[int, int]
) -> Iterator[Machines]:
    directory = tmp_path_factory.mktemp("nodes")
    router = ROUTER.model_copy(update={"model": str(sensitive_model)})
    with ExitStack() as stack:
        cluster = Cluster(directory, ENGINE, router, KV)
        stack.callback(cluster.close)
        oracle = Process("router", router, directory, "oracle")
        stack.callback(oracle.close)
        made = Machines(cluster, oracle, hosts, sensitive_model)
        made.start_spanning(cores)
        made.start("prefill-0", Pool.PREFILL, 0, cores[0])
        both = [f"{hosts[1].here}:{_port(each)}" for each in (cluster.router, oracle)]
        made.start("alone", Pool.DECODE, 1, cores[1], routers=both)
        for worker in cluster.workers.values():
            worker.ready()
        yield made


@pytest.fixture
async def client(machines: Machines) -> AsyncIterator[AsyncClient]:
    """After each test every worker that is left has all its memory free."""
    async with AsyncClient(f"127.0.0.1:{_port(machines.cluster.router)}") as connected:
        yield connected
        left = [name for name in WORKERS if not machines.cluster.workers[name].exited]
        await settled(connected, len(left))


async def expected(machines: Machines, prompt: tuple[int, ...], tokens: int) -> Answer:
    async with AsyncClient(f"127.0.0.1:{_port(machines.oracle)}") as client:
        answer = await ask(client, prompt, greedy(tokens))
        assert not answer.timings.prefill_worker
        return answer


async def test_each_rank_says_the_address_of_its_own_machine(client: AsyncClient, machines: Machines) -> None:
    spanning = await worker_status(client, "spanning")
    assert spanning is not None
    found = [peer.endpoint.removeprefix("tcp://").rpartition(":")[0] for peer in spanning.worker.kv_peers]
    assert found == [host.kv for host in machines.hosts]
    assert machines.cluster.workers["spanning-1"].facts["node"] == 1


async def test_kv_goes_to_both_machines_and_tokens_are_those_of_one_colocated_engine(
    client: AsyncClient, machines: Machines
) -> None:
    """Many at once, so that both decode workers have some."""
    prompts = [prompt_of(length, seed=1) for length in (1, 15, 128, 129, 300, 600, 700, 1000)]
    answers = await asyncio.gather(*(ask(client, prompt, greedy(24)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.same_as(await expected(machines, prompt, 24)), f"{len(prompt)} prompt tokens"
    moved = [answer for answer in answers if answer.timings.decode_worker == "spanning" and answer.timings.kv_bytes]
    assert moved, "none was handed over to the worker that spans machines"
    assert all(answer.timings.prefill_worker == "prefill-0" for answer in moved)


async def test_when_a_machine_is_lost_its_worker_ends_and_no_token_is_lost_or_doubled(
    client: AsyncClient, machines: Machines
) -> None:
    prompt = prompt_of(500, seed=2)
    asking = await _on_spanning(client, prompt)
    machines.cluster.workers["spanning-1"].signal(signal.SIGKILL)
    answers = await asking
    codes = await asyncio.to_thread(machines.spanning_ended)
    assert codes == (1, -signal.SIGKILL)
    assert f"node 1 ({machines.hosts[1].kv}) is gone: its connection ended" in machines.log("spanning")
    assert max(answer.timings.attempts for answer in answers) == 2
    assert {answer.timings.decode_worker for answer in answers} == {"alone"}
    right = await expected(machines, prompt, 400)
    assert all(answer.same_as(right) for answer in answers)


async def test_a_machine_that_is_to_end_drains_its_worker(
    client: AsyncClient, machines: Machines, cores: tuple[int, int]
) -> None:
    """The worker is started anew; its decodes move to another one."""
    await _restart(machines, cores)
    prompt = prompt_of(500, seed=3)
    asking = await _on_spanning(client, prompt)
    machines.cluster.workers["spanning-1"].signal(signal.SIGTERM)
    answers = await asking
    assert await asyncio.to_thread(machines.spanning_ended) == (0, 0)
    right = await expected(machines, prompt, 400)
    assert all(answer.same_as(right) for answer in answers)


async def test_a_lost_leader_ends_the_other_machines_ranks(
    client: AsyncClient, machines: Machines, cores: tuple[int, int]
) -> None:
    await _restart(machines, cores)
    ranks = _children(machines.cluster.workers["spanning-1"].pid)
    assert ranks
    machines.cluster.workers["spanning"].signal(signal.SIGKILL)
    codes = await asyncio.to_thread(machines.spanning_ended)
    assert codes == (-signal.SIGKILL, 1)
    assert f"the leader at {machines.hosts[0].kv}:29600 is gone" in machines.log("spanning-1")

    async def gone() -> bool:
        return not _alive(ranks)

    await eventually(gone, "the end of its ranks")


async def _restart(machines: Machines, cores: tuple[int, int]) -> None:
    for name in ("spanning", "spanning-1"):
        machines.cluster.workers.pop(name).close()
    machines.start_spanning(cores)
    for name in ("spanning", "spanning-1"):
        await asyncio.to_thread(machines.cluster.workers[name].ready)


async def _on_spanning(client: AsyncClient, prompt: tuple[int, ...]) -> "asyncio.Task[list[Answer]]":
    """The prompt is asked until the worker that spans machines decodes it; the answers of all who asked."""
    asked: list[asyncio.Task[Answer]] = []

    async def there() -> bool:
        streaming = asyncio.Event()
        asked.append(asyncio.create_task(ask(client, prompt, greedy(400), lambda tokens: streaming.set())))
        await streaming.wait()
        status = await worker_status(client, "spanning")
        return status is not None and status.decodes > 0

    await eventually(there, "a request that the spanning worker decodes")
    return asyncio.create_task(_all(asked))


async def _all(asked: list["asyncio.Task[Answer]"]) -> list[Answer]:
    return list(await asyncio.gather(*asked))


def _children(pid: int) -> list[str]:
    """Whichever of its threads started them."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [child for thread in threads for child in (thread / "children").read_text().split()]


def _alive(processes: list[str]) -> list[str]:
    return [each for each in processes if Path(f"/proc/{each}").exists()]


def _port(router: Process) -> str:
    return str(router.ready()["address"]).rpartition(":")[2]
