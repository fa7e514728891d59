"""Router and worker processes for the cluster tests: real ones, on free loopback ports."""

import ipaddress
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from splitserve.core.config import (
    KvTransferSettings,
    RouterConfig,
    Settings,
    SimSettings,
    VllmSettings,
    WorkerConfig,
)
from splitserve.core.worker import Pool

_LISTENS = "0A"  # in /proc/net/tcp
READY_S = 300.0  # vLLM on two busy cores
END_S = 20.0
# Quick to notice a silent process, yet slow enough for two busy cores.
KV = KvTransferSettings(peer_silent_s=1.0, lease_s=5.0)
ROUTER = RouterConfig(listen="127.0.0.1:0", metrics="127.0.0.1:0", heartbeat_interval_s=0.1, heartbeat_timeout_s=2.0)
FAST = SimSettings(step_s=0.001, prefill_token_s=0.000005, decode_token_s=0.00001)


class Process:
    """One splitserve process and what it said when it became ready. `within` is a command that starts it, such as
    `ip netns exec host`."""

    def __init__(self, role: str, config: Settings, directory: Path, name: str, within: Sequence[str] = ()) -> None:
        self.role, self.config, self.name, self.directory, self.within = role, config, name, directory, within
        self.log = directory / f"{name}.log"
        self.facts: dict[str, Any] = {}
        file = directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self._reader, writer = os.pipe()
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [
                    *within,
                    *(sys.executable, "-m", "splitserve", role, "--config", str(file)),
                    *("--ready-fd", str(writer), "--parent", str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(writer,),
            )
        os.close(writer)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exited(self) -> bool:
        return self._popen.poll() is not None

    def ready(self) -> dict[str, Any]:
        """Waits until it is; fails with its log if it ended instead."""
        if not self.facts:
            readable, _, _ = select.select([self._reader], [], [], READY_S)
            line = os.read(self._reader, 65536) if readable else b""
            assert line, f"{self.name} did not become ready:\n{self.log.read_text()}"
            self.facts = json.loads(line)
        return self.facts

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def ended(self) -> int:
        """Waits for its end; returns its exit code."""
        return self._popen.wait(END_S)

    @property
    def listens_on(self) -> set[str]:
        """The hosts of the TCP sockets that this process listens on."""
        sockets = {str(link.readlink()) for link in Path(f"/proc/{self.pid}/fd").iterdir() if link.is_symlink()}
        rows = [line.split() for kind in ("tcp", "tcp6") for line in _table_of(kind)]
        return {_host(row[1]) for row in rows if row[3] == _LISTENS and f"socket:[{row[9]}]" in sockets}

    def close(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait(END_S)
        os.close(self._reader)


def _table_of(kind: str) -> list[str]:
    return Path(f"/proc/net/{kind}").read_text().splitlines()[1:]


def _host(address: str) -> str:
    """As the kernel writes it: words of 32 bits in the machine's byte order, then the port."""
    words = bytes.fromhex(address.partition(":")[0])
    swapped = b"".join(
        words[at : at + 4][::-1] if sys.byteorder == "little" else words[at : at + 4] for at in range(0, len(words), 4)
    )
    host = ipaddress.ip_address(swapped)
    return str(getattr(host, "ipv4_mapped", None) or host)


class Cluster:
    """One router and workers by name. `restart` starts a process anew with the same configuration."""

    def __init__(
        self, directory: Path, engine: SimSettings | VllmSettings, router: RouterConfig, kv: KvTransferSettings
    ) -> None:
        self.directory, self.engine, self.kv = directory, engine, kv
        self.router = Process("router", router, directory, "router")
        self.workers: dict[str, Process] = {}

    @property
    def address(self) -> str:
        """Waits until the router is ready."""
        return str(self.router.ready()["address"])

    def add(self, name: str, pool: Pool, **changes: Any) -> Process:
        """Starts a worker; `ready` waits for it. `changes` are WorkerConfig fields."""
        return self.add_within((), name, pool, **changes)

    def add_within(self, within: Sequence[str], name: str, pool: Pool, **changes: Any) -> Process:
        """`add` by a command that starts it."""
        common = {"name": name, "pool": pool, "routers": [self.address], "engine": self.engine, "kv_transfer": self.kv}
        config = WorkerConfig.model_validate({**common, "metrics": "127.0.0.1:0", **changes})
        self.workers[name] = Process("worker", config, self.directory, name, within)
        return self.workers[name]

    def restart(self, name: str) -> Process:
        old = self.workers[name]
        old.close()
        self.workers[name] = Process("worker", old.config, self.directory, name, old.within)
        return self.workers[name]

    def kill(self, name: str) -> None:
        self.workers[name].signal(signal.SIGKILL)
        self.workers[name].ended()

    def close(self) -> None:
        for process in (*self.workers.values(), self.router):
            process.close()


@contextmanager
def cluster_of(
    directory: Path,
    prefill: int = 1,
    decode: int = 1,
    engine: SimSettings | VllmSettings = FAST,
    router: RouterConfig = ROUTER,
    kv: KvTransferSettings = KV,
) -> Iterator[Cluster]:
    """A cluster with workers prefill-0, ..., decode-0, ..., all of them ready."""
    cluster = Cluster(directory, engine, router, kv)
    try:
        for pool, count in ((Pool.PREFILL, prefill), (Pool.DECODE, decode)):
            for index in range(count):
                cluster.add(f"{pool}-{index}", pool)
        for worker in cluster.workers.values():
            worker.ready()
        yield cluster
    finally:
        cluster.close()
