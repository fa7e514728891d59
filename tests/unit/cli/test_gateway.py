"""`splitserve gateway`: what its options become, and what it refuses to start with."""

import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from splitserve.cli import gateway as command
from splitserve.cli.gateway import run_gateway
from splitserve.cli.main import app
from splitserve.core.errors import ConfigError
from splitserve.gateway.config import GatewayConfig


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


async def test_a_taken_port_names_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--listen"):
        await run_gateway(GatewayConfig(listen=f"127.0.0.1:{taken.getsockname()[1]}"), None, None)


async def test_a_missing_model_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        await run_gateway(GatewayConfig(listen="127.0.0.1:0", model=str(tmp_path)), None, None)
