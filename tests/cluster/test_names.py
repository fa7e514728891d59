"""Routers behind one name, as a headless Service gives it: real processes, and the resolver of the machine, which reads
a hosts file of the test's."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import ClientTls
from splitserve.core.errors import Unavailable
from splitserve.core.worker import Pool
from splitserve.gateway.config import GatewayConfig
from tests.certificates import Authority
from tests.cluster.asking import ask, eventually, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import FAST, KV, ROUTER, Cluster, Process

HOST = "routers.serving.svc"
PROMPT = prompt_of(100)
ONCE = Retries(most=0)


def why_not() -> str:
    """Why no process can have a hosts file of its own here; "" if it can."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "a hosts file of one's own needs root and unshare (util-linux)"
    if "multi on" not in Path("/etc/host.conf").read_text():
        return "a hosts file gives a name several addresses only where /etc/host.conf says `multi on`"
    probe = ["unshare", "--mount", "mount", "--bind", "/etc/hosts", "/etc/hosts"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


class Named:
    """Routers on 127.0.0.1, 127.0.0.2 ..., all on one port and all behind one name, and workers that know the name."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._hosts = directory / "hosts"
        self.authority = Authority(directory / "tls")
        self._tls = self.authority.server("router", HOST)  # for the name alone: no address is in it
        self.caller = ClientTls(ca=self.authority.ca)
        self.port = _free_port()
        self.name = f"{HOST}:{self.port}"
        self.directory = directory
        self.routers: dict[str, Process] = {}
        self.names()
        config = ROUTER.model_copy(update={"listen": f"127.0.0.1:{self.port}", "tls": self._tls})
        self.cluster = Cluster(directory, FAST, config, KV)
        stack.callback(self.cluster.close)
        self.routers["127.0.0.1"] = self.cluster.router

    @property
    def within(self) -> tuple[str, ...]:
        mount = f'mount --bind {self._hosts} /etc/hosts && exec "$@"'
        return ("unshare", "--mount", "sh", "-c", mount, "within")

    def names(self, *hosts: str) -> None:
        """What the name stands for from now on. Written in place: it is mounted."""
        lines = ["127.0.0.1 localhost", *(f"{host} {HOST}" for host in hosts)]
        self._hosts.write_text("\n".join(lines) + "\n")

    def add(self, host: str) -> Process:
        config = self.cluster.router.config.model_copy(update={"listen": f"{host}:{self.port}"})
        self.routers[host] = Process("router", config, self.directory, f"router-{host}")
        self._stack.callback(self.routers[host].close)
        return self.routers[host]

    def worker(self, name: str, pool: Pool) -> Process:
        return self.cluster.add_within(self.within, name, pool, routers=[self.name], router_tls=self.caller)

    def gateway(self) -> Process:
        config = GatewayConfig(router=self.name, router_tls=self.caller, listen="127.0.0.1:0")
        gateway = Process("gateway", config, self.directory, "gateway", self.within)
        self._stack.callback(gateway.close)
        return gateway

    def client(self, host: str) -> AsyncClient:
        """Of this router alone, at its address."""
        tls = self.caller.model_copy(update={"server_name": HOST})
        return AsyncClient(f"{host}:{self.port}", ONCE, tls=tls)


def _free_port() -> int:
    with socket.create_server(("0.0.0.0", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def named(tmp_path: Path) -> Iterator[Named]:
    with ExitStack() as stack:
        yield Named(tmp_path, stack)


async def joined(client: AsyncClient, workers: int) -> None:
    async def all_there() -> bool:
        try:
            return len((await client.fleet()).workers) == workers
        except Unavailable:
            return False

    await eventually(all_there, f"{workers} workers join")


async def test_workers_and_a_gateway_follow_a_name_whose_routers_come_and_go(named: Named, expected: Expected) -> None:
    named.add("127.0.0.2")
    named.names("127.0.0.1", "127.0.0.2")
    workers = [named.worker(f"{pool}-0", pool) for pool in Pool]
    gateway = named.gateway()
    for process in (*named.routers.values(), *workers, gateway):
        process.ready()
    async with named.client("127.0.0.1") as first, named.client("127.0.0.2") as second:
        for client in (first, second):
            await joined(client, 2)
        await settled(second, 2)
        oracle = await expected(PROMPT)
        assert (await ask(second, PROMPT)).same_as(oracle)
        await seen_by(gateway, named, "127.0.0.1", "127.0.0.2")

        named.add("127.0.0.3").ready()
        named.names("127.0.0.1", "127.0.0.2", "127.0.0.3")
        async with named.client("127.0.0.3") as third:
            await joined(third, 2)
            await settled(third, 2)
            assert (await ask(third, PROMPT)).same_as(oracle)
            await seen_by(gateway, named, "127.0.0.1", "127.0.0.2", "127.0.0.3")

            named.names("127.0.0.2", "127.0.0.3")  # the first still serves
            named.routers["127.0.0.1"].signal(signal.SIGKILL)
            await asyncio.to_thread(named.routers["127.0.0.1"].ended)
            await seen_by(gateway, named, "127.0.0.2", "127.0.0.3")
            for worker in workers:
                await left(worker, f"{named.name} (127.0.0.1)")
            assert (await ask(third, PROMPT)).same_as(oracle)
            await settled(third, 2)
            assert await completed(gateway)


async def seen_by(gateway: Process, named: Named, *hosts: str) -> None:
    """The gateway's console knows these routers, and asks each of them."""
    url = f"http://{gateway.ready()['address']}/console/api/state"
    names = [f"{named.name} ({host})" for host in hosts]
    async with aiohttp.ClientSession() as session:

        async def all_known() -> bool:
            async with session.get(url) as answer:
                return answer.status == 200 and sorted((await answer.json())["routers"]) == names

        await eventually(all_known, f"the gateway knows {', '.join(names)}")
        uuids = set()
        for name in names:
            async with session.get(url, params={"router": name}) as answer:
                told = await answer.json()
                assert (told["asked"], len(told["workers"])) == (name, 2)
                uuids.add(told["router"])
        assert len(uuids) == len(names)


async def left(worker: Process, router: str) -> None:
    async def said() -> bool:
        lines = worker.log.read_text().splitlines()
        return any("router left" in line and router in line for line in lines)

    await eventually(said, f"{worker.name} leaves {router}")


async def completed(gateway: Process) -> bool:
    url = f"http://{gateway.ready()['address']}/v1/completions"
    asked = {"model": "demo", "prompt": "It is", "max_tokens": 4}
    async with aiohttp.ClientSession() as session, session.post(url, json=asked) as answer:
        told = await answer.json()
        assert answer.status == 200, told
        return bool(told["usage"]["completion_tokens"] > 0)


async def test_a_router_with_another_names_certificate_is_not_joined(named: Named, tmp_path: Path) -> None:
    """The twin: an address in DNS does not make a router."""
    stranger = named.authority.server("stranger", "another.serving.svc", "127.0.0.2")
    config = ROUTER.model_copy(update={"listen": f"127.0.0.2:{named.port}", "tls": stranger})
    process = Process("router", config, tmp_path, "stranger")
    try:
        process.ready()
        named.names("127.0.0.2")
        worker = named.worker("decode-0", Pool.DECODE)

        async def complains() -> bool:
            lines = worker.log.read_text().splitlines()
            return any("router not attached" in line and f"{named.name} (127.0.0.2)" in line for line in lines)

        await eventually(complains, "the worker's complaint")
        assert not worker.facts
        named.names("127.0.0.1")
        await asyncio.to_thread(worker.ready)
    finally:
        process.close()
