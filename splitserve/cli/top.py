"""`splitserve top`: what a router's fleet does now, once a second; the console of a terminal."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import typer

from splitserve.cli.live import plain, show_live
from splitserve.cli.talk import (
    DEFAULT_ROUTER,
    ApiKey,
    AsJson,
    CaFile,
    CertificateFile,
    KeyFile,
    RouterAddress,
    router_at,
)
from splitserve.core.errors import DeadlineExceeded, Unavailable
from splitserve.core.fleet import FleetStatus, RunningRequests

_SHORTEST_S = 0.1


@dataclass(frozen=True, slots=True)
class Look:
    """At one moment, in seconds on the looker's clock. `error`: why there is nothing newer than the look before."""

    at: float
    fleet: FleetStatus
    running: RunningRequests
    error: str = ""


def top(
    router: RouterAddress = DEFAULT_ROUTER,
    interval: Annotated[float, typer.Option(min=_SHORTEST_S, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    requests: Annotated[int, typer.Option(min=1, max=1000, help="Most requests to show, the newest.")] = 20,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Watch a router: workers with load and health, latency against objectives, requests in flight, transfers.

    Ctrl-C ends it. With --json each look is one object a line.
    """
    with router_at(router, ca, cert, key, api_key) as client:
        looks = looks_at(client.fleet, lambda: client.requests(requests), interval, once)
        if as_json:
            for look in looks:
                print(json.dumps(plain(_said(look))), flush=True)
        else:
            _show(looks, once)


def looks_at(
    fleet: Callable[[], FleetStatus], running: Callable[[], RunningRequests], interval_s: float, once: bool
) -> Iterator[Look]:
    """One after the other, for ever unless `once`. A router that was there once may be away for a while."""
    look = Look(time.monotonic(), fleet(), running())
    yield look
    while not once:
        time.sleep(interval_s)
        try:
            look = Look(time.monotonic(), fleet(), running())
        except (Unavailable, DeadlineExceeded) as error:
            look = replace(look, error=str(error))
        yield look


def _said(look: Look) -> dict[str, object]:
    if look.error:
        return {"error": look.error}
    requests = [asdict(each) for each in look.running.requests]
    return {**asdict(look.fleet), "requests": requests, "requests_total": look.running.total}


def _show(looks: Iterable[Look], once: bool) -> None:
    from rich.console import Console

    from splitserve.cli.top_view import Memory, top_view

    memory = Memory()
    views = (top_view(look, memory.take(look)) for look in looks)
    if once:
        Console().print(next(views))
    else:
        show_live(views, screen=True)
