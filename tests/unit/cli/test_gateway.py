"""`splitserve gateway`: what its options become, and what it refuses to start with."""

import asyncio
import json
import os
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from splitserve.cli import gateway as command
from splitserve.cli.gateway import run_gateway
from splitserve.cli.main import app
from splitserve.core.errors import ConfigError
from splitserve.gateway.config import GatewayConfig

WAIT_S = 20.0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[GatewayConfig]:
    """What the command would run with."""
    configs: list[GatewayConfig] = []

    async def run(config: GatewayConfig, *_: Any) -> None:
        configs.append(config)

    monkeypatch.setattr(command, "run_gateway", run)
    return configs


def test_options_go_over_the_file(started: list[GatewayConfig], tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("router: a:1\nlisten: 127.0.0.1:81\ntls: {certificate: c, key: k}\n")
    options = ["--router", "b:2,c:3", "--tls-client-ca", "ca", "--drain-timeout", "5", "--ca", "x"]
    result = CliRunner().invoke(app, ["gateway", "--config", str(file), *options], catch_exceptions=False)
    assert result.exit_code == 0
    config = started[0]
    assert (config.router, config.listen, config.drain_timeout_s) == ("b:2,c:3", "127.0.0.1:81", 5.0)
    assert config.tls is not None
    assert (config.tls.certificate, config.tls.client_ca) == ("c", "ca")
    assert config.router_tls is not None
    assert config.router_tls.ca == "x"


def test_an_unknown_key_is_named(started: list[GatewayConfig], tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text("port: 80\n")
    with pytest.raises(ConfigError, match=r"gateway\.yaml: port"):
        CliRunner().invoke(app, ["gateway", "--config", str(file)], catch_exceptions=False)


async def test_plain_http_beyond_this_machine_is_refused_unless_it_is_said() -> None:
    with pytest.raises(ConfigError, match="listen"):
        await run_gateway(GatewayConfig(listen="0.0.0.0:0"), None, None)


async def test_metrics_beyond_this_machine_are_refused_unless_it_is_said() -> None:
    with pytest.raises(ConfigError, match="metrics"):
        await run_gateway(GatewayConfig(listen="127.0.0.1:0", metrics="0.0.0.0:0"), None, None)


async def test_a_gateway_has_metrics_and_probes_on_a_port_of_their_own() -> None:
    """Nobody has to let a scraper in where requests come in."""
    reader, writer = os.pipe()
    running = asyncio.create_task(run_gateway(GatewayConfig(listen="127.0.0.1:0", metrics="127.0.0.1:0"), writer, None))
    try:
        with os.fdopen(reader) as ready:
            facts = json.loads(await asyncio.to_thread(ready.readline))
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        pages = {
            path: await asyncio.to_thread(_body, direct, f"http://{facts['metrics']}/{path}")
            for path in ("livez", "readyz", "metrics")
        }
        assert (pages["livez"], pages["readyz"]) == ("ok\n", "ok\n")
        assert "splitserve_http_streams 0.0" in pages["metrics"]
        assert facts["address"] != facts["metrics"]
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            await running
    finally:
        running.cancel()


def _body(opener: urllib.request.OpenerDirector, url: str) -> str:
    with opener.open(url, timeout=WAIT_S) as page:
        return str(page.read().decode())


async def test_a_taken_port_names_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--listen"):
        await run_gateway(GatewayConfig(listen=f"127.0.0.1:{taken.getsockname()[1]}"), None, None)


async def test_a_missing_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        await run_gateway(GatewayConfig(listen="127.0.0.1:0", model=str(tmp_path)), None, None)
