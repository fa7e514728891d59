"""The console's state and `splitserve top` of a simulated cluster: each figure is worked out from what clients were
told."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from splitserve.client import AsyncClient
from splitserve.core.config import KvTransferSettings, RouterConfig, SimSettings, SloClass
from splitserve.core.slo import Slo, percentile
from splitserve.core.worker import Pool
from splitserve.gateway.config import GatewayConfig
from splitserve.rpc.channel import addresses
from tests.certificates import Authority
from tests.cluster.asking import WAIT_S, ask, eventually, greedy, prompt_of, settled
from tests.cluster.processes import FAST, KV, ROUTER, Cluster, Process, cluster_of
from tests.cluster.test_security import key_of, write_keys

SLO = Slo(ttft_s=0.02, tpot_s=0.004)  # some requests meet it, some don't
CLASSES = {
    "some, in the router": SloClass(ttft_s=SLO.ttft_s, tpot_s=SLO.tpot_s),
    "some, by itself": SloClass(ttft_s=SLO.ttft_s, tpot_s=SLO.tpot_s),
    "all": SloClass(ttft_s=1000.0),
    "none": SloClass(ttft_s=1e-9),
}
HTTP = ROUTER.model_copy(update={"http": "127.0.0.1:0", "slo_classes": CLASSES})
SLOW = SimSettings(step_s=0.02)


async def state_at(http: str, key: str = "", **query: str | int) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession() as client,
        client.get(f"http://{http}/console/api/state", params=query, headers=headers) as answer,
    ):
        return answer.status, await answer.json()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def cluster(directory: Path) -> Iterator[Cluster]:
    with cluster_of(directory, 1, 2, router=HTTP) as started:
        yield started


@pytest.fixture(scope="module")
def gateway(cluster: Cluster, directory: Path) -> Iterator[str]:
    """Of one in a process of its own."""
    process = Process("gateway", GatewayConfig(router=cluster.address, listen="127.0.0.1:0"), directory, "gateway")
    try:
        yield str(process.ready()["address"])
    finally:
        process.close()


@dataclass(frozen=True, slots=True)
class View:
    """A gateway's console; the two kinds of gateway look at one router, so each has an SLO class of its own."""

    http: str
    slo_class: str

    async def state(self) -> Any:
        status, answer = await state_at(self.http)
        assert status == 200, answer
        return answer


@pytest.fixture(params=["in the router", "by itself"])
def view(request: pytest.FixtureRequest, cluster: Cluster, gateway: str) -> View:
    if request.param == "by itself":
        return View(gateway, "some, by itself")
    return View(str(cluster.router.ready()["http"]), "some, in the router")


def of(told: Any, slo_class: str) -> Any:
    (found,) = [each for each in told["classes"] if each["name"] == slo_class]
    return found


# Figures -------------------------------------------------------------------------------------------------------------
async def test_percentiles_attainment_and_links_are_those_of_the_answers(cluster: Cluster, view: View) -> None:
    before = moved_in(await view.state())
    async with AsyncClient(cluster.address) as client:
        asked = (
            ask(client, prompt_of(60 + 90 * (at % 5)), greedy(2 + at), slo_class=view.slo_class) for at in range(12)
        )
        answers = await asyncio.gather(*asked)
        await settled(client, 3)
    told = await view.state()
    timings, seen = [answer.timings for answer in answers], of(told, view.slo_class)
    assert seen["ended"] == len(timings)
    for name, values in (("ttft", [one.ttft_s for one in timings]), ("tpot", [one.tpot_s for one in timings])):
        for percent in (50, 90, 99):
            assert seen[name][f"p{percent}_s"] == percentile(sorted(values), percent), f"{name} p{percent}"
    met = sum(SLO.allows(0, one.ttft_s, one.tpot_s, 0.0) for one in timings)
    assert (seen["met"], seen["attainment"]) == (met, met / len(timings))
    moved: Counter[str] = Counter()
    for one in timings:
        moved[f"{one.prefill_worker} {one.decode_worker}"] += one.kv_bytes
    assert moved.total() > 0
    assert moved_in(told) - before == +moved


