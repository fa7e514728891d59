"""Workers on hosts of their own: each in a network namespace, so that KV can go nowhere but over the wire between."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from splitserve.client import AsyncClient
from splitserve.core.worker import Pool
from tests.cluster.asking import ask, eventually, greedy, holds, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import FAST, KV, ROUTER, Cluster

NET = f"198.18.{os.getpid() % 256}"  # for benchmarks of networks: nobody's


@dataclass(frozen=True)
class Host:
    """A namespace with a wire to this machine and one, `kv`, to the other host."""

    name: str
    seen_from_here: str
    here: str  # this machine, as it sees it
    kv: str

    @property
    def within(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both vanish with everything in them."""
    names = [f"splitserve-{os.getpid()}-{which}" for which in "ab"]
    hosts = [
        Host(name, f"{NET}.{4 * at + 2}", f"{NET}.{4 * at + 1}", f"{NET}.{101 + at}") for at, name in enumerate(names)
    ]
    try:
        for at, host in enumerate(hosts):
            ip("netns", "add", host.name)
            ip("link", "add", f"ss{os.getpid()}{at}", "type", "veth", "peer", "name", "here", "netns", host.name)
            ip("addr", "add", f"{host.here}/30", "dev", f"ss{os.getpid()}{at}")
            ip("link", "set", f"ss{os.getpid()}{at}", "up")
            ip("-n", host.name, "addr", "add", f"{host.seen_from_here}/30", "dev", "here")
            for device in ("here", "lo"):
                ip("-n", host.name, "link", "set", device, "up")
        a, b = hosts
        ip("-n", a.name, "link", "add", "kv", "type", "veth", "peer", "name", "kv", "netns", b.name)
        for host in hosts:
            ip("-n", host.name, "addr", "add", f"{host.kv}/29", "dev", "kv")
            ip("-n", host.name, "link", "set", "kv", "up")
        yield a, b
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    probe = f"splitserve-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    ip("netns", "del", probe)
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, hosts: tuple[Host, Host]) -> Iterator[Cluster]:
    """The router here, a prefill worker on one host, a decode worker on the other."""
    directory = tmp_path_factory.mktemp("hosts")
    listens = ROUTER.model_copy(update={"listen": "0.0.0.0:0", "insecure": True, "inter_token_deadline_s": 1.0})
    cluster = Cluster(directory, FAST, listens, KV)
    try:
        port = cluster.address.rpartition(":")[2]
        for name, pool, host in zip(("prefill-0", "decode-0"), (Pool.PREFILL, Pool.DECODE), hosts, strict=True):
            kv = {**KV.model_dump(), "host": host.kv}
            cluster.add_within(
                host.within, name, pool, routers=[f"{host.here}:{port}"], kv_transfer=kv, metrics="127.0.0.1:0"
            )
        for worker in cluster.workers.values():
            worker.ready()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """After each test all memory is free again on both workers."""
    async with AsyncClient(f"127.0.0.1:{cluster.address.rpartition(':')[2]}") as connected:
        yield connected
        await settled(connected, 2)


@pytest.mark.parametrize("tokens", [17, 1000, 4000])
async def test_kv_goes_from_host_to_host_and_tokens_are_those_of_one_colocated_worker(
    client: AsyncClient, expected: Expected, tokens: int
) -> None:
    answer = await ask(client, prompt_of(tokens))
    assert answer.same_as(await expected(prompt_of(tokens)))
    assert (answer.timings.prefill_worker, answer.timings.decode_worker) == ("prefill-0", "decode-0")
    assert answer.timings.kv_bytes > 0
    assert {status.worker.kv.transport for status in (await client.fleet()).workers} == {"tcp"}


async def test_many_transfers_go_at_once(client: AsyncClient, expected: Expected) -> None:
    prompts = [prompt_of(300 + number, number) for number in range(32)]
    answers = await asyncio.gather(*(ask(client, prompt, greedy(8)) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.same_as(await expected(prompt, greedy(8)))


async def test_requests_get_through_a_cut_between_the_hosts_and_no_memory_is_lost(
    client: AsyncClient, expected: Expected, hosts: tuple[Host, Host]
) -> None:
    """What is on its way when the wire goes is kept until the two know what became of it. Meanwhile decode workers read
    prompts themselves."""
    host, _ = hosts
    await ask(client, prompt_of(500))
    ip("-n", host.name, "link", "set", "kv", "down")
    try:
        answer = await ask(client, prompt_of(800), greedy(8))
        assert answer.same_as(await expected(prompt_of(800), greedy(8)))
        assert answer.timings.attempts > 1 or not answer.timings.prefill_worker, "nothing was cut"
    finally:
        ip("-n", host.name, "link", "set", "kv", "up")
    await settled(client, 2)

    async def moves_again() -> bool:
        answer = await ask(client, prompt_of(900), greedy(4))
        assert answer.same_as(await expected(prompt_of(900), greedy(4)))
        return answer.timings.attempts == 1 and answer.timings.kv_bytes > 0

    await eventually(moves_again, "KV going over the wire again")


async def test_a_worker_that_others_can_not_reach_is_refused_and_says_why(
    client: AsyncClient, cluster: Cluster
) -> None:
    lost = cluster.add("decode-9", Pool.DECODE, routers=[f"127.0.0.1:{cluster.address.rpartition(':')[2]}"])
    try:
        assert await asyncio.to_thread(lost.ended) == 2
        assert "kv.transport" in lost.log.read_text()
    finally:
        lost.close()
        del cluster.workers["decode-9"]
    await holds(client, "decode-0", lambda status: True)


def test_the_hosts_do_not_reach_each_other_but_by_the_wire(hosts: tuple[Host, Host]) -> None:
    """The twin: what is asserted above is not this machine's own loopback."""
    a, b = hosts
    for host, other in ((a, b), (b, a)):
        reached = subprocess.run(["ip", "-n", host.name, "route", "get", other.kv], capture_output=True, text=True)
        assert "dev kv" in reached.stdout
        unreached = subprocess.run(
            ["ip", "-n", host.name, "route", "get", other.seen_from_here], capture_output=True, text=True
        )
        assert unreached.returncode != 0
