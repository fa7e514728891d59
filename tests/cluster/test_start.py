"""Starting: what a process refuses, and what a router refuses of a worker that joins."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitserve.cli.build import DEMO_MODEL
from splitserve.client import AsyncClient
from splitserve.core.config import RouterConfig, SimSettings, WorkerConfig
from splitserve.core.worker import KvMode, Pool
from tests.cluster.asking import ask, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import FAST, KV, ROUTER, Cluster, Process, cluster_of

BAD_CONFIGURATION = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("start")) as started:
        yield started


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def refusal(process: Process) -> str:
    """The last line that a process wrote before it gave up."""
    try:
        assert process.ended() == BAD_CONFIGURATION, process.log.read_text()
        assert "Traceback" not in process.log.read_text()
        return process.log.read_text().splitlines()[-1]
    finally:
        process.close()


def refused_worker(cluster: Cluster, **changes: Any) -> str:
    process = cluster.add("odd", Pool.DECODE, **changes)
    del cluster.workers["odd"]
    return refusal(process)


def model_copy(directory: Path, **changes: object) -> Path:
    copy = directory / "demo"
    shutil.copytree(DEMO_MODEL, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


@pytest.mark.parametrize("option", ["listen", "http", "metrics"])
def test_a_router_on_a_taken_port_says_which_and_of_what(tmp_path: Path, taken: str, option: str) -> None:
    said = refusal(Process("router", ROUTER.model_copy(update={option: taken}), tmp_path, "router"))
    assert taken in said
    assert option in said


def test_a_worker_whose_metrics_port_is_taken_says_which(cluster: Cluster, taken: str) -> None:
    said = refused_worker(cluster, metrics=taken)
    assert taken in said
    assert "metrics" in said


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "it has no config.json"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": "{}"}, "not a decoder model's configuration"),
    ],
)
def test_a_directory_that_is_no_model_is_refused_by_router_and_worker(
    tmp_path: Path, files: dict[str, str], says: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    router = RouterConfig(listen="127.0.0.1:0", metrics=None, model=str(model))
    worker = WorkerConfig(pool=Pool.DECODE, model=str(model), engine=FAST)
    for role, config in (("router", router), ("worker", worker)):
        said = refusal(Process(role, config, tmp_path, role))
        assert str(model) in said
        assert says in said


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = model_copy(tmp_path)
    (model / "tokenizer.json").unlink()
    config = RouterConfig(listen="127.0.0.1:0", metrics=None, model=str(model))
    assert "tokenizer.json" in refusal(Process("router", config, tmp_path, "router"))


def test_a_worker_that_serves_another_name_is_refused(cluster: Cluster) -> None:
    assert "model: 'other'" in refused_worker(cluster, served_model_name="other")


def test_a_worker_of_another_model_with_the_same_name_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    model = model_copy(tmp_path, rope_theta=5)
    assert "kv.model_fingerprint" in refused_worker(cluster, model=str(model))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"engine": FAST.model_copy(update={"block_size": 32})}, "kv.block_size"),
        ({"kv_transfer": KV.model_copy(update={"mode": KvMode.PULL})}, "kv.mode"),
    ],
)
def test_a_worker_of_another_kv_layout_is_refused_with_the_field(
    cluster: Cluster, changes: dict[str, Any], field: str
) -> None:
    said = refused_worker(cluster, **changes)
    assert field in said
    assert "the fleet's is" in said


def test_every_process_listens_on_loopback_alone_unless_told_otherwise(cluster: Cluster) -> None:
    for process in (cluster.router, *cluster.workers.values()):
        assert process.listens_on == {"127.0.0.1"}, process.name


async def test_a_refused_worker_disturbs_nobody(cluster: Cluster, expected: Expected) -> None:
    refused_worker(cluster, served_model_name="other")
    async with AsyncClient(cluster.address) as client:
        assert (await ask(client, prompt_of(200))).same_as(await expected(prompt_of(200)))
        await settled(client, 2)


def test_a_model_whose_length_the_engine_cannot_hold_is_refused(cluster: Cluster) -> None:
    longer = SimSettings(max_model_len=1_000_000)
    assert "max_model_len" in refused_worker(cluster, engine=longer)
