"""HTTPS: whom it lets in, and a certificate that is renewed."""

import ssl
from pathlib import Path

import aiohttp
import pytest

from splitserve.core.config import TlsSettings
from splitserve.core.errors import ConfigError
from splitserve.gateway.serve import HttpServer
from splitserve.gateway.tls import ssl_context
from tests.certificates import Authority
from tests.unit.gateway.serving import Told, says


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority.ca)


async def status(server: HttpServer, context: ssl.SSLContext) -> int:
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
        session.get(f"https://{server.address}/health") as answer,
    ):
        return answer.status


async def test_https_is_served_to_who_trusts_its_authority(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    async with HttpServer(Told(says("A")), "127.0.0.1:0", ssl_context(authority.server())) as server:
        assert await status(server, trusting(authority)) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await status(server, trusting(other))


async def test_mutual_tls_lets_in_only_those_with_a_certificate(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    known, own = trusting(authority), authority.client()
    assert own.certificate is not None
    known.load_cert_chain(own.certificate, own.key)
    async with HttpServer(Told(says("A")), "127.0.0.1:0", ssl_context(authority.server(mutual=True))) as server:
        assert await status(server, known) == 200
        with pytest.raises(aiohttp.ClientError):
            await status(server, trusting(authority))


async def test_a_renewed_certificate_needs_no_restart_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path / "other")
    tls = authority.server()
    async with HttpServer(Told(says("A")), "127.0.0.1:0", ssl_context(tls)) as server:
        assert await status(server, trusting(authority)) == 200
        _replaced(tls, *other.issue("server"))
        assert await status(server, trusting(other)) == 200
        _broken(tls)
        assert await status(server, trusting(other)) == 200


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        ssl_context(TlsSettings(certificate=str(tmp_path / "missing"), key=str(tmp_path / "missing")))


def _replaced(tls: TlsSettings, certificate: str, key: str) -> None:
    Path(certificate).replace(tls.certificate)
    Path(key).replace(tls.key)


def _broken(tls: TlsSettings) -> None:
    Path(tls.key).write_text("broken")
