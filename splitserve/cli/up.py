"""`splitserve up`: a router and workers on this machine until Ctrl-C, told to a person or (--json) to a program."""

import asyncio
import contextlib
import json
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from splitserve.cli.cluster import Member, RunningCluster, running
from splitserve.cli.process import stop_signals
from splitserve.cli.supervisor import Ended, Event, Ready, Started
from splitserve.core.config import ClusterConfig, WorkerConfig
from splitserve.view.table import table


class Voice(Protocol):
    """Who is told what happens."""

    def on_event(self, event: Event) -> None:
        """A process started, became ready or ended."""

    def starting(self) -> contextlib.AbstractContextManager[object]:
        """Until the cluster is ready."""

    def ready(self, cluster: RunningCluster, directory: Path) -> None: ...

    def draining(self, drain_s: float) -> None: ...


async def up(cluster: ClusterConfig, source: str, directory: Path, drain_s: float, voice: Voice) -> None:
    """Returns after the first SIGINT or SIGTERM, drained. Raises StartFailed or ConfigError."""
    starting = asyncio.current_task()
    assert starting is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, starting.cancel)
    async with told(cluster, source, directory, drain_s, voice) as cluster_up:
        stop = stop_signals()
        voice.ready(cluster_up, directory)
        await stop.wait()
        voice.draining(drain_s)


@contextlib.asynccontextmanager
async def told(
    cluster: ClusterConfig, source: str, directory: Path, drain_s: float, voice: Voice
) -> AsyncIterator[RunningCluster]:
    """A running cluster, with its start shown."""
    with contextlib.ExitStack() as until_ready:
        until_ready.enter_context(voice.starting())
        async with running(cluster, source, directory, voice.on_event, drain_s) as cluster_up:
            until_ready.close()
            yield cluster_up


@contextlib.contextmanager
def run_directory(chosen: Path | None) -> Iterator[Path]:
    """Where configurations and logs go: a private temporary directory, unless one was chosen, which is kept."""
    if chosen is not None:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="splitserve-") as temporary:
        yield Path(temporary)


class JsonVoice:
    """One JSON object a line on stdout."""

    def on_event(self, event: Event) -> None:
        self._say(type(event).__name__.lower(), **asdict(event))

    def starting(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def ready(self, cluster: RunningCluster, directory: Path) -> None:
        members = [_row(member) for member in cluster.members]
        self._say(
            "serving",
            address=cluster.address,
            http=cluster.http,
            console=cluster.console,
            directory=str(directory),
            processes=members,
        )

    def draining(self, drain_s: float) -> None:
        self._say("draining", drain_s=drain_s)

    def _say(self, event: str, **facts: object) -> None:
        print(json.dumps({"event": event, **facts}), flush=True)


class ConsoleVoice:
    """A spinner that says what is waited for, then a table, then only what goes wrong."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._waiting: dict[str, None] = {}
        self._ended: set[str] = set()
        self._serving = False

    def on_event(self, event: Event) -> None:
        match event:
            case Started():
                self._waiting[event.name] = None
            case Ready():
                self._waiting.pop(event.name, None)
                self._say_back(event)
            case Ended():
                self._waiting.pop(event.name, None)
                self._say_ended(event)
        if not self._serving and not self._console.is_terminal:
            self._say_line(event)
        names = ", ".join(self._waiting) or "workers"
        self._status.update(f"waiting for {names} (a worker imports its engine, loads the model and warms up)")

    def starting(self) -> contextlib.AbstractContextManager[object]:
        return self._status

    def ready(self, cluster: RunningCluster, directory: Path) -> None:
        self._serving = True
        self._console.print(process_table(cluster))
        and_http = f" (gRPC) and [bold]{cluster.http}[/bold] (OpenAI)" if cluster.http else ""
        self._console.print(f"Serving on [bold]{cluster.address}[/bold]{and_http}. Try, in another terminal:")
        at = "" if cluster.address == "127.0.0.1:50051" else f" --router {cluster.address}"
        example = f'  splitserve generate "It is a truth universally acknowledged,"{at}'
        self._console.print(example, highlight=False, soft_wrap=True)
        if cluster.http:
            body = '{"messages": [{"role": "user", "content": "Who is Emma?"}], "max_tokens": 40}'
            curl = f"  curl {cluster.http}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
            self._console.print(curl, highlight=False, markup=False, soft_wrap=True)
        if cluster.console:
            self._console.print(
                f"To look at it: {cluster.console}, or splitserve top{at}", highlight=False, soft_wrap=True
            )
        self._console.print(f"Logs: {directory}. Ctrl-C drains and stops.", highlight=False)

    def draining(self, drain_s: float) -> None:
        self._console.print(f"Draining: finishing requests, at most {drain_s:.0f} s. Ctrl-C again stops at once.")

    def _say_line(self, event: Event) -> None:
        """Progress where no spinner can turn."""
        if isinstance(event, Started | Ready):
            self._console.print(
                f"{event.name}: {'starting' if isinstance(event, Started) else 'ready'}", highlight=False
            )

    def _say_back(self, event: Ready) -> None:
        if event.name in self._ended:
            self._ended.discard(event.name)
            self._console.print(f"[green]{event.name} is back[/green] (pid {event.pid})")

    def _say_ended(self, event: Ended) -> None:
        if not self._serving:
            return  # a failed start is told as an error, with its reason
        if event.restart_in_s is None:
            self._console.print(f"{event.name} ended ({event.how})", style="dim", highlight=False)
            return
        self._ended.add(event.name)
        again = f"starting it again in {event.restart_in_s:g} s"
        self._console.print(f"[yellow]{event.name} (pid {event.pid}) died: {escape(event.how)}; {again}[/yellow]")


def process_table(cluster: RunningCluster) -> Table:
    rows = [_row(member) for member in cluster.members]
    return table(
        tuple(rows[0]), (), (["-" if cell in (None, "") else str(cell) for cell in row.values()] for row in rows)
    )


def _row(member: Member) -> dict[str, object]:
    config = member.plan.config
    return {
        "role": str(config.pool) if isinstance(config, WorkerConfig) else "router",
        "name": member.plan.name,
        "pid": member.ready.pid,
        "address": member.ready.facts.get("address"),
        "metrics": member.ready.facts.get("metrics"),
        "core": config.cpu_core if isinstance(config, WorkerConfig) else None,
    }
