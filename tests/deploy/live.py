"""A cluster of `splitserve up`, a gateway, load on both, and a Prometheus that scrapes them: real processes."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from splitserve.client import AsyncClient
from splitserve.core.errors import SplitserveError
from splitserve.core.request import SamplingParams
from splitserve.gateway.config import GatewayConfig
from tests.cluster.processes import Process
from tests.deploy.rules import PROMETHEUS, hurried_rules
from tests.deploy.tools import program

WAIT_S = 60.0
START_S = 120.0
POLL_S = 0.25
_GAP_S = 0.1  # between two requests
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback never goes through a proxy

CLUSTER: dict[str, Any] = {
    "engine": {"kind": "sim", "step_s": 0.002, "total_blocks": 1024},
    "router": {
        "listen": "127.0.0.1:0",
        "http": None,
        "metrics": "127.0.0.1:0",
        "heartbeat_interval_s": 0.2,
        # Long enough for a busy machine: a healthy cluster meets its objectives.
        "slo_classes": {"interactive": {"ttft_s": 20.0, "tpot_s": 5.0}},
    },
    "pools": {"prefill": {"workers": 1}, "decode": {"workers": 2}},
    "worker_metrics_port": 19401,
    "restart": False,
}


def eventually(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Returns once the condition holds; fails if it doesn't in time."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(POLL_S)


class Up:
    """`splitserve up`, ready. What it told of its processes: name to pid, and to where metrics are."""

    def __init__(self, directory: Path) -> None:
        file = directory / "cluster.yaml"
        file.write_text(yaml.safe_dump(CLUSTER))
        command = [sys.executable, "-m", "splitserve", "up", str(file), "--json", "--run-dir", str(directory / "up")]
        self._log = (directory / "up.log").open("wb")
        self._popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        serving = self._serving()
        self.address = str(serving["address"])
        self.pids = {process["name"]: int(process["pid"]) for process in serving["processes"]}
        self.metrics = {process["name"]: str(process["metrics"]) for process in serving["processes"]}

    def _serving(self) -> dict[str, Any]:
        """The line that says so; one that never comes ends with the process."""
        assert self._popen.stdout is not None
        watchdog = threading.Timer(START_S, self._popen.kill)
        watchdog.start()
        try:
            for line in self._popen.stdout:
                event = json.loads(line)
                if event["event"] == "serving":
                    return dict(event)
        finally:
            watchdog.cancel()
        raise AssertionError("splitserve up did not become ready")

    def kill(self, name: str) -> None:
        os.kill(self.pids[name], signal.SIGKILL)

    def close(self) -> None:
        self._popen.terminate()
        try:
            self._popen.wait(30)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait(30)
        if self._popen.stdout is not None:
            self._popen.stdout.close()
        self._log.close()


class Load:
    """Requests that never stop, on an event loop and a thread of its own: gRPC of class `slo_class`, and HTTP."""

    def __init__(self, router: str, http: str) -> None:
        self.slo_class = "interactive"
        self.answered = 0
        self._router, self._http = router, http
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(60)

    async def _run(self) -> None:
        async with AsyncClient(self._router) as client:
            running: set[asyncio.Task[None]] = set()
            number = 0
            while not self._over.is_set():
                number += 1
                task = asyncio.create_task(self._ask(client, number))
                running.add(task)
                task.add_done_callback(running.discard)
                await asyncio.sleep(_GAP_S)
            await asyncio.gather(*running, return_exceptions=True)

    async def _ask(self, client: AsyncClient, number: int) -> None:
        """What fails is the routers' to count."""
        prompt = tuple(300 + (number * 31 + at) % 1500 for at in range(200))
        sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        with suppress(SplitserveError):
            async for _ in client.generate(prompt, sampling, slo_class=self.slo_class, deadline_s=20.0):
                pass
            self.answered += 1
        if number % 10 == 0:
            await asyncio.to_thread(self._complete)

    def _complete(self) -> None:
        body = json.dumps({"model": "demo", "prompt": "It is a truth", "max_tokens": 4}).encode()
        headers = {"content-type": "application/json"}
        with suppress(OSError):
            _DIRECT.open(
                urllib.request.Request(f"http://{self._http}/v1/completions", body, headers), timeout=20
            ).close()


class Prometheus:
    """Debian's, with the configuration and the rules of deploy/, each minute of them a second."""

    def __init__(self, directory: Path, up: Up, gateway: str) -> None:
        self._log_file = directory / "prometheus.log"
        self._address = f"127.0.0.1:{_free_port()}"
        (directory / "rules.yml").write_text(yaml.safe_dump(hurried_rules()))
        (directory / "prometheus.yml").write_text(yaml.safe_dump(_configuration(up)))
        (directory / "targets").mkdir()
        target = [{"targets": [gateway], "labels": {"cluster": "local", "role": "gateway"}}]
        (directory / "targets" / "gateway.yml").write_text(yaml.safe_dump(target))
        self._log = self._log_file.open("wb")
        self._popen = subprocess.Popen(
            [
                program("prometheus", "prometheus"),
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={self._address}",
            ],
            stdout=self._log,
            stderr=self._log,
        )
        try:
            eventually(self._ready, lambda: f"Prometheus did not start:\n{self._log_file.read_text()}")
        except BaseException:
            self.close()
            raise

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector now. Raises AssertionError with what Prometheus finds wrong with the expression."""
        try:
            return list(self._get(f"query?{urllib.parse.urlencode({'query': expression})}")["result"])
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from error

    def firing(self) -> dict[str, dict[str, Any]]:
        """Alerts that fire, by name; of several the last."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}

    def targets(self) -> dict[str, str]:
        """Health by address."""
        return {each["labels"]["instance"]: each["health"] for each in self._get("targets")["activeTargets"]}

    def _ready(self) -> bool:
        assert self._popen.poll() is None, self._log_file.read_text()
        try:
            with _DIRECT.open(f"http://{self._address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _get(self, path: str) -> dict[str, Any]:
        with _DIRECT.open(f"http://{self._address}/api/v1/{path}", timeout=20) as answer:
            return dict(json.loads(answer.read())["data"])

    def close(self) -> None:
        self._popen.terminate()
        self._popen.wait(30)
        self._log.close()


def _configuration(up: Up) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml at these addresses."""
    said: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    said["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    router, worker, _ = said["scrape_configs"]
    router["static_configs"][0]["targets"] = [up.metrics["router"]]
    worker["static_configs"][0]["targets"] = [address for name, address in up.metrics.items() if name != "router"]
    return said


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Live:
    """All of it."""

    def __init__(self, up: Up, load: Load, prometheus: Prometheus) -> None:
        self.up, self.load, self.prometheus = up, load, prometheus
        self._settled_at = time.monotonic()

    def settled(self) -> None:
        """From now on it is a healthy cluster."""
        self._settled_at = time.monotonic()

    @property
    def settled_for_s(self) -> int:
        """At least a second: PromQL takes no shorter window."""
        return max(1, int(time.monotonic() - self._settled_at))


@contextmanager
def live(directory: Path) -> Iterator[Live]:
    up = Up(directory)
    try:
        gateway = Process("gateway", GatewayConfig(router=up.address, listen="127.0.0.1:0"), directory, "gateway")
        try:
            address = str(gateway.ready()["address"])
            load = Load(up.address, address)
            try:
                prometheus = Prometheus(directory, up, address)
                try:
                    yield Live(up, load, prometheus)
                finally:
                    prometheus.close()
            finally:
                load.close()
        finally:
            gateway.close()
    finally:
        up.close()
