"""Processes of a run: starting, asking the kernel what they use, ending. Whatever was started is ended by its pid."""

import asyncio
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_POLL_S = 0.05
_PROBE_TIMEOUT_S = 1.0


class Failed(Exception):
    """A process ended or did not become ready; the sentence ends with what it said."""


def cpu_s(pid: int) -> float:
    """CPU time, user and system, of a process with its threads and descendants; resolution one tick (10 ms)."""
    return sum(cpu_ticks(Path(f"/proc/{each}/stat").read_text()) for each in tree(pid)) / _TICKS_PER_S


def cpu_ticks(stat: str) -> int:
    """utime, stime and those of children that have ended, from the text of /proc/PID/stat (proc(5)); the name in its
    parentheses may hold anything."""
    after_name = stat.rpartition(")")[2].split()
    return sum(int(ticks) for ticks in after_name[11:15])


def cpu_s_by_thread(pid: int) -> dict[str, float]:
    """CPU time of a process's live threads so far: of its first, and of the others by name."""
    spent: dict[str, float] = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        name, stat = (thread / "comm").read_text().strip(), (thread / "stat").read_text()
        name = "(main thread)" if thread.name == str(pid) else name
        spent[name] = spent.get(name, 0.0) + cpu_ticks(stat) / _TICKS_PER_S
    return spent


def rss_mib(pid: int) -> float:
    """Resident memory of a process and its descendants; what they share counts for each."""
    return sum(rss_kib(Path(f"/proc/{each}/status").read_text()) for each in tree(pid)) / 1024


def rss_kib(status: str) -> int:
    """VmRSS from the text of /proc/PID/status; 0 for one that has ended."""
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")), 0)


def tree(pid: int) -> Iterator[int]:
    """The process and its live descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from tree(int(child))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tethered(command: Sequence[str]) -> tuple[str, ...]:
    """The command as one that ends with this process even if that is killed."""
    program = "import os, sys; from splitserve.cli.process import end_with_parent as end; end(int(sys.argv[1])); "
    return (sys.executable, "-c", program + "os.execv(sys.argv[2], sys.argv[2:])", str(os.getpid()), *command)


@asynccontextmanager
async def child(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process with its stdin and stdout as pipes and stderr in `log`; killed on leaving, with what it started."""
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that Ctrl-C reaches us alone, and we end it
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


@asynccontextmanager
async def daemon(command: Sequence[str], log: Path) -> AsyncIterator[int]:
    """A process that only writes to its log, stdout too; yields its pid. Killed on leaving, with what it started."""
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *tethered(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def line(process: asyncio.subprocess.Process, log: Path, within_s: float) -> str:
    """The next line that it says. Raises Failed."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(within_s):
            said = await process.stdout.readline()
    except TimeoutError as error:
        raise Failed(f"nothing came from it for {within_s:g} s; {log} ends:\n{tail(log)}") from error
    if not said:
        raise Failed(f"it ended; {log} ends:\n{tail(log)}")
    return said.decode()


async def answers(url: str, log: Path, within_s: float) -> None:
    """Waits until a GET is answered with 200. Raises Failed."""
    try:
        async with asyncio.timeout(within_s):
            while not await asyncio.to_thread(_answers, url):  # noqa: ASYNC110 - no event tells of another process's state
                await asyncio.sleep(_POLL_S)
    except TimeoutError as error:
        raise Failed(f"{url} did not answer within {within_s:g} s; {log} ends:\n{tail(log)}") from error


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
