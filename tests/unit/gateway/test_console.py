"""The console's routes: the page's files and what the browser is told of them, and the state, for an operator's key."""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from math import inf
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from splitserve.core.errors import PermissionDenied, SplitserveError, Unauthenticated, Unavailable
from splitserve.core.fleet import (
    ClassStatus,
    FleetStatus,
    Health,
    LinkStatus,
    Percentiles,
    Phase,
    RecentOutputs,
    RunningRequest,
    RunningRequests,
    WorkerStatus,
)
from splitserve.core.worker import Pool
from splitserve.gateway.backend import Oversight
from splitserve.gateway.console import POLICY
from splitserve.gateway.serve import HttpServer
from tests.unit.gateway.serving import Told, says, url
from tests.unit.router.scripted import load_of, worker_info
from tests.unit.router.test_late import COST

PAGE = files("splitserve.gateway.console").joinpath("page")
FILES = sorted(each.name for each in PAGE.iterdir())
INFO = worker_info("d0", Pool.DECODE)
LOAD = load_of(INFO, free_blocks=48, running=3, produced_tokens=1234, pinned_blocks=2)
WORKER = WorkerStatus(INFO, Pool.DECODE, Health.READY, LOAD, 0.5, -1.0, 1, 2, 0.012)
RECENT = RecentOutputs(8, 6, Percentiles(0.1, 0.2, 0.3), Percentiles())
CHAT = ClassStatus("chat", 1.0, 0.0005, inf, inf, 100, 93, 0.31, RECENT)
IDLE = ClassStatus("idle", inf, 0.0, inf, inf, 0, 0, 0.0)
LINK = LinkStatus("p0", "d0", 3, 1, 4096, 1024)
FLEET = FleetStatus("demo", (WORKER,), 4, 5, "router", (CHAT, IDLE), (LINK,))
REQUEST = RunningRequest("r", "chat", Phase.DECODE, 40, 7, 1.5, "p0", "d0")


@dataclass
class Watched:
    """One router, as an operator's key sees it."""

    fleet_status: FleetStatus = FLEET
    error: SplitserveError | None = None
    bearers: list[str] = field(default_factory=list)
    most: list[int] = field(default_factory=list)

    async def fleet(self, bearer: str = "") -> FleetStatus:
        self.bearers.append(bearer)
        if self.error is not None:
            raise self.error
        return self.fleet_status

    async def requests(self, most: int = 0, bearer: str = "") -> RunningRequests:
        self.most.append(most)
        return RunningRequests((REQUEST,), 9)


@asynccontextmanager
async def console(overseen: Mapping[str, Oversight] | None) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """A client, and where the gateway is."""
    server = HttpServer(Told(says("A")), "127.0.0.1:0", registry=CollectorRegistry(), overseen=overseen)
    async with server, aiohttp.ClientSession() as client:
        yield client, url(server)


async def state_of(client: aiohttp.ClientSession, at: str, query: str = "", **headers: str) -> tuple[int, Any]:
    async with client.get(f"{at}/console/api/state{query}", headers=headers) as answer:
        return answer.status, await answer.json()


# The page ------------------------------------------------------------------------------------------------------------
async def test_every_file_of_the_page_comes_with_a_policy_that_keeps_the_browser_here() -> None:
    async with console({"here": Watched()}) as (client, at):
        for path in ("/console", *(f"/console/{name}" for name in FILES)):
            async with client.get(at + path) as answer:
                assert answer.status == 200, path
                assert answer.headers["Content-Security-Policy"] == POLICY
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert await answer.read()


def test_the_policy_allows_nothing_but_the_pages_own_files() -> None:
    said = dict(part.split(" ", 1) for part in POLICY.split("; "))
    assert said.pop("require-trusted-types-for") == "'script'"
    assert said["default-src"] == "'none'"
    assert set(said.values()) == {"'none'", "'self'"}


@pytest.mark.parametrize(
    ("name", "kind"), [("main.js", "text/javascript"), ("console.css", "text/css"), ("icon.svg", "image/svg+xml")]
)
async def test_a_file_has_the_type_that_its_name_says(name: str, kind: str) -> None:
    async with console({"here": Watched()}) as (client, at), client.get(f"{at}/console/{name}") as answer:
        assert (answer.content_type, answer.charset) == (kind, "utf-8")


