"""Which way a simulated worker's KV goes."""

import pytest

from splitserve.core.config import SimSettings
from splitserve.core.errors import ConfigError
from splitserve.engine.sim.wire import SHM, TCP, kind_of


@pytest.mark.parametrize(
    ("transport", "host", "kind"),
    [
        ("auto", "127.0.0.1", SHM),
        ("auto", "::1", SHM),
        ("auto", "192.0.2.1", TCP),
        ("auto", "2001:db8::1", TCP),
        ("tcp", "127.0.0.1", TCP),
        ("shm", "192.0.2.1", SHM),
    ],
)
def test_memory_is_shared_within_a_machine_and_tcp_goes_between(transport: str, host: str, kind: str) -> None:
    assert kind_of(SimSettings.model_validate({"transport": transport}), host) == kind


def test_a_host_that_nobody_could_reach_is_named() -> None:
    with pytest.raises(ConfigError, match=r"kv_transfer\.host: '0\.0\.0\.0' is no address that peers can reach"):
        kind_of(SimSettings(), "0.0.0.0")
