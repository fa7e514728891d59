"""`splitserve plan watch`: reads a router's metrics again and again, and plans anew where traffic has drifted.

What counts as drift is `planner.watch`'s to say.
"""

import json
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from splitserve.cli.planning import INFEASIBLE, answered, console, write
from splitserve.core.errors import ConfigError, Unavailable
from splitserve.core.exposure import is_loopback
from splitserve.planner.plan import Plan
from splitserve.planner.result import Infeasible
from splitserve.planner.tables import change_view, infeasible_view
from splitserve.planner.watch import Reading, Verdict, change, judge, observed_inputs, reading, window
from splitserve.workload.drift import Traffic

FETCH_S = 10.0
DRIFTED = 4


@dataclass(frozen=True, slots=True)
class Watching:
    """Where from, how often, and over how long a window."""

    url: str
    every_s: float
    window_s: float
    out: Path | None = None
    as_json: bool = False


def watch(plan: Plan, watching: Watching, once: bool) -> int:
    """The exit code, with `once`: 0 as planned, 4 drifted, 3 drifted and no placement serves what comes now. Else it
    goes on for ever, each new plan taking the last one's place.

    Raises Unavailable if the router can't be reached, ConfigError if it has not the metrics.
    """
    for seen in _windows(watching):
        verdict = judge(plan, seen)
        answer = answered(observed_inputs(plan, seen)) if verdict.drifted else None
        _say(verdict, plan, answer, watching.as_json)
        if isinstance(answer, Plan):
            write(answer, watching.out)
            plan = answer
        if once:
            break
    return 0 if answer is None else DRIFTED if isinstance(answer, Plan) else INFEASIBLE


def _windows(watching: Watching) -> Iterator[Traffic]:
    """From the oldest reading that is young enough to the newest. A router that starts anew begins a new row."""
    readings = deque([fetched(watching.url)])
    while True:
        time.sleep(watching.every_s)
        readings.append(fetched(watching.url))
        while len(readings) > 2 and readings[-1].at_s - readings[0].at_s > watching.window_s:
            readings.popleft()
        seen = window(readings[0], readings[-1])
        if seen is None:
            readings = deque([readings[-1]])
        else:
            yield seen


def fetched(url: str) -> Reading:
    """One scrape. Raises Unavailable, ConfigError."""
    address = _address(url)
    try:
        with _opener(address).open(address, timeout=FETCH_S) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError, UnicodeDecodeError) as error:
        raise Unavailable(
            f"{address}: no metrics there ({getattr(error, 'reason', error)}); is the router up?"
        ) from error
    return reading(text, time.monotonic(), address)


def _opener(address: str) -> urllib.request.OpenerDirector:
    """A proxy that the environment names knows nothing of this machine's loopback."""
    host = urlsplit(address).hostname or ""
    beside = [urllib.request.ProxyHandler({})] if is_loopback(f"{host}:0") else []
    return urllib.request.build_opener(*beside)


def _address(said: str) -> str:
    """host:port is enough. Raises ConfigError."""
    address = said if "://" in said else f"http://{said}/metrics"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("--metrics", f"{said!r} is no address; write http://127.0.0.1:9400/metrics")
    return address


def _say(verdict: Verdict, plan: Plan, answer: Plan | Infeasible | None, as_json: bool) -> None:
    changed = change(plan, answer) if isinstance(answer, Plan) else None
    refused = answer if isinstance(answer, Infeasible) else None
    if as_json:
        more = {"change": asdict(changed) if changed else None, "infeasible": asdict(refused) if refused else None}
        print(json.dumps({**asdict(verdict), **more}), flush=True)
        return
    to, now = console(), datetime.now().strftime("%H:%M:%S")
    to.print(f"{now}  {verdict.sentence}", highlight=False, style="yellow" if verdict.drifted else "")
    for reason in verdict.reasons:
        to.print(f"  {reason}", highlight=False)
    if changed is not None:
        to.print(change_view(changed), highlight=False)
    if refused is not None:
        to.print(infeasible_view(refused), highlight=False)
