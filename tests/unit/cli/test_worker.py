"""`splitserve worker`: what its options and environment become."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitserve.cli import build
from splitserve.cli.main import app
from splitserve.core.config import WorkerConfig
from splitserve.core.errors import ConfigError

WORKER = ["worker", "--pool", "decode", "--engine", "sim"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[WorkerConfig]:
    """What the command would run with."""
    configs: list[WorkerConfig] = []

    async def run(config: WorkerConfig, *_: object) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(build, "run_worker", run)
    monkeypatch.delenv("SPLITSERVE_KV_HOST", raising=False)
    return configs


def run(*options: str, **environment: str) -> None:
    result = CliRunner(env=environment).invoke(app, [*WORKER, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_kv_stays_on_this_machine_unless_it_is_said(started: list[WorkerConfig]) -> None:
    run()
    assert started[0].kv_transfer.host == "127.0.0.1"
    assert started[0].metrics is None


def test_the_address_for_kv_is_an_option_or_the_pods_environment(started: list[WorkerConfig]) -> None:
    run("--kv-host", "10.1.2.3")
    run(SPLITSERVE_KV_HOST="10.1.2.4")
    run("--kv-host", "10.1.2.3", SPLITSERVE_KV_HOST="10.1.2.4")
    assert [config.kv_transfer.host for config in started] == ["10.1.2.3", "10.1.2.4", "10.1.2.3"]


def test_it_goes_over_the_files_and_leaves_the_rest_of_it(started: list[WorkerConfig], tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("pool: decode\nkv_transfer: {host: 192.0.2.1, lease_s: 7}\nmetrics: 127.0.0.1:9401\n")
    run("--config", str(file), "--kv-host", "10.1.2.3", "--metrics", "127.0.0.1:9500")
    assert (started[0].kv_transfer.host, started[0].kv_transfer.lease_s) == ("10.1.2.3", 7.0)
    assert started[0].metrics == "127.0.0.1:9500"


def test_a_metrics_address_that_is_none_is_named(started: list[WorkerConfig]) -> None:
    with pytest.raises(ConfigError, match=r"options: metrics: must be host:port"):
        run("--metrics", "9401")
