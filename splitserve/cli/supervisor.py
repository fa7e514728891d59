"""Keeps the processes of one local cluster running: starts, restarts with back-off, drains, kills.

One asyncio task per process, all in the supervisor's task group. What happens is told as events, in order; showing
them is the caller's. For `splitserve up` and `demo` on one machine: elsewhere this is Kubernetes' work.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import yaml

from splitserve.cli.local import ProcessPlan
from splitserve.core.errors import ConfigError

_FIRST_BACK_OFF_S = 0.5
_LONGEST_BACK_OFF_S = 30.0
_STEADY_AFTER_S = 60.0  # a process that lived so long starts again with the first back-off
_TAIL_LINES = 12
_SPLITSERVE = (sys.executable, "-m", "splitserve")
_BAD_CONFIG = 2  # exit code of a process whose configuration is at fault


class StartFailed(Exception):
    """A process ended, or said nothing, before it was ready for the first time."""


@dataclass(frozen=True, slots=True)
class Started:
    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    """`facts` is what the process said of itself: addresses, names."""

    name: str
    pid: int
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Ended:
    """`code` as in subprocess: negative for a signal. `restart_in_s` is None if it is not started again."""

    name: str
    pid: int
    code: int
    restart_in_s: float | None

    @property
    def how(self) -> str:
        return _how(self.code)


Event = Started | Ready | Ended
OnEvent = Callable[[Event], None]


class Supervisor:
    """Use as `async with Supervisor(...) as supervisor`; on leaving nothing it started is alive."""

    def __init__(
        self, directory: Path, on_event: OnEvent, restart: bool = True, program: Sequence[str] = _SPLITSERVE
    ) -> None:
        """`directory` (private, existing) takes one YAML and one log per process."""
        self._program = program
        self._directory = directory
        self._on_event = on_event
        self._restart = restart
        self._children: dict[str, _Child] = {}
        self._stopping = asyncio.Event()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.kill()
        await self._tasks.__aexit__(None, None, None)

    def start(self, plan: ProcessPlan) -> None:
        """Starts a process and keeps it running until `drain` or `kill`."""
        self.configure(plan)
        child = _Child(plan, self._directory / f"{plan.name}.log", asyncio.get_running_loop().create_future())
        child.task = self._tasks.create_task(self._keep(child), name=plan.name)
        self._children[plan.name] = child

    def configure(self, plan: ProcessPlan) -> None:
        """Writes what the process reads when it is next started."""
        self._config(plan).write_text(yaml.safe_dump(plan.config.model_dump(mode="json")))

    async def ready(self, name: str, timeout_s: float) -> Ready:
        """What the process said when it became ready for the first time. Raises StartFailed, or ConfigError if its
        configuration is at fault."""
        child = self._children[name]
        try:
            return await asyncio.wait_for(asyncio.shield(child.ready), timeout_s)
        except TimeoutError:
            raise StartFailed(
                f"{name} was not ready after {timeout_s:.0f} s; {child.log} ends:\n{child.tail()}"
            ) from None

    async def drain(self, role: str, timeout_s: float) -> None:
        """SIGTERM to every process of a role; returns when they have ended, killed after `timeout_s` if need be. From
        then on nothing is started again."""
        self._stopping.set()
        children = [child for child in self._children.values() if child.plan.role == role]
        for child in children:
            child.signal(signal.SIGTERM)
        if children:
            await asyncio.wait([child.task for child in children if child.task is not None], timeout=timeout_s)
        for child in children:
            child.signal(signal.SIGKILL)

    def kill(self) -> None:
        """Ends everything at once."""
        self._stopping.set()
        for child in self._children.values():
            child.signal(signal.SIGKILL)

    def _config(self, plan: ProcessPlan) -> Path:
        return self._directory / f"{plan.name}.yaml"

    async def _keep(self, child: "_Child") -> None:
        back_off_s = _FIRST_BACK_OFF_S
        while not self._stopping.is_set():
            began = time.monotonic()
            pid, code = await self._run_once(child)
            again = self._goes_on(child, code)
            back_off_s = _FIRST_BACK_OFF_S if time.monotonic() - began > _STEADY_AFTER_S else back_off_s
            self._on_event(Ended(child.plan.name, pid, code, back_off_s if again else None))
            if not again:
                return
            await self._pause(back_off_s)
            back_off_s = min(2 * back_off_s, _LONGEST_BACK_OFF_S)

    def _goes_on(self, child: "_Child", code: int) -> bool:
        """Whether a process that ended is started again: not one that drained, and not one that never came up."""
        if not child.ready.done():
            child.fail(code)
            return False
        return self._restart and not self._stopping.is_set() and code != 0

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _run_once(self, child: "_Child") -> tuple[int, int]:
        """One life of the process: its pid and exit code."""
        reader, writer = os.pipe()
        with child.log.open("ab") as log, os.fdopen(reader, "rb") as ready_pipe:
            try:
                process = await self._spawn(child.plan, log, writer)
            finally:
                os.close(writer)
            with child.running(process):
                self._on_event(Started(child.plan.name, process.pid))
                return process.pid, await self._until_ended(child, process, ready_pipe)

    async def _spawn(self, plan: ProcessPlan, log: IO[bytes], ready_fd: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(*self._program, plan.role, "--config", str(self._config(plan))),
            *("--ready-fd", str(ready_fd), "--parent", str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(ready_fd,),
            env={**os.environ, **plan.environment},
            # A group of its own, so that a terminal's Ctrl-C reaches us alone, and we drain in order. Not a session:
            # Linux shares cores out by session (autogroup), and a worker's engine on one core would take from its own
            # threads on another, which then stand still for as long as a neighbour's prefill takes there.
            process_group=0,
        )

    async def _until_ended(self, child: "_Child", process: asyncio.subprocess.Process, ready_pipe: IO[bytes]) -> int:
        async with asyncio.TaskGroup() as tasks:
            listening = tasks.create_task(self._listen(child, process.pid, ready_pipe))
            if self._stopping.is_set():
                child.signal(signal.SIGKILL)
            code = await process.wait()
            listening.cancel()
        return code

    async def _listen(self, child: "_Child", pid: int, ready_pipe: IO[bytes]) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, ready_pipe)
        with contextlib.closing(transport):
            line = await reader.readline()
        if line:
            ready = Ready(child.plan.name, pid, json.loads(line))
            self._on_event(ready)
            if not child.ready.done():
                child.ready.set_result(ready)


@dataclass(slots=True)
class _Child:
    """One planned process, and whatever currently runs for it."""

    plan: ProcessPlan
    log: Path
    ready: asyncio.Future[Ready]
    task: asyncio.Task[None] | None = None
    pid: int | None = None

    @contextlib.contextmanager
    def running(self, process: asyncio.subprocess.Process) -> Iterator[None]:
        self.pid = process.pid
        try:
            yield
        finally:
            self.pid = None

    def signal(self, number: int) -> None:
        """To the process and whatever it started: each is a session of its own."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def fail(self, code: int) -> None:
        """It never became ready. What is wrong with a configuration is the last line, and says it all."""
        if code == _BAD_CONFIG:
            self.ready.set_exception(ConfigError(self.plan.name, self.tail(1)))
        else:
            self.ready.set_exception(StartFailed(f"{self.plan.name} could not start ({_how(code)}):\n{self.tail()}"))
        self.ready.exception()  # whoever waits gets it; if nobody does, that is no bug to log

    def tail(self, lines: int = _TAIL_LINES) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
