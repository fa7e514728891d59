"""`splitserve worker`: what its options and environment become."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from splitserve.cli import build
from splitserve.cli.main import app
from splitserve.core.config import NodesSettings, WorkerConfig
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


def test_the_nodes_of_a_worker_are_options_or_the_pods_environment(started: list[WorkerConfig], tmp_path: Path) -> None:
    run()
    run("--nodes", "2", "--node-rank", "1", "--leader", "10.1.2.3")
    run(SPLITSERVE_NODES="2", SPLITSERVE_NODE_RANK="1", SPLITSERVE_LEADER="10.1.2.3")
    file = tmp_path / "worker.yaml"
    file.write_text("pool: decode\nnodes: {count: 2, leader: 10.1.2.3, port: 29700}\n")
    run("--config", str(file), "--node-rank", "1")
    assert started[0].nodes == NodesSettings()
    assert started[1].nodes == started[2].nodes == NodesSettings(count=2, rank=1, leader="10.1.2.3")
    assert started[3].nodes == NodesSettings(count=2, rank=1, leader="10.1.2.3", port=29700)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nodes", "2", "--leader", "a", "--node-rank", "2"], "nodes: rank 2 is none of 2 nodes"),
        (["--node-rank", "1"], "nodes: rank 1 is none of 1 nodes"),
        (["--nodes", "2"], r"nodes: leader is not said.*--leader"),
    ],
)
def test_nodes_that_can_not_be_are_named(started: list[WorkerConfig], options: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(*options)


def test_a_metrics_address_that_is_none_is_named(started: list[WorkerConfig]) -> None:
    with pytest.raises(ConfigError, match=r"options: metrics: must be host:port"):
        run("--metrics", "9401")
