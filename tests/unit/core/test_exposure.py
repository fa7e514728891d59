"""Which addresses may be listened on without TLS and keys."""

import pytest

from splitserve.core.config import RouterConfig, TlsSettings, WorkerConfig
from splitserve.core.errors import ConfigError
from splitserve.core.exposure import check_leader, check_router, check_worker, is_loopback
from splitserve.core.worker import Pool

TLS = TlsSettings(certificate="a.pem", key="a.key")
OUTSIDE = ["0.0.0.0:1", "10.0.0.5:1", "[::]:1", "[fd00::1]:1", "router.example:1"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "localhost:1"])
def test_loopback_needs_nothing(address: str) -> None:
    assert is_loopback(address)
    check_router(RouterConfig(listen=address, metrics=address))
    check_worker(WorkerConfig(pool=Pool.DECODE, metrics=address))


@pytest.mark.parametrize("address", OUTSIDE)
@pytest.mark.parametrize(
    ("said", "missing"),
    [({}, "tls and api_keys are"), ({"tls": TLS}, "api_keys is"), ({"api_keys": "keys.yaml"}, "tls is")],
)
def test_a_router_that_others_can_reach_needs_tls_and_keys(address: str, said: dict[str, object], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing} not set.*--insecure") as raised:
        check_router(RouterConfig.model_validate({"listen": address, **said}))
    assert raised.value.path == "listen"
    check_router(RouterConfig(listen=address, tls=TLS, api_keys="keys.yaml"))
    check_router(RouterConfig(listen=address, insecure=True))


@pytest.mark.parametrize("address", OUTSIDE)
def test_metrics_that_others_can_reach_need_tls(address: str) -> None:
    with pytest.raises(ConfigError, match="tls is not set") as raised:
        check_router(RouterConfig(metrics=address))
    assert raised.value.path == "metrics"
    with pytest.raises(ConfigError, match="metrics_tls is not set"):
        check_worker(WorkerConfig(pool=Pool.DECODE, metrics=address))
    check_router(RouterConfig(metrics=address, tls=TLS))
    check_worker(WorkerConfig(pool=Pool.DECODE, metrics=address, metrics_tls=TLS))
    check_worker(WorkerConfig(pool=Pool.DECODE, metrics=address, insecure=True))


@pytest.mark.parametrize("leader", ["10.0.0.5", "fd00::1", "leader.example"])
def test_a_worker_that_spans_machines_needs_a_key_that_keeps_strangers_from_its_nodes(leader: str) -> None:
    nodes = {"count": 2, "leader": leader}
    config = WorkerConfig.model_validate({"pool": Pool.DECODE, "nodes": nodes})
    with pytest.raises(ConfigError, match="an API key is not set") as raised:
        check_leader(config, None)
    assert raised.value.path == "nodes.leader"
    check_leader(config, "a-key-of-this-fleets-workers")
    check_leader(config.model_copy(update={"insecure": True}), None)
    check_leader(WorkerConfig(pool=Pool.DECODE), None)
    check_leader(WorkerConfig.model_validate({"pool": Pool.DECODE, "nodes": {"count": 2, "leader": "127.0.0.1"}}), None)
