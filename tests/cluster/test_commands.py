"""The commands, end to end: `up` and what it promises of its processes, and those that talk to it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from splitserve.client import AsyncClient
from tests.cluster.asking import ask, eventually, greedy, prompt_of, settled

WAIT_S = 60
UP = ("up", "--engine", "sim", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--json")


class Up:
    """`splitserve up --json`, and the events it told."""

    def __init__(self, run_directory: Path, *options: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "splitserve", *UP, "--run-dir", str(run_directory), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.events: list[dict[str, Any]] = []

    def until(self, event: str, **facts: object) -> dict[str, Any]:
        """Reads events up to the one of this kind with these facts."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.events.append(json.loads(line))
            told = self.events[-1]
            if told["event"] == event and facts.items() <= told.items():
                return told
        raise AssertionError(f"up ended without {event} {facts}; it told {self.events}")

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.communicate(timeout=WAIT_S)


@contextmanager
def up(directory: Path, *options: str) -> Iterator[tuple[Up, dict[str, Any]]]:
    started = Up(directory, *options)
    try:
        yield started, started.until("serving")
    finally:
        started.close()


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Up, dict[str, Any]]]:
    with up(tmp_path_factory.mktemp("up"), "--prefill", "1", "--decode", "2") as both:
        yield both


@pytest.fixture
async def address(serving: tuple[Up, dict[str, Any]]) -> AsyncIterator[str]:
    told = serving[1]["address"]
    yield told
    async with AsyncClient(told) as client:
        await settled(client, 3)


def splitserve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "splitserve", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        env={**os.environ, **environment},
    )


