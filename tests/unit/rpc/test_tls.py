"""TLS on real sockets: who trusts whom, and what a renewed certificate needs."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.core.config import ClientTls, TlsSettings, parse
from splitserve.core.errors import ConfigError
from splitserve.rpc.channel import Access, check_access, open_channel, open_sync_channel
from splitserve.rpc.server import Server
from tests.certificates import Authority

WITHIN_S = 10.0

Started = Callable[[TlsSettings], Awaitable[str]]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
async def started() -> AsyncIterator[Started]:
    servers: list[Server] = []

    async def start(tls: TlsSettings) -> str:
        servers.append(Server("127.0.0.1:0", 1, ["splitserve.v1.Inference"], tls))
        await servers[-1].start()
        return servers[-1].address

    yield start
    for server in servers:
        await server.stop(0)


async def call(address: str, tls: ClientTls | None) -> int:
    async with open_channel(address, access=Access(tls)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=WITHIN_S)
        return int(answer.status)


async def is_refused(address: str, tls: ClientTls | None) -> bool:
    """Raises what is neither an answer nor a connection that does not come about."""
    try:
        await call(address, tls)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return True
    return False


async def test_a_router_is_reached_by_whoever_trusts_its_ca(authority: Authority, started: Started) -> None:
    address = await started(authority.server())
    assert await call(address, ClientTls(ca=authority.ca)) == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_threads_reach_it_too(authority: Authority, started: Started) -> None:
    address = await started(authority.server(mutual=True))

    def check() -> int:
        with open_sync_channel(address, access=Access(authority.client())) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return int(stub.Check(health_pb2.HealthCheckRequest(), timeout=WITHIN_S).status)

    assert await asyncio.to_thread(check) == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_router_that_another_ca_vouches_for_is_not_believed(
    authority: Authority, started: Started, tmp_path: Path
) -> None:
    address = await started(authority.server())
    assert await is_refused(address, ClientTls(ca=Authority(tmp_path / "theirs").ca))


async def test_a_router_of_another_name_is_not_believed_unless_that_name_is_said(
    authority: Authority, started: Started
) -> None:
    address = await started(authority.server("router", "router.example"))
    assert await is_refused(address, ClientTls(ca=authority.ca))
    assert not await is_refused(address, ClientTls(ca=authority.ca, server_name="router.example"))


async def test_nothing_in_the_clear_is_answered(authority: Authority, started: Started) -> None:
    assert await is_refused(await started(authority.server()), None)


async def test_mutual_tls_lets_in_only_whom_its_ca_vouches_for(
    authority: Authority, started: Started, tmp_path: Path
) -> None:
    address = await started(authority.server(mutual=True))
    stranger = Authority(tmp_path / "theirs").client().model_copy(update={"ca": authority.ca})
    assert not await is_refused(address, authority.client())
    assert await is_refused(address, ClientTls(ca=authority.ca))
    assert await is_refused(address, stranger)


async def test_a_renewed_certificate_needs_no_restart(authority: Authority, started: Started) -> None:
    address = await started(authority.server("router", "old.example"))
    old, new = (ClientTls(ca=authority.ca, server_name=f"{name}.example") for name in ("old", "new"))
    assert not await is_refused(address, old)
    authority.issue("router", "new.example")
    assert not await is_refused(address, new)
    assert await is_refused(address, old)


def overwrite(file: str) -> None:
    Path(file).write_text("half a key")


async def test_a_broken_renewal_leaves_the_former_certificate(
    authority: Authority, started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    tls = authority.server("router", "old.example")
    address, client = await started(tls), ClientTls(ca=authority.ca, server_name="old.example")
    overwrite(tls.key)
    assert not await is_refused(address, client)
    assert "renewed certificate not usable" in caplog.text
    authority.issue("router", "new.example")
    assert not await is_refused(address, client.model_copy(update={"server_name": "new.example"}))


@pytest.mark.parametrize("name", ["certificate", "key", "client_ca"])
@pytest.mark.parametrize("text", [None, "no PEM"])
async def test_a_listeners_file_that_cannot_be_used_is_named(authority: Authority, name: str, text: str | None) -> None:
    tls = authority.server(mutual=True)
    file = authority.directory / "bad.pem"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)) as raised:
        Server("127.0.0.1:0", 1, [], tls.model_copy(update={name: str(file)}))
    assert raised.value.path in {f"tls.{name}", "tls.certificate"}


async def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    tls = authority.server().model_copy(update={"key": authority.issue("other")[1]})
    with pytest.raises(ConfigError, match="can't be used together"):
        Server("127.0.0.1:0", 1, [], tls)


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
async def test_a_callers_file_that_is_missing_is_named(authority: Authority, name: str) -> None:
    access = Access(authority.client().model_copy(update={name: "nowhere.pem"}))
    with pytest.raises(ConfigError, match=r"nowhere\.pem can't be read") as raised:
        check_access(access)
    assert raised.value.path == f"tls.{name}"
    with pytest.raises(ConfigError, match=r"nowhere\.pem"):
        open_channel("127.0.0.1:1", access=access)


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="say both certificate and key"):
        parse(ClientTls, {"certificate": "a.pem"}, "worker.yaml")
