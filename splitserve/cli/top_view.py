"""What `splitserve top` shows: one screen of a router's state, with what only two looks can tell. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from rich.console import Group, RenderableType
from rich.text import Text

from splitserve.cli.top import Look
from splitserve.core.fleet import (
    ClassStatus,
    FleetStatus,
    Health,
    LinkStatus,
    Percentiles,
    RunningRequest,
    WorkerStatus,
)
from splitserve.core.worker import Pool
from splitserve.view.table import table

GONE_FOR_S = 60.0
_LINKS = 8
_MIB = 1 << 20
_ID = 12  # characters of a request's id
_WORKER_FIGURES = ("run", "KV used", "of", "read queue", "step ms", "slow- down", "tok/s", "heard s")
_CLASS_FIGURES = (
    "ended",
    "met",
    "TTFT p50",
    "TTFT p90",
    "TTFT p99",
    "TTFT goal",
    "TPOT p50",
    "TPOT p90",
    "TPOT p99",
    "TPOT goal",
)
_REQUEST_FIGURES = ("prompt", "output", "age s")
_LINK_FIGURES = ("arrived", "failed", "MiB", "early")


@dataclass(frozen=True, slots=True)
class Change:
    """Since the look before: tokens a second by worker uuid, and the names of those that left in the last minute."""

    tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    gone: tuple[str, ...] = ()


class Memory:
    """The look before, and who has left since."""

    def __init__(self) -> None:
        self._before: Look | None = None
        self._gone: list[tuple[float, str]] = []

    def take(self, look: Look) -> Change:
        """What this look tells beside the one before. Another router's, or a restarted one's, tells nothing."""
        if look.error:
            return Change()
        before, self._before = self._before, look
        if before is None or before.fleet.router_uuid != look.fleet.router_uuid:
            self._gone = []
            return Change()
        here = {each.worker.uuid for each in look.fleet.workers}
        left = [each.worker.name for each in before.fleet.workers if each.worker.uuid not in here]
        self._gone = [(at, name) for at, name in self._gone if look.at - at <= GONE_FOR_S]
        self._gone += [(look.at, name) for name in left]
        return Change(_rates(before, look), tuple(name for _, name in self._gone))


def top_view(look: Look, change: Change) -> Group:
    fleet, running = look.fleet, look.running
    parts: list[RenderableType] = [_head(fleet, change)]
    if look.error:
        parts.append(Text(f"the router does not answer: {look.error}; below is what it said last", style="red"))
    if fleet.workers:
        ordered = sorted(fleet.workers, key=lambda one: (one.pool != Pool.PREFILL, one.worker.name))
        rows = (_worker_row(each, change) for each in ordered)
        parts.append(table(("worker", "pool", "health"), _WORKER_FIGURES, rows))
    else:
        parts.append(Text("no workers have joined this router", style="yellow"))
    if change.gone:
        parts.append(Text(f"gone in the last minute: {', '.join(change.gone)}", style="red"))
    seen = [each for each in fleet.classes if each.last_minute.ended]
    if seen:
        parts += [_title("Outputs of the last minute, ms"), table(("class",), _CLASS_FIGURES, map(_class_row, seen))]
    if fleet.links:
        links = map(_link_row, fleet.links[:_LINKS])
        parts += [
            _title("KV transfers of the last five minutes; early: before the prefill ended"),
            table(("link",), _LINK_FIGURES, links),
        ]
    if running.requests:
        parts += [
            _title(f"Requests in flight, the newest {len(running.requests)} of {running.total}"),
            table(("request", "class", "phase", "route"), _REQUEST_FIGURES, map(_request_row, running.requests)),
        ]
    return Group(*parts)


def _head(fleet: FleetStatus, change: Change) -> Text:
    ready = sum(each.health is Health.READY for each in fleet.workers)
    tokens = sum(change.tokens_per_s.values())
    rate = f", {tokens:.0f} tokens/s" if change.tokens_per_s else ""
    return Text.assemble(
        (fleet.model, "bold"),
        f"  {ready} of {len(fleet.workers)} workers ready, {fleet.running_requests} running, "
        f"{fleet.waiting_requests} waiting{rate}",
        (f"  {fleet.router_uuid[:8]}", "dim"),
    )


def _title(words: str) -> Text:
    return Text(f"\n{words}", style="bold")


def _worker_row(status: WorkerStatus, change: Change) -> tuple[str, ...]:
    load, info = status.load, status.worker
    used = info.total_blocks - load.free_blocks
    rate = change.tokens_per_s.get(info.uuid)
    return (
        info.name,
        str(status.pool),
        str(status.health),
        f"{load.running}/{info.max_sequences}",
        f"{used / info.total_blocks:.0%}" if info.total_blocks else "-",
        str(info.total_blocks),
        str(load.prefill_tokens),
        f"{status.step_s * 1000:.1f}" if status.step_s > 0 else "-",
        f"{load.slowdown:.2f}" if info.step_cost is not None else "-",
        f"{rate:.0f}" if rate is not None else "-",
        f"{status.seconds_since_heartbeat:.1f}",
    )


def _class_row(status: ClassStatus) -> tuple[str, ...]:
    recent = status.last_minute
    more = "+" if status.ttft_per_token_s else ""
    return (
        status.name,
        str(recent.ended),
        f"{recent.met / recent.ended:.0%}",
        *_percentiles(recent.ttft),
        f"{_ms(status.ttft_s)}{more}",
        *_percentiles(recent.tpot),
        _ms(status.tpot_s),
    )


def _link_row(link: LinkStatus) -> tuple[str, ...]:
    early = f"{link.bytes_before_prefill_ended / link.bytes:.0%}" if link.bytes else "-"
    name = f"{link.source} → {link.destination}" if link.source else "all others"
    return name, str(link.transfers), str(link.failed), f"{link.bytes / _MIB:.1f}", early


def _request_row(request: RunningRequest) -> tuple[str, ...]:
    route = " → ".join(filter(None, (request.prefill_worker, request.decode_worker))) or "-"
    figures = (str(request.prompt_tokens), str(request.output_tokens), f"{request.since_s:.1f}")
    name = request.request_id if len(request.request_id) <= _ID else f"{request.request_id[: _ID - 1]}…"
    return name, request.slo_class, str(request.phase), route, *figures


def _percentiles(each: Percentiles) -> Sequence[str]:
    return [_ms(seconds) for seconds in (each.p50_s, each.p90_s, each.p99_s)]


def _ms(seconds: float) -> str:
    if seconds < 0 or not isfinite(seconds):
        return "-"
    return f"{seconds * 1000:.1f}" if seconds < 0.01 else f"{seconds * 1000:.0f}"


def _rates(before: Look, look: Look) -> dict[str, float]:
    """Of the workers that were there then too."""
    made = {each.worker.uuid: each.load.produced_tokens for each in before.fleet.workers}
    took_s = look.at - before.at
    return {
        each.worker.uuid: max(0, each.load.produced_tokens - made[each.worker.uuid]) / took_s
        for each in look.fleet.workers
        if each.worker.uuid in made and took_s > 0
    }
