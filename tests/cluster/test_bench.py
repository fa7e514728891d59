"""`splitserve bench`, end to end: real commands against real clusters of simulated engines.

What the load generator is allowed to be late is far more than by default: these tests run beside others.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitserve.bench.archive import load
from splitserve.client import AsyncClient
from tests.cluster.asking import eventually, settled
from tests.cluster.processes import FAST, Cluster, cluster_of
from tests.cluster.test_commands import up

WAIT_S = 120
SMALL = ("--workload", "lognormal:prompt=60,output=12,sigma=0.4", "--warm-up", "0", "--late", "5")
LOOSE = ("--ttft", "20", "--tpot", "5")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("bench")) as running:
        yield running


@pytest.fixture(scope="module")
def slower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Steps of 10 ms for two requests at a time: of twelve tokens, it serves some sixteen a second."""
    engine = FAST.model_copy(update={"step_s": 0.01, "max_num_seqs": 2})
    with cluster_of(tmp_path_factory.mktemp("slower"), engine=engine) as running:
        yield running


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(arguments), **_QUIET, timeout=WAIT_S, check=False)


def started(*arguments: object) -> subprocess.Popen[str]:
    """Ctrl-C reaches it even where these tests run in the background, which has it ignored."""
    return subprocess.Popen(_command(arguments), **_QUIET, preexec_fn=_heed_ctrl_c)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _command(arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", "splitserve", "bench", *map(str, arguments)]


_QUIET: dict[str, Any] = {
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.PIPE,
    "text": True,
    "env": {**os.environ, "COLUMNS": "200"},
}


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_one_rate_is_measured_saved_and_shown(cluster: Cluster, tmp_path: Path) -> None:
    files = {"--out": tmp_path / "run.jsonl", "--plot": tmp_path / "run.svg", "--report": tmp_path / "run.html"}
    options = [word for option, file in files.items() for word in (option, file)]
    done = bench("run", "--target", cluster.address, *SMALL, *LOOSE, "--rate", 20, "--requests", 40, *options)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert f"{cluster.address} at 20 requests/s of {SMALL[1]}: 100.0% (95% interval " in shown
    assert "of 40 requests within TTFT 20,000 ms and TPOT 5,000 ms, at least the 90% asked for" in shown
    assert "VALID: the load generator kept its schedule" in shown
    run, facts = load(files["--out"])
    assert (len(run), facts["target"], facts["about"]["model"]) == (40, f"grpc://{cluster.address}", "demo")
    assert run.tokens.tolist() == run.asked_tokens.tolist()
    assert "<svg" in files["--plot"].read_text()
    assert cluster.address in files["--report"].read_text()


def test_the_warm_up_is_sent_and_not_judged(cluster: Cluster) -> None:
    options = (*SMALL[:2], "--late", "5", *LOOSE, "--rate", 20, "--requests", 20, "--warm-up", "1s", "--json")
    (run,) = told(bench("run", "--target", cluster.address, *options))["systems"][0]["runs"]
    assert run["warm_up_requests"] > 0
    assert run["requests"] + run["warm_up_requests"] == 40
    assert run["attainment"]["value"] == 1.0


def test_a_sweep_goes_on_from_what_it_has_saved(cluster: Cluster, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    options = ("sweep", "--target", f"sim={cluster.address}", *SMALL, *LOOSE, "--requests", 30, "--seeds", 1)
    first = told(bench(*options, "--rates", "20,30", "--out", runs, "--json"))
    assert [run["rate_rps"] for run in first["systems"][0]["runs"]] == [20, 30]
    assert {file.name for file in runs.iterdir()} == {"sim-20-0.jsonl", "sim-30-0.jsonl"}
    before = {file.name: file.read_bytes() for file in runs.iterdir()}
    again = bench(*options, "--rates", "20,30,40", "--out", runs, "--json")
    assert again.stderr.count("requests met the objectives") == 1
    assert [run["rate_rps"] for run in told(again)["systems"][0]["runs"]] == [20, 30, 40]
    assert all((runs / name).read_bytes() == text for name, text in before.items())
    assert told(again)["systems"][0]["goodput"]["at_least"]
    other = bench(*options[:3], "--workload", "prompt=9,output=9", "--out", runs)
    assert other.returncode == 2
    assert f"--out: {runs} has runs of sim with --workload " in other.stderr


def test_a_sweep_finds_where_the_objectives_are_just_met(slower: Cluster, tmp_path: Path) -> None:
    objectives = ("--ttft", "400ms", "--tpot", "5")
    options = (*SMALL, *objectives, "--start", 10, "--step", "0.9", "--seeds", 1, "--requests", 40)
    done = bench("sweep", "--target", slower.address, *options, "--out", tmp_path / "runs", "--json")
    (system,) = told(done)["systems"]
    rates = [run["rate_rps"] for run in system["runs"]]
    shares = [run["attainment"]["value"] for run in system["runs"]]
    assert len(rates) >= 2
    assert min(shares) < 0.9 <= max(shares)
    assert not system["goodput"]["at_least"]
    assert min(rates) <= system["goodput"]["rps"] <= max(rates)


def test_two_targets_take_turns_with_the_same_requests(cluster: Cluster, slower: Cluster, tmp_path: Path) -> None:
    targets = (f"fast={cluster.address}", f"slow={slower.address}")
    options = (*SMALL, *LOOSE, "--rates", "10,15", "--seeds", 1, "--requests", 30)
    page = tmp_path / "a.html"
    done = bench("compare", *targets, *options, "--out", tmp_path / "runs", "--report", page, "--json")
    said = told(done)
    assert [system["name"] for system in said["systems"]] == ["fast", "slow"]
    assert [line.split()[1] for line in done.stderr.splitlines() if "met the objectives" in line] == [
        "fast:",
        "slow:",
        "slow:",
        "fast:",
    ]
    for rate in said["pairs"][0]["rates"]:
        tpot = next(each for each in rate["quotients"] if (each["what"], each["quantile"]) == ("TPOT", 0.5))
        assert tpot["high"] < 1.0
    again = told(bench("report", tmp_path / "runs", "--tpot", "8ms", "--json"))
    fast, slow = (system["runs"][0]["within"]["TPOT"] for system in again["systems"])
    assert slow < fast
    assert "fast beside slow" in page.read_text()


def test_the_openai_address_of_up_is_a_target_too(tmp_path: Path) -> None:
    with up(tmp_path) as (_, serving):
        options = (*SMALL, *LOOSE, "--rate", 20, "--requests", 20, "--json")
        (run,) = told(bench("run", "--target", serving["http"], *options))["systems"][0]["runs"]
    assert (run["done"], run["facts"]["target"]) == (20, f"{serving['http']}/v1")


def test_a_target_that_is_not_there_is_named() -> None:
    done = bench("run", "--target", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("grpc://127.0.0.1:1: no router answers there; start one with `splitserve up`")
    assert "Traceback" not in done.stderr


async def test_ctrl_c_ends_it_and_leaves_nothing_running(cluster: Cluster, tmp_path: Path) -> None:
    load_ = ("--workload", "prompt=20,output=2000", "--rate", 5, "--requests", 300, "--late", "5")
    running = started("run", "--target", cluster.address, *load_, "--out", tmp_path / "run.jsonl")
    try:
        async with AsyncClient(cluster.address) as client:
            await eventually(lambda: _runs(client), "requests that run")
            running.send_signal(signal.SIGINT)
            _, errors = await asyncio.to_thread(running.communicate, timeout=WAIT_S)
            await settled(client, 2)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "run.jsonl").exists()


async def test_a_sweep_that_is_stopped_keeps_what_it_has_finished(cluster: Cluster, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    options = (*SMALL, *LOOSE, "--requests", 30, "--rates", "30,0.2", "--seeds", 1, "--out", runs)
    running = started("sweep", "--target", f"sim={cluster.address}", *options)
    try:
        await eventually(lambda: _exists(runs / "sim-30-0.jsonl"), "the first run")
        running.send_signal(signal.SIGINT)
        _, errors = await asyncio.to_thread(running.communicate, timeout=WAIT_S)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130
    assert errors.strip().endswith(f"stopped; {runs} has the finished runs, and the same command goes on from there")
    assert [file.name for file in await asyncio.to_thread(sorted, runs.iterdir())] == ["sim-30-0.jsonl"]


async def _exists(file: Path) -> bool:
    return await asyncio.to_thread(file.exists)


async def _runs(client: AsyncClient) -> bool:
    return (await client.fleet()).running_requests > 3


async def test_a_cluster_that_dies_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    load_ = ("--workload", "prompt=20,output=500", "--rate", 20, "--requests", 5000, "--late", "5", "--warm-up", "0")
    with cluster_of(tmp_path) as cluster:
        running = started("run", "--target", cluster.address, *load_, "--out", tmp_path / "run.jsonl")
        try:
            async with AsyncClient(cluster.address) as client:
                await eventually(lambda: _runs(client), "requests that run")
            cluster.router.signal(signal.SIGKILL)
            output, errors = await asyncio.to_thread(running.communicate, timeout=WAIT_S)
        finally:
            running.kill()
            running.communicate()
    assert running.returncode == 1
    assert output == ""
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"grpc://{cluster.address} has stopped answering: no token came for ")
    assert "Traceback" not in errors
