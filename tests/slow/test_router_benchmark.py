"""`python -m benchmarks.router` from end to end, small and without the peers, which would have to be installed."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--without-peers", "--quick", "--rounds", "1", "--burst", "1", "--paced", "1", "--held", "50")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_our_rows_are_measured_and_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.router", *SMALL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "splitserve gRPC" in done.stdout
    assert "at 50" in done.stdout


async def test_an_interrupted_run_leaves_no_process_behind() -> None:
    run = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.router", *SMALL, "--paced", "1000"),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    started: set[int] = set()
    async with asyncio.timeout(120):
        while not any("benchmarks.router.load" in command(pid) for pid in started):
            await asyncio.sleep(0.05)
            started = set(descendants(run.pid))
    run.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(run.wait(), 60) == 130
    assert [command(pid) for pid in started if command(pid)] == []


def descendants(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for each in children.read_text().split():
            found += [int(each), *descendants(int(each))]
    return found


def command(pid: int) -> str:
    """Empty for one that is gone, or dead."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""
