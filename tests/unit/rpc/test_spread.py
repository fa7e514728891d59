"""Calls to the routers behind one name, which come and go. Nobody sleeps: the clock and the resolver are the test's."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from splitserve.core.config import ClientTls
from splitserve.core.errors import Unavailable
from splitserve.rpc.channel import Access, open_channel
from splitserve.rpc.names import LOOK_AGAIN_S, LOOK_SOON_S, Names, Place
from splitserve.rpc.spread import AsyncSpread, SyncSpread
from tests.certificates import Authority
from tests.unit.rpc.counting import COUNTED, WITHIN_S, Counting, Started, once

HOST = "routers.test"


class Dns:
    """What one name stands for; None: no answer comes. `now` is the caller's clock."""

    def __init__(self, port: int) -> None:
        self.name = f"{HOST}:{port}"
        self.port = port
        self.hosts: Sequence[str] | None = ()
        self.asked = 0
        self.now = 0.0

    def answer(self, name: str) -> tuple[Place, ...]:
        assert name == self.name
        self.asked += 1
        if self.hosts is None:
            raise Unavailable("the resolver is away")
        return tuple(Place(name, f"{host}:{self.port}") for host in self.hosts)

    async def __call__(self, name: str) -> tuple[Place, ...]:
        return self.answer(name)

    def clock(self) -> float:
        return self.now


def plain(place: Place) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(place.address, [("grpc.max_reconnect_backoff_ms", 100)])


Fleet = Callable[[str], Awaitable[Counting]]


@pytest.fixture
async def dns(started: Started) -> Dns:
    """Its name has the first router's port, and no address yet."""
    first = await started()
    port = int(first.server.address.rpartition(":")[2])
    await first.server.stop(0)
    return Dns(port)


@pytest.fixture
def router_at(started: Started, dns: Dns) -> Fleet:
    return lambda host: started(f"{host}:{dns.port}")


@pytest.fixture
async def spread(dns: Dns) -> AsyncIterator[AsyncSpread]:
    async with AsyncSpread(Names([dns.name]), plain, dns, dns.clock) as spread:
        yield spread


