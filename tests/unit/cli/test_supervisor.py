"""The supervisor, with real processes that play a part instead of serving."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from splitserve.cli.local import ProcessPlan
from splitserve.cli.supervisor import Ended, Event, Ready, Started, StartFailed, Supervisor
from splitserve.core.config import RouterConfig
from splitserve.core.errors import ConfigError

WAIT_S = 20.0

# Takes the supervisor's command line, and does what its environment says.
PLAYER = """
import argparse, json, os, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("role")
for option in ("--config", "--ready-fd", "--parent"):
    parser.add_argument(option)
given = parser.parse_args()
part = os.environ["PART"]
if part == "refuse":
    print("noise\\nlisten: the port is taken", file=sys.stderr)
    sys.exit(2)
if part == "crash":
    1 / 0
if part == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if part == "polite":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
if part != "mute":
    with os.fdopen(int(given.ready_fd), "w") as pipe:
        print(json.dumps({"address": open(given.config).readline().strip()}), file=pipe)
if part == "drained":
    sys.exit(0)
while True:
    signal.pause()
"""


class Record:
    """Every event, and a way to wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Condition()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, kind: type[Event], count: int = 1) -> Event:
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(lambda: len(self.of(kind)) >= count)
        return self.of(kind)[count - 1]

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def record() -> Record:
    return Record()


@asynccontextmanager
async def supervising(directory: Path, record: Record, restart: bool = True) -> AsyncIterator[Supervisor]:
    script = directory / "player.py"
    script.write_text(PLAYER)
    async with Supervisor(directory, record, restart, (sys.executable, str(script))) as supervisor:
        yield supervisor


def plan(part: str, name: str = "one", role: str = "router") -> ProcessPlan:
    return ProcessPlan(role, name, RouterConfig(), {"PART": part})


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_what_a_process_says_of_itself_is_heard(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("stay"))
        ready = await supervisor.ready("one", WAIT_S)
    assert ready.facts == {"address": "api_keys: null"}  # the first line of its configuration
    assert [type(event) for event in record.events] == [Started, Ready, Ended]


async def test_a_terminals_ctrl_c_reaches_the_supervisor_alone_yet_all_share_its_session(
    tmp_path: Path, record: Record
) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("stay"))
        pid = (await supervisor.ready("one", WAIT_S)).pid
        assert os.getpgid(pid) == pid
        assert os.getsid(pid) == os.getsid(0)


async def test_nothing_that_was_started_outlives_the_supervisor(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        for name in ("one", "two"):
            supervisor.start(plan("stubborn", name))
            await supervisor.ready(name, WAIT_S)
    assert [alive(event.pid) for event in record.of(Started)] == [False, False]


async def test_a_process_that_dies_is_started_again(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("stay"))
        first = await supervisor.ready("one", WAIT_S)
        os.kill(first.pid, signal.SIGKILL)
        again = await record.until(Ready, 2)
    ended = record.of(Ended)[0]
    assert isinstance(ended, Ended)
    assert (ended.how, ended.restart_in_s) == ("SIGKILL", 0.5)
    assert again.pid != first.pid


async def test_a_process_that_dies_again_waits_longer(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("stay"))
        for life in (1, 2):
            os.kill((await record.until(Ready, life)).pid, signal.SIGKILL)
        await record.until(Ended, 2)
    assert [event.restart_in_s for event in record.of(Ended)[:2] if isinstance(event, Ended)] == [0.5, 1.0]


async def test_a_process_that_drained_is_not_started_again(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("drained"))
        ended = await record.until(Ended)
    assert isinstance(ended, Ended)
    assert (ended.code, ended.restart_in_s) == (0, None)


async def test_restart_can_be_turned_off(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record, restart=False) as supervisor:
        supervisor.start(plan("stay"))
        os.kill((await supervisor.ready("one", WAIT_S)).pid, signal.SIGKILL)
        ended = await record.until(Ended)
    assert isinstance(ended, Ended)
    assert ended.restart_in_s is None


async def test_a_refused_configuration_is_told_in_its_own_words(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("refuse"))
        with pytest.raises(ConfigError) as refused:
            await supervisor.ready("one", WAIT_S)
    assert str(refused.value) == "one: listen: the port is taken"
    assert len(record.of(Started)) == 1


async def test_a_process_that_crashes_at_its_start_shows_the_end_of_its_log(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("crash"))
        with pytest.raises(StartFailed, match=r"(?s)one could not start \(exit code 1\).*ZeroDivisionError"):
            await supervisor.ready("one", WAIT_S)


async def test_a_process_that_never_says_it_is_ready_is_given_up(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("mute"))
        with pytest.raises(StartFailed, match="one was not ready after"):
            await supervisor.ready("one", 0.2)


async def test_draining_ends_one_role_and_leaves_the_other(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("polite", "one", "router"))
        supervisor.start(plan("polite", "two", "worker"))
        router, worker = await supervisor.ready("one", WAIT_S), await supervisor.ready("two", WAIT_S)
        await supervisor.drain("router", WAIT_S)
        assert (alive(router.pid), alive(worker.pid)) == (False, True)
        await supervisor.drain("worker", WAIT_S)
    assert [event.code for event in record.of(Ended) if isinstance(event, Ended)] == [0, 0]


async def test_draining_kills_what_will_not_end(tmp_path: Path, record: Record) -> None:
    async with supervising(tmp_path, record) as supervisor:
        supervisor.start(plan("stubborn"))
        await supervisor.ready("one", WAIT_S)
        await supervisor.drain("router", 0.1)
        ended = await record.until(Ended)
    assert isinstance(ended, Ended)
    assert ended.how == "SIGKILL"
