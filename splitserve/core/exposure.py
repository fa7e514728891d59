"""Which addresses a process may listen on: whatever others than this machine can reach needs TLS, and a key where one
can be asked for. Pure; nothing is resolved, so a name other than `localhost` counts as reachable.
"""

import ipaddress

from splitserve.core.config import RouterConfig, WorkerConfig
from splitserve.core.errors import ConfigError


def check_router(config: RouterConfig) -> None:
    """Raises ConfigError naming the first setting that would let strangers in."""
    guarded = {"tls": config.tls is not None, "api_keys": config.api_keys is not None}
    check_address("listen", config.listen, guarded, config.insecure)
    check_address("http", config.http, guarded, config.insecure)
    check_address("metrics", config.metrics, {"tls": config.tls is not None}, config.insecure)


def check_worker(config: WorkerConfig) -> None:
    """Raises ConfigError. `kv_transfer.host` is not looked at: its control channel is encrypted, what NIXL moves can't
    be (docs/security.md)."""
    check_address("metrics", config.metrics, {"metrics_tls": config.metrics_tls is not None}, config.insecure)


def check_leader(config: WorkerConfig, key: str | None) -> None:
    """Raises ConfigError if node 0 would take strangers for nodes of its. `key`: the worker's API key."""
    nodes = config.nodes
    if nodes.count > 1:
        check_address("nodes.leader", f"{nodes.leader}:{nodes.port}", {"an API key": bool(key)}, config.insecure)


def check_address(setting: str, address: str | None, guarded: dict[str, bool], insecure: bool) -> None:
    """`guarded`: each setting that must be said for an address which others can reach, and whether it is."""
    missing = [name for name, said in guarded.items() if not said]
    if address is None or insecure or not missing or is_loopback(address):
        return
    raise ConfigError(
        setting,
        f"{address} can be reached from other machines, but {' and '.join(missing)} {_is(missing)} not set; set "
        f"{'them' if len(missing) > 1 else 'it'}, listen on 127.0.0.1, or say insecure: true (--insecure) where the "
        "network itself keeps strangers out",
    )


def is_loopback(address: str) -> bool:
    """Of host:port."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
