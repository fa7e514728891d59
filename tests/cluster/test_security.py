"""TLS, keys and their limits between real processes; and what a process refuses to be started as."""

import json
import os
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitserve.client import AsyncClient, Retries
from splitserve.core.config import RouterConfig, WorkerConfig
from splitserve.core.errors import Limit, Overloaded, PermissionDenied, SplitserveError, Unauthenticated, Unavailable
from splitserve.core.worker import Pool
from tests.certificates import Authority
from tests.cluster.asking import ask, eventually, greedy, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import FAST, KV, ROUTER, Cluster, Process

BAD_CONFIGURATION = 2
WAIT_S = 60
PROMPT = prompt_of(60)
TENANTS: dict[str, dict[str, Any]] = {
    "acme": {},
    "ops": {"scopes": ["admin"]},
    "fleet": {"scopes": ["worker"]},
    "slow": {"requests_per_minute": 1},
    "brief": {"tokens_per_minute": 61},
}


def key_of(tenant: str) -> str:
    return f"key-of-{tenant}-0123456789"


def write_keys(file: Path, *tenants: str) -> None:
    entries = [{"name": name, "key": key_of(name), **TENANTS.get(name, {})} for name in tenants]
    new = file.with_suffix(".new")
    new.write_text(yaml.safe_dump({"keys": entries}))
    new.replace(file)


