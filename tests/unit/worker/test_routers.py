"""Which routers a worker belongs to, as what their names stand for changes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.core.errors import Unavailable
from splitserve.core.model import ModelInfo
from splitserve.rpc.names import Place
from splitserve.worker import routers as module
from splitserve.worker.link import RouterLink
from splitserve.worker.routers import Routers
from tests.unit.worker.fakes import TIMEOUT_S, ScriptedEngine, router_at, running

NAME = "routers.serving.svc:50051"
STATIC = "10.9.9.9:50051"
NEVER_S = 3600.0


def place(host: str) -> Place:
    return Place(NAME, f"{host}:50051")


def routers_of(*hosts: str) -> set[str]:
    return {str(place(host)) for host in hosts}


class Dns:
    """What NAME stands for; None: no answer comes."""

    def __init__(self) -> None:
        self.places: Sequence[Place] | None = ()
        self.asked = 0

    def says(self, *hosts: str) -> None:
        self.places = [place(host) for host in hosts]

    async def __call__(self, name: str) -> Sequence[Place]:
        assert name == NAME, "an address needs no resolver"
        self.asked += 1
        if self.places is None:
            raise Unavailable(f"{name} has no address (the resolver is away)")
        return self.places


class Link(RouterLink):
    """A link whose stream the test holds in its hands."""

    def __init__(self, router: Place) -> None:
        self.router = router
        self.is_attached = False
        self.refusal = ""
        self.left = asyncio.Event()

    async def run(self) -> None:
        await self.left.wait()

    def leave(self) -> None:
        self.left.set()


class Joined:
    """Routers that look names up when the test says so, and once at the start."""

    def __init__(self, *names: str) -> None:
        self.dns = Dns()
        self.made: list[Link] = []
        self.routers = Routers(names, self._link, self.dns)

    def _link(self, router: Place) -> Link:
        self.made.append(Link(router))
        return self.made[-1]

    def link(self, host: str) -> Link:
        (link,) = [each for name, each in self.routers.links.items() if name == str(place(host))]
        assert isinstance(link, Link)
        return link

    def attached(self, *hosts: str) -> None:
        for host in hosts:
            self.link(host).is_attached = True

    async def look(self) -> set[str]:
        """Who there is after another look."""
        await self.routers.look(NAME)
        await turns()
        return set(self.routers.links)


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", NEVER_S)
    monkeypatch.setattr(module, "LOOK_SOON_S", 0.0)


@asynccontextmanager
async def joined(*names: str, at_first: Sequence[str] = ("10.0.0.1", "10.0.0.2")) -> AsyncIterator[Joined]:
    joined = Joined(*names)
    joined.dns.says(*at_first)
    running = asyncio.create_task(joined.routers.run())
    await turns()
    try:
        yield joined
    finally:
        joined.routers.leave()
        async with asyncio.timeout(TIMEOUT_S):
            await running
        assert not joined.routers.links


async def test_every_address_of_a_name_is_joined() -> None:
    async with joined(NAME, STATIC) as here:
        assert set(here.routers.links) == routers_of("10.0.0.1", "10.0.0.2") | {STATIC}


async def test_a_new_address_is_joined_and_the_others_are_left_alone() -> None:
    async with joined(NAME) as here:
        here.attached("10.0.0.1", "10.0.0.2")
        here.dns.says("10.0.0.1", "10.0.0.2", "10.0.0.3")
        assert await here.look() == routers_of("10.0.0.1", "10.0.0.2", "10.0.0.3")
        assert len(here.made) == 3


async def test_an_address_that_dns_has_dropped_stays_until_its_stream_ends() -> None:
    async with joined(NAME) as here:
        here.attached("10.0.0.1", "10.0.0.2")
        here.dns.says("10.0.0.2")
        assert await here.look() == routers_of("10.0.0.1", "10.0.0.2")
        here.link("10.0.0.1").is_attached = False
        assert await here.look() == routers_of("10.0.0.2")


async def test_a_lost_router_that_dns_still_names_is_tried_again() -> None:
    async with joined(NAME) as here:
        assert await here.look() == routers_of("10.0.0.1", "10.0.0.2")
        assert len(here.made) == 2


@pytest.mark.parametrize("answer", [None, ()])
async def test_a_resolver_that_fails_or_answers_nothing_drops_nobody(answer: Sequence[Place] | None) -> None:
    async with joined(NAME) as here:
        here.attached("10.0.0.1")  # and the other is about to come back
        here.dns.places = answer
        for _ in range(3):
            assert await here.look() == routers_of("10.0.0.1", "10.0.0.2")


async def test_names_are_looked_up_again_as_soon_as_a_router_is_lost() -> None:
    async with joined(NAME) as here:
        asked = here.dns.asked
        here.dns.says("10.0.0.2", "10.0.0.3")
        here.routers.look_again()
        async with asyncio.timeout(TIMEOUT_S):
            while here.dns.asked == asked:
                await turns()
        await turns()
        assert set(here.routers.links) == routers_of("10.0.0.2", "10.0.0.3")


async def test_a_name_without_an_address_is_asked_for_until_it_has_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "splitserve.worker")
    here = Joined(NAME)
    here.dns.places = None
    running = asyncio.create_task(here.routers.run())
    async with asyncio.timeout(TIMEOUT_S):
        while here.dns.asked < 3:
            await turns()
        assert not here.routers.links
        here.dns.says("10.0.0.1")
        while not here.routers.links:
            await turns()
        here.routers.leave()
        await running
    said = [record for record in caplog.records if record.message == "router not attached"]
    assert len(said) == 1, "a reason is told once"


async def test_not_all_refuse_while_a_name_may_yet_stand_for_somebody() -> None:
    async with joined(NAME, STATIC, at_first=()) as here:
        here.made[0].refusal = "another model's"
        assert not here.routers.all_refuse
        here.dns.says("10.0.0.1")
        await here.look()
        assert not here.routers.all_refuse
        here.link("10.0.0.1").refusal = "another model's"
        assert here.routers.all_refuse


# With streams ---------------------------------------------------------------------------------------------------------
class Fleet:
    """Routers behind one name, each at an address of its own and all on one port."""

    def __init__(self, port: int) -> None:
        self.dns = Dns()
        self.name = f"routers.test:{port}"
        self._port = port

    def says(self, *hosts: str) -> None:
        self.dns.places = [Place(self.name, f"{host}:{self._port}") for host in hosts]

    async def resolve(self, name: str) -> Sequence[Place]:
        assert name == self.name
        return await self.dns(NAME)

    def at(self, host: str) -> str:
        return f"{host}:{self._port}"


async def test_a_worker_follows_a_name_whose_routers_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.02)
    async with router_at() as first:
        fleet = Fleet(int(first.address.rpartition(":")[2]))
        fleet.says("127.0.0.1", "127.0.0.2")
        async with (
            router_at(fleet.at("127.0.0.2")) as second,
            running(ScriptedEngine(), [fleet.name], ModelInfo.read(DEMO_MODEL), fleet.resolve) as worker,
        ):
            here = [await router.next_stream() for router in (first, second)]
            assert {stream.info.uuid for stream in here} == {worker.worker.info.uuid}
            fleet.says("127.0.0.1", "127.0.0.2", "127.0.0.3")
            async with router_at(fleet.at("127.0.0.3")) as third:
                await third.next_stream()
                fleet.says("127.0.0.1", "127.0.0.3")  # the second serves on
                await here[0].next_load(lambda load: load.routers == 3)
                asked = fleet.dns.asked
                async with asyncio.timeout(TIMEOUT_S):
                    while fleet.dns.asked < asked + 3:
                        await turns()
                assert len(worker.worker._links) == 3
                here[1].break_off(Unavailable("the router goes"))
                async with asyncio.timeout(TIMEOUT_S):
                    while len(worker.worker._links) > 2:
                        await turns()
                assert set(worker.worker._links) == {f"{fleet.name} (127.0.0.{at})" for at in (1, 3)}