def moved_in(told: Any) -> Counter[str]:
    """Bytes by link."""
    return Counter({f"{link['source']} {link['destination']}": link["bytes"] for link in told["links"]})


async def test_attainment_is_all_or_nothing_where_objectives_are(cluster: Cluster, view: View) -> None:
    async with AsyncClient(cluster.address) as client:
        for slo_class in ("all", "none"):
            await ask(client, prompt_of(50), greedy(4), slo_class=slo_class)
    told = await view.state()
    assert (of(told, "all")["attainment"], of(told, "none")["attainment"]) == (1.0, 0.0)
    assert of(told, "batch")["attainment"] is None


async def test_requests_in_flight_have_their_phase_and_route(directory: Path) -> None:
    (directory / "slow").mkdir(exist_ok=True)
    with cluster_of(directory / "slow", engine=SLOW, router=HTTP) as slow:
        http = str(slow.router.ready()["http"])
        async with AsyncClient(slow.address) as client:
            calls = [
                asyncio.create_task(ask(client, prompt_of(200, at), greedy(400), request_id=f"r{at}"))
                for at in range(3)
            ]
            seen: Any = {}

            async def all_decode() -> bool:
                nonlocal seen
                _, seen = await state_at(http)
                return [each["phase"] for each in seen["requests"]] == ["decode"] * 3

            await eventually(all_decode, "three requests that decode")
            assert {each["id"] for each in seen["requests"]} == {"r0", "r1", "r2"}
            for each in seen["requests"]:
                assert (each["prompt_tokens"], each["class"]) == (200, "standard")
                assert 0 < each["output_tokens"] <= 400
                assert each["decode_worker"] in ("decode-0", "prefill-0")
            routes = {each["id"]: (each["prefill_worker"], each["decode_worker"]) for each in seen["requests"]}
            _, one = await state_at(http, requests=1)
            assert (len(one["requests"]), one["requests_total"]) == (1, 3)
            busy = [worker for worker in seen["workers"] if worker["decodes"]]
            assert sum(worker["decodes"] for worker in busy) == 3
            for worker in busy:
                assert worker["step_s"] is None or worker["step_s"] >= SLOW.step_s / 2
            answers = await asyncio.gather(*calls)
            for at, answer in enumerate(answers):
                assert routes[f"r{at}"] == (answer.timings.prefill_worker, answer.timings.decode_worker)
            _, idle = await state_at(http)
            assert (idle["requests"], idle["requests_total"], idle["running"]) == ([], 0, 0)
            assert any(worker["step_s"] for worker in idle["workers"])


async def test_a_killed_worker_leaves_the_state(directory: Path) -> None:
    (directory / "killed").mkdir(exist_ok=True)
    with cluster_of(directory / "killed", 1, 2, router=HTTP) as killed:
        http = str(killed.router.ready()["http"])

        async def names() -> list[str]:
            return sorted(worker["name"] for worker in (await state_at(http))[1]["workers"])

        assert await names() == ["decode-0", "decode-1", "prefill-0"]
        killed.kill("decode-0")

        async def gone() -> bool:
            return await names() == ["decode-1", "prefill-0"]

        await eventually(gone, "a state without the killed worker")


# Who may look --------------------------------------------------------------------------------------------------------
class Guarded:
    """A router with keys, its HTTP, and a gateway by itself in front of it."""

    def __init__(self, directory: Path, router: RouterConfig, kv: KvTransferSettings) -> None:
        write_keys(directory / "keys.yaml", "acme", "ops", "fleet")
        (directory / "worker.key").write_text(key_of("fleet") + "\n")
        said = router.model_copy(update={"api_keys": str(directory / "keys.yaml")})
        self.cluster = Cluster(directory, FAST, said, kv)
        worker = self.cluster.add("decode-0", Pool.DECODE, api_key_file=str(directory / "worker.key"))
        config = GatewayConfig(router=self.cluster.address, listen="127.0.0.1:0")
        self.gateway = Process("gateway", config, directory, "gateway")
        worker.ready()

    @property
    def addresses(self) -> list[str]:
        return [str(self.cluster.router.ready()["http"]), str(self.gateway.ready()["address"])]

    def close(self) -> None:
        self.gateway.close()
        self.cluster.close()