def alive(pid: int) -> bool:
    """A zombie that nobody has reaped yet is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def gone(pids: list[int]) -> None:
    async def check() -> bool:
        return not any(map(alive, pids))

    await eventually(check, f"the end of {pids}")


def test_up_names_the_console(serving: tuple[Up, dict[str, Any]]) -> None:
    with urllib.request.urlopen(serving[1]["console"], timeout=WAIT_S) as page:
        assert page.status == 200


def test_up_tells_every_process_it_started(serving: tuple[Up, dict[str, Any]]) -> None:
    processes = serving[1]["processes"]
    assert [process["name"] for process in processes] == ["router", "prefill-0", "decode-0", "decode-1"]
    assert all(alive(process["pid"]) for process in processes)
    assert len({process["metrics"] for process in processes}) == 4


def test_generate_streams_text_and_prints_timings_beside_it(address: str) -> None:
    done = splitserve("generate", "It is a truth", "--router", address, "--max-tokens", "8", "--temperature", "0")
    assert done.returncode == 0
    assert len(done.stdout.strip()) > 8
    for word in ("5 prompt + 8 output tokens, length", "TTFT", "TPOT", "prefill-0 → decode-"):
        assert word in done.stderr


def test_generate_as_json_is_one_object_a_chunk(address: str) -> None:
    done = splitserve(
        "generate", "--chat", "Who?", "--system", "Brief.", "--router", address, "--max-tokens=5", "--json"
    )
    chunks = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(len(chunk["token_ids"]) for chunk in chunks) == chunks[-1]["usage"]["output_tokens"]
    assert chunks[-1]["finish_reason"] in ("length", "stop")


def test_generate_reads_a_file(address: str, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Emma Woodhouse, handsome, clever, and rich,")
    arguments = ("generate", "--file", str(tmp_path / "prompt.txt"), "--max-tokens", "2", "--router", address)
    assert "prompt + 2 output tokens" in splitserve(*arguments).stderr


def test_a_refused_request_is_one_sentence_with_the_field(address: str) -> None:
    done = splitserve("generate", "x", "--top-p", "7", "--router", address)
    assert done.returncode == 1
    assert done.stderr.strip() == "sampling.top_p: 7.0 must be above 0 and at most 1"


def test_status_shows_every_worker(address: str) -> None:
    shown = splitserve("status", "--router", address).stdout
    told = json.loads(splitserve("status", "--router", address, "--json").stdout)
    names = {"prefill-0", "decode-0", "decode-1"}
    assert {worker["worker"]["name"] for worker in told["workers"]} == names
    assert all(name in shown for name in names)


def test_pool_moves_a_worker(address: str) -> None:
    assert "decode-1 is in the prefill pool" in splitserve("pool", "decode-1", "prefill", "--router", address).stdout
    moved = json.loads(splitserve("pool", "decode-1", "decode", "--router", address, "--json").stdout)
    assert moved == {"worker": "decode-1", "pool": "decode"}


@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "router"])
async def test_what_dies_is_started_again_and_serves(
    serving: tuple[Up, dict[str, Any]], address: str, name: str
) -> None:
    process, told = serving
    started = [event for event in (*told["processes"], *process.events) if event.get("name") == name and "pid" in event]
    os.kill(started[-1]["pid"], signal.SIGKILL)
    ended = await asyncio.to_thread(process.until, "ended", name=name)
    assert ended["code"] == -signal.SIGKILL
    assert ended["restart_in_s"] > 0
    await asyncio.to_thread(process.until, "ready", name=name)
    async with AsyncClient(address) as client:
        await settled(client, 3)
        assert len((await ask(client, prompt_of(50))).token_ids) == 32


async def test_a_drained_worker_stays_away(tmp_path: Path) -> None:
    with up(tmp_path, "--decode", "2") as (process, told):
        drained = await asyncio.to_thread(splitserve, "drain", "decode-1", "--router", told["address"], "--json")
        assert json.loads(drained.stdout) == {"worker": "decode-1", "finished_requests": 0, "migrated_requests": 0}
        ended = await asyncio.to_thread(process.until, "ended", name="decode-1")
        assert (ended["code"], ended["restart_in_s"]) == (0, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_stopping_lets_requests_end_and_leaves_no_process(tmp_path: Path, number: int) -> None:
    with up(tmp_path) as (process, told):
        enough = asyncio.Event()
        async with AsyncClient(told["address"]) as client:
            running = asyncio.create_task(ask(client, prompt_of(100), greedy(150), lambda tokens: enough.set()))
            await enough.wait()
            process.popen.send_signal(number)
            assert len((await running).token_ids) == 150
        assert await asyncio.to_thread(process.popen.wait, WAIT_S) == 0
        assert not any(alive(member["pid"]) for member in told["processes"])


async def test_nothing_outlives_up_however_it_ends(tmp_path: Path) -> None:
    with up(tmp_path) as (process, told):
        process.popen.kill()
        await gone([member["pid"] for member in told["processes"]])


async def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with up(tmp_path) as (process, told):
        async with AsyncClient(told["address"]) as client:
            running = asyncio.create_task(ask(client, prompt_of(10), greedy(8000), deadline_s=60))
            running.add_done_callback(lambda task: task.cancelled() or task.exception())
            await eventually(lambda: _runs(client), "a request that runs")
            process.popen.send_signal(signal.SIGINT)
            await asyncio.to_thread(process.until, "draining")
            process.popen.send_signal(signal.SIGINT)
            await asyncio.to_thread(process.popen.wait, WAIT_S)
            await asyncio.gather(running, return_exceptions=True)
        await gone([member["pid"] for member in told["processes"]])


async def _runs(client: AsyncClient) -> bool:
    return (await client.fleet()).running_requests > 0


def test_up_says_in_one_sentence_that_its_port_is_taken(serving: tuple[Up, dict[str, Any]]) -> None:
    address = serving[1]["address"]
    done = splitserve("up", "--engine", "sim", "--listen", address, "--http", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    assert done.returncode == 2
    assert f"listen (--listen): {address}: can't listen here: the port is in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_is_exact_without_importing_torch(tmp_path: Path) -> None:
    for heavy in ("torch", "vllm", "nixl"):
        (tmp_path / f"{heavy}.py").write_text("raise RuntimeError('the light install has none')")
    done = splitserve("demo", "--engine", "sim", "--max-tokens", "16", "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["differing"] == []
    assert len(told["requests"]) >= 5
    assert all(request["last"]["timings"]["kv_bytes"] > 0 for request in told["requests"])
    assert "token-exact: 6/6" in done.stderr