def test_the_page_loads_nothing_from_elsewhere_and_names_only_files_that_are_there() -> None:
    index = PAGE.joinpath("index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"#]+)"', index)
    assert {name.removeprefix("console/") for name in named} <= set(FILES)
    for name in FILES:
        text = PAGE.joinpath(name).read_text()
        assert re.findall(r"https?://[^\s\"']+", text.replace("http://www.w3.org/2000/svg", "")) == [], name
        for imported in re.findall(r'from "([^"]+)"', text):
            assert imported.removeprefix("./") in FILES, f"{name} imports {imported}"


def test_no_script_puts_together_html() -> None:
    for name in FILES:
        text = PAGE.joinpath(name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(| style=", text), name


async def test_an_unchanged_file_is_not_sent_again() -> None:
    async with console({"here": Watched()}) as (client, at):
        async with client.get(f"{at}/console") as answer:
            tag = answer.headers["ETag"]
        async with client.get(f"{at}/console", headers={"If-None-Match": tag}) as again:
            assert (again.status, await again.read()) == (304, b"")
        async with client.get(f"{at}/console", headers={"If-None-Match": '"another"'}) as changed:
            assert changed.status == 200


async def test_a_slash_too_many_leads_to_the_page_wherever_a_proxy_has_put_it() -> None:
    async with console({"here": Watched()}) as (client, at):
        async with client.get(f"{at}/console/", allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (308, "../console")
        async with client.get(f"{at}/console/") as page:
            assert (page.url.path, page.status) == ("/console", 200)


@pytest.mark.parametrize("path", ["/console/state.py", "/console/..%2fstate.py", "/console/%2e%2e/state.py"])
async def test_only_the_pages_own_files_are_there(path: str) -> None:
    async with console({"here": Watched()}) as (client, at), client.get(at + path) as answer:
        assert answer.status == 404


async def test_without_routers_to_look_at_there_is_no_console() -> None:
    async with console(None) as (client, at):
        for path in ("/console", "/console/main.js", "/console/api/state"):
            async with client.get(at + path) as answer:
                assert answer.status == 404


# The state -----------------------------------------------------------------------------------------------------------
async def test_the_state_says_what_there_is_and_null_where_there_is_none() -> None:
    async with console({"here": Watched()}) as (client, at):
        status, told = await state_of(client, at)
    assert status == 200
    assert (told["model"], told["waiting"], told["running"], told["requests_total"]) == ("demo", 4, 5, 9)
    assert (told["asked"], told["routers"]) == ("here", ["here"])
    (worker,) = told["workers"]
    assert (worker["name"], worker["pool"], worker["health"]) == ("d0", "decode", "ready")
    assert (worker["total_blocks"], worker["free_blocks"], worker["running"]) == (64, 48, 3)
    assert (worker["step_s"], worker["slowdown"], worker["token_s"]) == (0.012, None, None)
    chat, idle = told["classes"]
    assert (chat["ttft_s"], chat["tpot_s"], chat["attainment"]) == (1.0, None, 0.75)
    assert chat["ttft"] == {"p50_s": 0.1, "p90_s": 0.2, "p99_s": 0.3}
    assert chat["tpot"] == {"p50_s": None, "p90_s": None, "p99_s": None}
    assert (idle["ttft_s"], idle["attainment"]) == (None, None)
    assert told["links"] == [
        {"source": "p0", "destination": "d0", "transfers": 3, "failed": 1, "bytes": 4096, "early_bytes": 1024}
    ]
    (request,) = told["requests"]
    assert (request["id"], request["phase"], request["decode_worker"]) == ("r", "decode", "d0")


async def test_a_worker_with_a_profile_has_a_slowdown() -> None:
    info = worker_info("d0", Pool.DECODE, step_cost=COST)
    worker = WorkerStatus(info, Pool.DECODE, Health.READY, load_of(info, slowdown=1.25), 0.5, -1.0, 1, 2)
    watched = Watched(FleetStatus("demo", (worker,), 0, 0, "router"))
    async with console({"here": watched}) as (client, at):
        _, told = await state_of(client, at)
    assert (told["workers"][0]["slowdown"], told["workers"][0]["step_s"]) == (1.25, None)


async def test_nothing_of_a_workers_addresses_or_keys_is_told() -> None:
    async with console({"here": Watched()}) as (client, at), client.get(f"{at}/console/api/state") as answer:
        text = await answer.text()
        assert answer.headers["Cache-Control"] == "no-store"
    for peer in INFO.kv_peers:
        assert peer.endpoint not in text
    assert not re.search("endpoint|public_key|address", text)


async def test_the_callers_key_is_shown_to_the_router() -> None:
    watched = Watched()
    async with console({"here": watched}) as (client, at):
        await state_of(client, at, Authorization="Bearer secret")
        await state_of(client, at)
    assert watched.bearers == ["secret", ""]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Unauthenticated("no API key"), 401), (PermissionDenied("no scope admin"), 403), (Unavailable("no router"), 503)],
)
async def test_a_refusal_is_told_in_its_own_words(error: SplitserveError, status: int) -> None:
    async with console({"here": Watched(error=error)}) as (client, at):
        got, told = await state_of(client, at)
    assert (got, told["error"]["message"]) == (status, str(error))


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)]
)
async def test_another_sites_page_may_not_ask(site: str, status: int) -> None:
    async with console({"here": Watched()}) as (client, at):
        assert (await state_of(client, at, **{"Sec-Fetch-Site": site}))[0] == status


async def test_each_router_can_be_looked_at_by_name() -> None:
    other = Watched(FleetStatus("other", (), 0, 0, "second"))
    async with console({"a:1": Watched(), "b:2": other}) as (client, at):
        _, first = await state_of(client, at)
        _, second = await state_of(client, at, "?router=b:2")
        status, refused = await state_of(client, at, "?router=c:3")
    assert (first["asked"], first["model"], first["routers"]) == ("a:1", "demo", ["a:1", "b:2"])
    assert (second["asked"], second["model"]) == ("b:2", "other")
    assert (status, refused["error"]["param"]) == (400, "router")


async def test_so_many_requests_are_asked_for_as_the_page_says() -> None:
    watched = Watched()
    async with console({"here": watched}) as (client, at):
        assert [(await state_of(client, at, query))[0] for query in ("?requests=50", "?requests=", "?requests=-1")] == [
            200,
            400,
            400,
        ]
    assert watched.most == [50]
