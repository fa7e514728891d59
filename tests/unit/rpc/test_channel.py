"""Calls to several routers, and the key that each call shows."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from grpc import ChannelConnectivity as State
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.core.config import ClientTls
from splitserve.core.errors import ConfigError, PermissionDenied, Unauthenticated
from splitserve.rpc.channel import Access, addresses, open_channel, open_sync_channel
from splitserve.rpc.guard import bearer
from splitserve.rpc.rota import next_of
from splitserve.rpc.status import from_rpc_error
from tests.certificates import Authority
from tests.unit.rpc.counting import COUNTED, WITHIN_S, Started, echoed, once, twice

DEAD = "127.0.0.1:1"
REQUEST = health_pb2.HealthCheckRequest()


# Several routers -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("states", "turn", "chosen"),
    [
        ([State.READY, State.READY], 1, 1),
        ([State.READY, State.TRANSIENT_FAILURE], 1, 0),
        ([State.CONNECTING, State.READY], 0, 1),
        ([State.CONNECTING, State.TRANSIENT_FAILURE], 1, None),
        ([State.IDLE], 0, None),
        ([State.TRANSIENT_FAILURE, State.SHUTDOWN], 1, 1),
    ],
)
def test_a_call_takes_the_next_connected_router_and_waits_while_one_may_still_be(
    states: list[State], turn: int, chosen: int | None
) -> None:
    assert next_of(states, turn) == chosen


async def test_calls_go_round_those_that_answer(started: Started) -> None:
    routers = [await started(), await started()]
    listed = ",".join([routers[0].server.address, DEAD, routers[1].server.address])
    async with open_channel(listed) as channel:
        assert await once(channel) == b"x"
        for _ in range(20):
            assert await twice(channel) == [b"x", b"x"]
    assert routers[0].calls + routers[1].calls == 21
    assert min(router.calls for router in routers) >= 8


async def test_a_stream_of_requests_goes_to_one_that_is_connected(started: Started) -> None:
    routers = [await started(), await started()]
    async with open_channel(",".join([DEAD, *(router.server.address for router in routers)])) as channel:
        for _ in range(10):
            assert await echoed(channel) == b"x"
    assert min(router.calls for router in routers) >= 2


async def test_a_router_that_dies_is_left_out_and_taken_in_again_when_it_is_back(started: Started) -> None:
    stays, goes = await started(), await started()
    address = goes.server.address
    async with open_channel(f"{stays.server.address},{address}") as channel:
        await asyncio.gather(*(once(channel) for _ in range(10)))
        await goes.server.stop(0)
        before = goes.calls
        async with asyncio.timeout(WITHIN_S):
            while not await all_answered(channel, 10):
                pass
        assert goes.calls == before
        back = await started(address)
        async with asyncio.timeout(WITHIN_S):
            while not back.calls:
                await once(channel)


async def all_answered(channel: grpc.aio.Channel, calls: int) -> bool:
    """Calls that were under way when a router went may fail; later ones don't."""
    answers = await asyncio.gather(*(once(channel) for _ in range(calls)), return_exceptions=True)
    return all(answer == b"x" for answer in answers)


async def test_each_router_is_checked_against_its_own_certificate(started: Started, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one = await started(tls=authority.server("one", "127.0.0.1"))
    other = await started("localhost:0", tls=authority.server("other", "localhost"))
    access = Access(ClientTls(ca=authority.ca))
    async with open_channel(f"{one.server.address},{other.server.address}", access=access) as channel:
        for _ in range(10):
            await once(channel)
    assert min(one.calls, other.calls) >= 2


async def test_without_any_router_a_call_fails_as_with_one(started: Started) -> None:
    async with open_channel(f"{DEAD},127.0.0.1:2") as channel:
        for call in (once, twice):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(channel)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_threads_go_round_too_and_leave_out_the_dead(started: Started) -> None:
    routers = [await started(), await started()]
    listed = ",".join([DEAD, routers[0].server.address, routers[1].server.address])

    def calls() -> None:
        channel = open_sync_channel(listed, access=Access(api_key="k" * 16))
        try:
            for _ in range(20):
                assert channel.unary_unary(f"/{COUNTED}/Once")(b"x", timeout=WITHIN_S) == b"x"
                assert list(channel.stream_stream(f"/{COUNTED}/Echo")(iter([b"x"]), timeout=WITHIN_S)) == [b"x"]
                assert list(channel.unary_stream(f"/{COUNTED}/Twice")(b"x", timeout=WITHIN_S)) == [b"x", b"x"]
        finally:
            channel.close()

    await asyncio.to_thread(calls)
    assert min(router.calls for router in routers) >= 8
    assert {key for router in routers for key in router.keys} == {"k" * 16}


def test_an_address_list_is_read_without_blanks_and_repetitions() -> None:
    assert addresses("a:1, b:2,,a:1") == ["a:1", "b:2"]
    with pytest.raises(ConfigError, match="no address"):
        addresses(" , ")


# Keys ----------------------------------------------------------------------------------------------------------------
def only(key: str) -> Callable[[str, str | None], None]:
    def check(service: str, shown: str | None) -> None:
        if service != COUNTED:
            raise PermissionDenied(f"not {service}")
        if shown != key:
            raise Unauthenticated("show the key")

    return check


@pytest.mark.parametrize("call", [once, twice])
async def test_every_call_shows_the_key(
    started: Started, call: Callable[[grpc.aio.Channel], Awaitable[object]]
) -> None:
    router = await started(check=only("the-key"))
    async with open_channel(router.server.address, access=Access(api_key="the-key")) as channel:
        await call(channel)
    for access in (Access(), Access(api_key="another")):
        async with open_channel(router.server.address, access=access) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(channel)
        assert isinstance(from_rpc_error(raised.value), Unauthenticated)
    assert router.calls == 1


async def test_health_and_reflection_need_no_key(started: Started) -> None:
    router = await started(check=only("the-key"))
    async with open_channel(router.server.address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(REQUEST, timeout=WITHIN_S)


async def test_a_stream_that_says_nothing_is_refused_at_once(started: Started) -> None:
    router = await started(check=only("the-key"))
    async with open_channel(router.server.address) as channel:
        call = channel.stream_stream(f"/{COUNTED}/Anything")()
        async with asyncio.timeout(WITHIN_S):
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("key", ["", "two words", "é" * 20, "line\n"])
async def test_what_is_no_key_is_refused_before_it_is_sent(key: str) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        open_channel(DEAD, access=Access(api_key=key))


def test_a_key_is_not_shown_where_its_holder_is() -> None:
    assert "secret" not in repr(Access(api_key="secret"))


@pytest.mark.parametrize(
    ("metadata", "key"),
    [
        ([("authorization", "Bearer abc")], "abc"),
        ([("x", "y"), ("authorization", "bearer abc")], "abc"),
        ([("authorization", "Basic abc")], None),
        ([], None),
        (None, None),
    ],
)
def test_a_key_is_shown_as_a_bearer_token(metadata: list[tuple[str, str]] | None, key: str | None) -> None:
    assert bearer(metadata) == key