class Secured:
    """A router with mutual TLS and keys, and how to call it."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory / "tls")
        self.keys = directory / "keys.yaml"
        write_keys(self.keys, *TENANTS)
        (directory / "worker.key").write_text(key_of("fleet") + "\n")
        self.worker: dict[str, Any] = {
            "router_tls": self.authority.client("worker"),
            "api_key_file": str(directory / "worker.key"),
            "metrics_tls": self.authority.server("worker-metrics"),
        }
        tls = self.authority.server(mutual=True)
        self.router = ROUTER.model_copy(update={"tls": tls, "api_keys": str(self.keys)})
        self.cluster = Cluster(directory, FAST, self.router, KV)

    def client(self, tenant: str | None) -> AsyncClient:
        key = key_of(tenant) if tenant is not None else None
        return AsyncClient(self.cluster.address, Retries(most=0), tls=self.authority.client(), api_key=key)


@contextmanager
def secured_in(directory: Path) -> Iterator[Secured]:
    made = Secured(directory)
    try:
        for name, pool in (("prefill-0", Pool.PREFILL), ("decode-0", Pool.DECODE)):
            made.cluster.add(name, pool, **made.worker)
        for worker in made.cluster.workers.values():
            worker.ready()
        yield made
    finally:
        made.cluster.close()


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with secured_in(tmp_path_factory.mktemp("secured")) as made:
        yield made


def refusal(process: Process) -> str:
    """The last line that a process wrote before it gave up."""
    try:
        assert process.ended() == BAD_CONFIGURATION, process.log.read_text()
        assert "Traceback" not in process.log.read_text()
        assert "listens" not in process.log.read_text()
        return process.log.read_text().splitlines()[-1]
    finally:
        process.close()


# Calls ---------------------------------------------------------------------------------------------------------------
async def test_with_tls_and_keys_on_every_hop_tokens_are_what_they_are_without(
    secured: Secured, expected: Expected
) -> None:
    async with secured.client("acme") as client, secured.client("ops") as operator:
        answer = await ask(client, PROMPT)
        assert answer.same_as(await expected(PROMPT))
        assert answer.timings.prefill_worker == "prefill-0"
        assert answer.timings.kv_bytes > 0
        await settled(operator, 2)


@pytest.mark.parametrize("tenant", ["stranger", None])
async def test_without_a_known_key_nothing_is_answered(secured: Secured, tenant: str | None) -> None:
    async with secured.client(tenant) as client:
        with pytest.raises(Unauthenticated):
            await ask(client, PROMPT)
        with pytest.raises(Unauthenticated):
            await client.fleet()


async def test_a_key_opens_its_scope_alone(secured: Secured) -> None:
    async with secured.client("acme") as client, secured.client("ops") as operator:
        with pytest.raises(PermissionDenied, match="no scope admin"):
            await client.fleet()
        with pytest.raises(PermissionDenied, match="no scope admin"):
            await client.drain("decode-0")
        with pytest.raises(PermissionDenied, match="no scope inference"):
            await ask(operator, PROMPT)
        assert len((await operator.fleet()).workers) == 2


async def test_a_key_over_its_request_rate_is_told_when_to_come_back(secured: Secured) -> None:
    async with secured.client("slow") as client:
        await ask(client, PROMPT, greedy(2))
        with pytest.raises(Overloaded, match="requests_per_minute") as raised:
            await ask(client, PROMPT, greedy(2))
        assert 0 < raised.value.retry_after_s <= 60


async def test_prompt_and_output_count_against_a_token_rate(secured: Secured) -> None:
    async with secured.client("brief") as client:
        await ask(client, PROMPT, greedy(32))
        with pytest.raises(Overloaded, match="tokens_per_minute") as raised:
            await ask(client, PROMPT, greedy(2))
        assert raised.value.limit is Limit.KEY_TOKENS_PER_MINUTE
        assert 20 < raised.value.retry_after_s <= 32


async def test_without_a_client_certificate_nobody_is_let_in(secured: Secured) -> None:
    trusting = secured.authority.client().model_copy(update={"certificate": None, "key": None})
    for tls in (trusting, None):
        async with AsyncClient(secured.cluster.address, Retries(most=0), tls=tls, api_key=key_of("acme")) as client:
            with pytest.raises(Unavailable):
                await ask(client, PROMPT)


def test_a_command_says_who_it_is_by_options_or_environment(secured: Secured) -> None:
    tls = secured.authority.client()
    files = {"--ca": tls.ca, "--cert": tls.certificate, "--key": tls.key}
    options = [str(part) for option in files.items() for part in option]
    command = [sys.executable, "-m", "splitserve", "status", "--json", "--router", secured.cluster.address, *options]
    environment = {**os.environ, "SPLITSERVE_API_KEY": key_of("ops")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert len(json.loads(done.stdout)["workers"]) == 2
    refused = subprocess.run(
        [*command, "--api-key", key_of("acme")], env=environment, capture_output=True, text=True, timeout=WAIT_S
    )
    assert refused.returncode == 1
    assert "no scope admin" in refused.stderr


@pytest.mark.parametrize("with_ca", [True, False])
def test_a_command_that_speaks_to_a_router_wrongly_hears_which_options_to_look_at(
    secured: Secured, with_ca: bool
) -> None:
    options = ["--ca", secured.authority.ca] if with_ca else []
    command = [sys.executable, "-m", "splitserve", "status", "--router", secured.cluster.address, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 1
    assert "look at --ca, --cert and --key" in done.stderr


def test_metrics_are_served_with_the_same_certificate(secured: Secured) -> None:
    tls = secured.authority.client()
    trusting = ssl.create_default_context(cafile=tls.ca)
    worker = secured.cluster.workers["decode-0"]
    assert "splitserve_" in page(worker, trusting)
    with pytest.raises(OSError, match="Forbidden"):
        page(secured.cluster.router, trusting)
    assert page(secured.cluster.router, trusting, "readyz") == "ok\n", "a kubelet shows no certificate"
    assert tls.certificate is not None
    trusting.load_cert_chain(tls.certificate, tls.key)
    assert "splitserve_" in page(secured.cluster.router, trusting)


def page(process: Process, context: ssl.SSLContext, path: str = "metrics") -> str:
    url = f"https://{process.ready()['metrics']}/{path}"
    with urllib.request.urlopen(url, timeout=10, context=context) as response:
        return str(response.read().decode())


# While it runs -------------------------------------------------------------------------------------------------------
async def test_keys_change_while_the_router_runs(tmp_path: Path) -> None:
    with secured_in(tmp_path) as secured:

        async def answered(tenant: str) -> bool:
            async with secured.client(tenant) as client:
                try:
                    await ask(client, PROMPT, greedy(2))
                except Unauthenticated:
                    return False
            return True

        async def refused(tenant: str) -> bool:
            return not await answered(tenant)

        assert await answered("acme")
        assert await refused("umbrella")
        write_keys(secured.keys, "umbrella", "fleet")
        await eventually(lambda: answered("umbrella"), "the new key is known")
        assert await refused("acme")
        secured.keys.write_text("keys: nonsense")
        log = secured.cluster.router.log

        async def noticed() -> bool:
            return "API keys not usable" in log.read_text()

        await eventually(noticed, "the broken file is logged")
        assert await answered("umbrella")


async def test_a_worker_tells_each_router_how_many_it_serves_and_each_takes_its_share(tmp_path: Path) -> None:
    with secured_in(tmp_path / "one") as first:
        second = Process("router", first.router, tmp_path / "one", "second")
        try:
            both = [first.cluster.address, second.ready()["address"]]
            first.cluster.add("shared", Pool.DECODE, **first.worker, routers=both).ready()
            tls, key = first.authority.client(), key_of("ops")
            async with AsyncClient(",".join(both), Retries(most=0), tls=tls, api_key=key) as operator:

                async def shared() -> bool:
                    fleets = [await operator.fleet() for _ in both]
                    known = [{w.worker.name: w.load.routers for w in fleet.workers} for fleet in fleets]
                    return len({fleet.router_uuid for fleet in fleets}) == 2 and all(
                        loads.get("shared") == 2 for loads in known
                    )

                await eventually(shared, "both routers know that the worker serves two")
            async with first.client("slow") as client:
                await ask(client, PROMPT, greedy(2))

                async def takes_its_share() -> bool:
                    with pytest.raises(Overloaded) as raised:
                        await ask(client, PROMPT, greedy(2))
                    assert raised.value.retry_after_s <= 120
                    return raised.value.retry_after_s > 60

                await eventually(takes_its_share, "half of the rate")  # from the router's next look at its workers on
        finally:
            second.close()


# What is refused -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"listen": "0.0.0.0:0"}, "listen: 0.0.0.0:0 can be reached from other machines, but tls and api_keys"),
        ({"listen": "[::]:0"}, "listen: [::]:0 can be reached"),
        ({"metrics": "0.0.0.0:0"}, "metrics: 0.0.0.0:0 can be reached from other machines, but tls is not set"),
        ({"tls": {"certificate": "nowhere.pem", "key": "x"}}, "tls.certificate: nowhere.pem can't be read"),
        ({"api_keys": "nowhere.yaml"}, "nowhere.yaml: No such file"),
    ],
)
def test_a_router_that_would_let_strangers_in_does_not_start(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    config = RouterConfig.model_validate({**ROUTER.model_dump(), **changes})
    assert says in refusal(Process("router", config, tmp_path, "router"))


def test_a_router_says_what_is_wrong_with_its_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys: [{name: acme, key: short}]")
    said = refusal(Process("router", ROUTER.model_copy(update={"api_keys": str(file)}), tmp_path, "router"))
    assert f"{file}: keys.0.key: must be at least 16" in said


def test_a_router_told_to_be_insecure_starts_and_listens_for_all(tmp_path: Path) -> None:
    process = Process("router", ROUTER.model_copy(update={"listen": "0.0.0.0:0", "insecure": True}), tmp_path, "router")
    try:
        process.ready()
        assert process.listens_on & {"0.0.0.0", "::"}
    finally:
        process.close()


def test_a_worker_with_open_metrics_does_not_start(tmp_path: Path) -> None:
    config = WorkerConfig(pool=Pool.DECODE, engine=FAST, metrics="0.0.0.0:0")
    assert "metrics: 0.0.0.0:0 can be reached" in refusal(Process("worker", config, tmp_path, "worker"))


@pytest.mark.parametrize(
    ("tenant", "says"), [("acme", "no scope worker"), ("stranger", "this API key is not known here")]
)
def test_a_worker_without_the_right_key_is_refused(secured: Secured, tmp_path: Path, tenant: str, says: str) -> None:
    file = tmp_path / "key"
    file.write_text(key_of(tenant))
    process = secured.cluster.add("odd", Pool.DECODE, **{**secured.worker, "api_key_file": str(file)})
    del secured.cluster.workers["odd"]
    said = refusal(process)
    assert f"routers: {secured.cluster.address} refused this worker" in said
    assert says in said


def test_a_worker_whose_files_are_missing_says_which(secured: Secured) -> None:
    tls = secured.authority.client().model_copy(update={"ca": "nowhere.pem"})
    for changes, says in (
        ({"router_tls": tls}, "router_tls.ca: nowhere.pem can't be read"),
        ({"api_key_file": "nowhere.key"}, "api_key_file: nowhere.key can't be read"),
    ):
        process = secured.cluster.add("odd", Pool.DECODE, **{**secured.worker, **changes})
        del secured.cluster.workers["odd"]
        assert says in refusal(process)


async def test_who_was_refused_has_disturbed_nobody(secured: Secured, expected: Expected) -> None:
    async with secured.client("stranger") as stranger, secured.client("acme") as client:
        for _ in range(20):
            with pytest.raises(SplitserveError):
                await ask(stranger, PROMPT)
        assert (await ask(client, PROMPT)).same_as(await expected(PROMPT))