async def called_until(spread: AsyncSpread, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():
            await once(spread)


async def test_calls_go_round_all_addresses_of_a_name(spread: AsyncSpread, dns: Dns, router_at: Fleet) -> None:
    routers = [await router_at("127.0.0.1"), await router_at("127.0.0.2")]
    dns.hosts = ("127.0.0.1", "127.0.0.2")
    await called_until(spread, lambda: min(router.calls for router in routers) >= 5)
    assert dns.asked == 1, "an answer is good for a while"
    assert [str(place) for place in spread.places()] == [f"{dns.name} (127.0.0.{at})" for at in (1, 2)]


async def test_a_router_that_is_added_is_called_when_names_are_looked_up_again(
    spread: AsyncSpread, dns: Dns, router_at: Fleet
) -> None:
    one, other = await router_at("127.0.0.1"), await router_at("127.0.0.2")
    dns.hosts = ("127.0.0.1",)
    await called_until(spread, lambda: one.calls >= 3)
    dns.hosts = ("127.0.0.1", "127.0.0.2")
    dns.now += LOOK_AGAIN_S
    await called_until(spread, lambda: other.calls >= 3)
    assert dns.asked == 2


async def test_a_router_that_died_is_left_out_and_forgotten_once_dns_has_dropped_it(
    spread: AsyncSpread, dns: Dns, router_at: Fleet
) -> None:
    stays, goes = await router_at("127.0.0.1"), await router_at("127.0.0.2")
    dns.hosts = ("127.0.0.1", "127.0.0.2")
    await called_until(spread, lambda: min(stays.calls, goes.calls) >= 2)
    await goes.server.stop(0)
    dns.hosts = ("127.0.0.1",)
    asked = dns.asked

    def left() -> bool:
        dns.now += LOOK_SOON_S  # a lost router is reason to ask soon
        return len(spread.places()) == 1

    async with asyncio.timeout(WITHIN_S):
        while not left():
            await asyncio.gather(once(spread), return_exceptions=True)
    assert dns.asked > asked
    assert await once(spread) == b"x"


@pytest.mark.parametrize("hosts", [None, ()])
async def test_a_resolver_that_fails_takes_no_router_away(
    spread: AsyncSpread, dns: Dns, router_at: Fleet, hosts: Sequence[str] | None
) -> None:
    router = await router_at("127.0.0.1")
    dns.hosts = ("127.0.0.1",)
    await called_until(spread, lambda: router.calls == 1)
    dns.hosts = hosts
    for _ in range(5):
        dns.now += LOOK_AGAIN_S
        await once(spread)
        await asyncio.sleep(0)
    assert dns.asked >= 5
    assert router.calls == 6


async def test_a_router_that_serves_keeps_its_calls_though_dns_has_dropped_it(
    spread: AsyncSpread, dns: Dns, router_at: Fleet
) -> None:
    old, new = await router_at("127.0.0.1"), await router_at("127.0.0.2")
    dns.hosts = ("127.0.0.1",)
    requests: asyncio.Queue[bytes] = asyncio.Queue()

    async def said() -> AsyncIterator[bytes]:
        while (request := await requests.get()) != b"":
            yield request

    answers = aiter(spread.stream_stream(f"/{COUNTED}/Echo")(said(), timeout=WITHIN_S))
    requests.put_nowait(b"before")
    assert await anext(answers) == b"before"
    dns.hosts = ("127.0.0.2",)
    dns.now += LOOK_AGAIN_S
    await called_until(spread, lambda: new.calls > 0)
    assert len(spread.places()) == 2
    requests.put_nowait(b"after")
    assert await anext(answers) == b"after"
    requests.put_nowait(b"")
    assert [answer async for answer in answers] == []
    assert old.calls > 0


async def test_calls_that_last_are_shared_with_a_router_that_is_added(
    spread: AsyncSpread, dns: Dns, router_at: Fleet
) -> None:
    """What a gateway has: few calls, each for ever."""
    one, other = await router_at("127.0.0.1"), await router_at("127.0.0.2")
    dns.hosts = ("127.0.0.1",)
    end = asyncio.Event()

    async def said() -> AsyncIterator[bytes]:
        yield b"x"
        await end.wait()

    async def lasting() -> asyncio.Task[None]:
        answers, begun = aiter(spread.stream_stream(f"/{COUNTED}/Echo")(said())), asyncio.Event()

        async def read() -> None:
            async for _ in answers:
                begun.set()

        task = asyncio.create_task(read())
        async with asyncio.timeout(WITHIN_S):
            await begun.wait()
        return task

    tasks = [await lasting(), await lasting()]
    dns.hosts = ("127.0.0.1", "127.0.0.2")
    dns.now += LOOK_AGAIN_S
    await called_until(spread, lambda: spread.connected() == 2)
    before = (one.calls, other.calls)
    tasks += [await lasting(), await lasting()]
    assert (one.calls, other.calls) == (before[0], before[1] + 2)
    end.set()
    await asyncio.gather(*tasks)


async def test_a_name_that_nobody_knows_fails_like_a_router_that_is_not_there(spread: AsyncSpread, dns: Dns) -> None:
    dns.hosts = None
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await once(spread)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert HOST in str(raised.value.details())


@contextmanager
def threads_spread(dns: Dns) -> Iterator[SyncSpread]:
    def opened(place: Place) -> grpc.Channel:
        return grpc.insecure_channel(place.address, [("grpc.max_reconnect_backoff_ms", 100)])

    spread = SyncSpread(Names([dns.name]), opened, dns.answer, dns.clock)
    try:
        yield spread
    finally:
        spread.close()


async def test_threads_find_routers_that_come_and_leave_those_that_go(dns: Dns, router_at: Fleet) -> None:
    goes, stays, comes = [await router_at(f"127.0.0.{at}") for at in (1, 2, 3)]
    dns.hosts = ("127.0.0.1", "127.0.0.2")
    over = threading.Event()

    def calls_until(spread: SyncSpread, condition: Callable[[], bool]) -> None:
        call = spread.unary_unary(f"/{COUNTED}/Once")
        stream = spread.unary_stream(f"/{COUNTED}/Twice")
        while not condition() and not over.is_set():
            try:
                assert call(b"x", timeout=WITHIN_S) == b"x"
                assert list(stream(b"x", timeout=WITHIN_S)) == [b"x", b"x"]
            except grpc.RpcError:
                assert goes.calls, "only calls to a router that goes may fail"

    with threads_spread(dns) as spread:

        async def until(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(WITHIN_S):
                await asyncio.to_thread(calls_until, spread, condition)

        try:
            await until(lambda: min(goes.calls, stays.calls) >= 3)
            dns.hosts = ("127.0.0.2", "127.0.0.3")
            dns.now += LOOK_AGAIN_S
            await until(lambda: comes.calls >= 3)
            await goes.server.stop(0)

            def left() -> bool:
                dns.now += LOOK_SOON_S
                return [place.address for place in spread.places()] == [f"127.0.0.{at}:{dns.port}" for at in (2, 3)]

            await until(left)
        finally:
            over.set()


# TLS ------------------------------------------------------------------------------------------------------------------
async def test_a_certificate_is_checked_against_the_name_and_not_the_address(started: Started, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    router = await started(tls=authority.server("routers", HOST))
    port = router.server.address.rpartition(":")[2]
    access = Access(ClientTls(ca=authority.ca))
    async with open_channel(Place(f"{HOST}:{port}", router.server.address), access=access) as channel:
        assert await once(channel) == b"x"
    for place in (Place(f"another.test:{port}", router.server.address), router.server.address):
        async with open_channel(place, access=access) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match=r"verif|Peer name"):
                await once(channel)
    said = Access(ClientTls(ca=authority.ca, server_name=HOST))
    async with open_channel(Place(f"another.test:{port}", router.server.address), access=said) as channel:
        assert await once(channel) == b"x"


async def test_a_name_of_this_machine_is_looked_up_by_its_own_resolver(started: Started, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    router = await started(tls=authority.server("here", "localhost"))
    port = router.server.address.rpartition(":")[2]
    async with open_channel(f"localhost:{port}", access=Access(ClientTls(ca=authority.ca))) as channel:
        for _ in range(3):
            assert await once(channel) == b"x"