async def test_only_an_operators_key_sees_the_state_and_the_page_is_free(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, HTTP, KV)
    try:
        for http in guarded.addresses:
            assert (await state_at(http))[0] == 401
            assert (await state_at(http, "no-such-key-0123456789"))[0] == 401
            status, told = await state_at(http, key_of("acme"))
            assert (status, "no scope admin" in told["error"]["message"]) == (403, True)
            status, told = await state_at(http, key_of("ops"))
            assert (status, [worker["name"] for worker in told["workers"]]) == (200, ["decode-0"])
            async with aiohttp.ClientSession() as client, client.get(f"http://{http}/console") as page:
                assert page.status == 200
    finally:
        guarded.close()


async def test_without_a_console_there_is_none(tmp_path: Path) -> None:
    with cluster_of(tmp_path, 0, 1, router=HTTP.model_copy(update={"console": False})) as cluster:
        config = GatewayConfig(router=cluster.address, listen="127.0.0.1:0", console=False)
        process = Process("gateway", config, tmp_path, "gateway")
        try:
            for http in (cluster.router.ready()["http"], process.ready()["address"]):
                async with aiohttp.ClientSession() as client:
                    for path in ("console", "console/main.js", "console/api/state"):
                        async with client.get(f"http://{http}/{path}") as answer:
                            assert answer.status == 404
        finally:
            process.close()


async def test_a_gateway_of_several_routers_shows_each_by_name_and_says_which_is_gone(tmp_path: Path) -> None:
    with cluster_of(tmp_path, 0, 1, router=HTTP) as cluster:
        config = GatewayConfig(router=f"{cluster.address},127.0.0.1:1", listen="127.0.0.1:0")
        process = Process("gateway", config, tmp_path, "gateway")
        try:
            http = str(process.ready()["address"])
            first, second = addresses(config.router)
            _, told = await state_at(http, router=first)
            assert (told["asked"], told["routers"], len(told["workers"])) == (first, [first, second], 1)
            assert (await state_at(http, router=second))[0] == 503
        finally:
            process.close()


# splitserve top ------------------------------------------------------------------------------------------------------
def test_top_looks_at_a_remote_router_with_tls_and_a_key(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    write_keys(tmp_path / "keys.yaml", "ops", "fleet")
    (tmp_path / "worker.key").write_text(key_of("fleet") + "\n")
    tls = authority.server(mutual=True)
    router = ROUTER.model_copy(update={"tls": tls, "api_keys": str(tmp_path / "keys.yaml")})
    cluster = Cluster(tmp_path, FAST, router, KV)
    try:
        worker = {"router_tls": authority.client("worker"), "api_key_file": str(tmp_path / "worker.key")}
        cluster.add("decode-0", Pool.DECODE, **worker, metrics_tls=authority.server("worker-metrics")).ready()
        mine = authority.client()
        options = ["--ca", str(mine.ca), "--cert", str(mine.certificate), "--key", str(mine.key)]
        run = top(cluster.address, *options, "--api-key", key_of("ops"), "--json")
        assert run.returncode == 0, run.stderr
        assert [worker["worker"]["name"] for worker in json.loads(run.stdout)["workers"]] == ["decode-0"]
        refused = top(cluster.address, *options, "--api-key", "no-such-key-0123456789")
        assert (refused.returncode, "not known here" in refused.stderr) == (1, True)
    finally:
        cluster.close()


def top(address: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "splitserve", "top", "--once", "--router", address, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_the_setting_is_named_where_it_is_misspelt(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text(yaml.safe_dump({"consol": False}))
    command = [sys.executable, "-m", "splitserve", "router", "--config", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (run.returncode, "consol" in run.stderr) == (2, True)
