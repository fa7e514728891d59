"""What an operator does to a running fleet: look at it, drain a worker, move a request or a worker."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from splitserve.core.errors import ConfigError
from splitserve.core.fleet import Explanation, FleetStatus
from splitserve.core.worker import Pool

WorkerName = Annotated[str, typer.Argument(help="The worker's name or uuid, as `splitserve status` shows it.")]
Seen = FleetStatus | Explanation
_WATCH_S = 1.0


def status(
    router: RouterAddress = DEFAULT_ROUTER,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until Ctrl-C.")] = False,
    explain: Annotated[str, typer.Option(metavar="REQUEST", help="Why this request has its workers, or waits.")] = "",
) -> None:
    """Show the fleet: who serves, what each worker holds, what waits. See `splitserve top` for latency and requests."""
    with router_at(router, ca, cert, key, api_key) as client:
        looks = _looks(lambda: client.explain(explain) if explain else client.fleet(), watch)
        if as_json:
            for seen in looks:
                print(json.dumps(plain(asdict(seen))), flush=True)
        else:
            _show(looks, watch)


def drain(
    worker: WorkerName,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait for its requests to end.")] = None,
    router: RouterAddress = DEFAULT_ROUTER,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Take a worker out of service: it gets no new requests, hands over or ends those it has, and exits."""
    with router_at(router, ca, cert, key, api_key) as client:
        drained = client.drain(worker, timeout)
    sentence = (
        f"{worker} drained; it finished {drained.finished_requests} jobs first, "
        f"and {drained.migrated_requests} moved to other workers"
    )
    _say(as_json, sentence, worker=worker, **asdict(drained))


def migrate(
    request_id: Annotated[str, typer.Argument(help="The request's id, as its client or the router's log names it.")],
    to: Annotated[str, typer.Option("--to", help="Name or uuid of the worker; default: the router chooses.")] = "",
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds to wait for it to go on there.")] = None,
    router: RouterAddress = DEFAULT_ROUTER,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Move a request that is decoding to another worker, KV and all; its stream goes on."""
    with router_at(router, ca, cert, key, api_key) as client:
        moved = client.migrate(request_id, to, timeout)
    sentence = (
        f"{request_id} went from {moved.from_worker} to {moved.to_worker}; "
        f"its stream stood still for {moved.stall_s * 1000:.0f} ms"
    )
    _say(as_json, sentence, request_id=request_id, **asdict(moved))


def pool(
    worker: WorkerName,
    pool: Annotated[str, typer.Argument(help="prefill or decode.")],
    router: RouterAddress = DEFAULT_ROUTER,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Move a worker to another pool while it runs; what it holds is finished."""
    if pool not in set(Pool):
        raise ConfigError("POOL", f"{pool!r} is no pool; it is prefill or decode")
    with router_at(router, ca, cert, key, api_key) as client:
        moved = client.set_pool(worker, Pool(pool))
    _say(as_json, f"{moved.worker.name} is in the {moved.pool} pool", worker=moved.worker.name, pool=str(moved.pool))


def _say(as_json: bool, sentence: str, **facts: object) -> None:
    print(json.dumps(facts) if as_json else sentence)


def _looks(look: Callable[[], Seen], watch: bool) -> Iterator[Seen]:
    yield look()
    while watch:
        time.sleep(_WATCH_S)
        yield look()


def _show(looks: Iterator[Seen], watch: bool) -> None:
    from rich.console import Console

    from splitserve.cli.fleet_view import view

    if watch:
        show_live(map(view, looks))
    else:
        Console().print(view(next(looks)))
