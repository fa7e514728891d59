"""A worker's own end and a router's own end, of different releases, over a real port."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest

from splitserve.core.versions import Versions
from splitserve.core.worker import Job, KvPeer, Load, Pool, Ticket
from splitserve.router.attach import FleetService
from splitserve.router.membership import Membership
from splitserve.routing.fleet import Fleet
from splitserve.rpc.gen import worker_pb2_grpc
from splitserve.rpc.names import Place
from splitserve.rpc.protocol import SPOKEN
from splitserve.telemetry.logs import Logger
from splitserve.worker.link import RouterLink
from tests.unit.router.scripted import WITHIN_S, load_of, worker_info

INFO = worker_info("d0", Pool.DECODE)
BEFORE = Versions(SPOKEN.lowest - 1, SPOKEN.highest - 1)
AFTER = Versions(SPOKEN.highest, SPOKEN.highest + 1)


class Host:
    """A worker that does nothing."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[str] = asyncio.Queue()

    async def next_news(self) -> str:
        async with asyncio.timeout(WITHIN_S):
            return await self.news.get()

    def attached(self, router: str) -> None:
        self.news.put_nowait("attached")

    def lost(self, router: str) -> None: ...

    def refused(self, router: str) -> None:
        self.news.put_nowait("refused")

    def load(self, router: str) -> Load:
        return load_of(INFO)

    def job(self, router: str, number: int, job: Job) -> None: ...

    def bad_job(self, router: str, number: int) -> None: ...

    def cancel(self, router: str, job_id: str) -> None: ...

    def hand_over(self, router: str, job_id: str, ticket: Ticket, at_end: bool) -> None: ...

    def peers(self, peers: Sequence[KvPeer]) -> None: ...

    def set_pool(self, pool: Pool) -> None: ...

    def drain(self) -> None: ...


@asynccontextmanager
async def router_that_speaks(versions: Versions) -> AsyncIterator[tuple[str, Membership]]:
    membership = Membership("model", Fleet(silent_after_s=60.0), lambda: None)
    server = grpc.aio.server()
    service = FleetService(membership, "router", 0.05, Logger("router"), versions)
    worker_pb2_grpc.add_FleetServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", membership
    finally:
        await server.stop(None)


@asynccontextmanager
async def worker_that_speaks(versions: Versions, address: str) -> AsyncIterator[tuple[Host, RouterLink]]:
    host = Host()
    link = RouterLink(Place(address, address), INFO, host, spoken=versions)
    running = asyncio.create_task(link.run())
    try:
        yield host, link
    finally:
        link.leave()
        async with asyncio.timeout(WITHIN_S):
            await running


@pytest.mark.parametrize(
    ("worker", "router", "used"),
    [
        pytest.param(SPOKEN, AFTER, SPOKEN.highest, id="the router is upgraded first"),
        pytest.param(AFTER, SPOKEN, SPOKEN.highest, id="the worker is upgraded first"),
        pytest.param(AFTER, AFTER, AFTER.highest, id="both are upgraded"),
        pytest.param(Versions(1, SPOKEN.highest), AFTER, SPOKEN.highest, id="a worker that speaks older ones too"),
    ],
)
async def test_neighbouring_releases_serve_together(worker: Versions, router: Versions, used: int) -> None:
    async with router_that_speaks(router) as (address, membership):
        async with worker_that_speaks(worker, address) as (host, link):
            assert await host.next_news() == "attached"
            assert link.protocol_version == used
            assert membership.worker(INFO.uuid) == INFO
        assert host.news.empty()


@pytest.mark.parametrize(
    ("worker", "router", "older"),
    [(BEFORE, SPOKEN, "worker"), (AFTER, BEFORE, "router"), (BEFORE, AFTER, "worker")],
)
async def test_releases_too_far_apart_are_told_which_to_upgrade(worker: Versions, router: Versions, older: str) -> None:
    async with (
        router_that_speaks(router) as (address, membership),
        worker_that_speaks(worker, address) as (host, link),
    ):
        assert await host.next_news() == "refused"
        assert link.refusal == (
            f"protocol_version: the worker speaks {worker} and this router {router}; upgrade the {older} to a release "
            "that speaks both"
        )
        assert membership.worker(INFO.uuid) is None
