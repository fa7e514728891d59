"""Wiring: what is refused before anything big is made."""

import socket
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from splitserve.cli import build
from splitserve.core.config import SimSettings, WorkerConfig, parse
from splitserve.core.errors import ConfigError
from splitserve.core.worker import Pool
from splitserve.engine.sim import SimEngine


def test_demo_is_the_model_that_ships_with_splitserve() -> None:
    model = build.read_model("demo", "")
    assert (model.name, model.path) == ("demo", build.DEMO_MODEL)


def test_the_served_name_wins_over_the_directorys() -> None:
    assert build.read_model(str(build.DEMO_MODEL), "it").name == "it"
    assert build.read_model(str(build.DEMO_MODEL), "").name == "model"


def test_the_shipped_model_is_small() -> None:
    assert sum(file.stat().st_size for file in build.DEMO_MODEL.glob("*.safetensors")) <= 8 * 1024 * 1024


def test_the_simulated_engine_is_built_without_vllm() -> None:
    engine = build.build_engine(
        WorkerConfig(pool=Pool.DECODE, engine=SimSettings()), build.read_model("demo", ""), "uuid"
    )
    try:
        assert isinstance(engine, SimEngine)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("latency", "says"),
    [
        ({"model": "opt-13b", "gpu": "a100-80g", "tp": 3}, "TP 3 does not divide"),
        ({"model": "opt-13b", "gpu": "abacus"}, "abacus"),
        ({"profile": "nowhere.json"}, "can't be read"),
    ],
)
def test_a_simulated_engine_takes_only_times_that_are_known(latency: dict[str, object], says: str) -> None:
    known = {"model": "opt-13b", "gpu": "a100-80g", "tp": 2}
    for said in (latency, known):
        config = parse(WorkerConfig, {"pool": "decode", "engine": {"kind": "sim", "latency": said}}, "worker.yaml")
        if said is known:
            build.build_engine(config, build.read_model("demo", ""), "uuid").close()
            return
        with pytest.raises(ConfigError, match=says):
            build.build_engine(config, build.read_model("demo", ""), "uuid")


def test_without_vllm_installed_the_user_hears_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'splitserve\[vllm\]'"):
        build.build_engine(WorkerConfig(pool=Pool.DECODE), build.read_model("demo", ""), "uuid")


def test_metrics_are_served_where_they_say_and_not_afterwards() -> None:
    registry = CollectorRegistry()
    Counter("splitserve_something", "x", registry=registry).inc()
    with build.metrics_served("127.0.0.1:0", registry) as address:
        assert "splitserve_something_total 1.0" in _page(address)
    with pytest.raises(OSError, match="refused"):
        _page(address)


def _page(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
        return str(page.read().decode())


def test_no_address_means_no_metrics() -> None:
    with build.metrics_served(None, CollectorRegistry()) as address:
        assert address == ""


def test_a_taken_metrics_port_is_named_with_its_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=rf"--metrics.*{address}"),
            build.metrics_served(address, CollectorRegistry()),
        ):
            pass
