"""What `splitserve status` shows people: the fleet, its SLO classes, and why a request has its workers."""

from collections.abc import Sequence
from math import isfinite

from rich.console import Group, RenderableType

from splitserve.core.fleet import ClassStatus, Decision, Explanation, FleetStatus, Health, WorkerStatus
from splitserve.core.worker import Pool
from splitserve.view.table import table

_WORKER_FIGURES = ("free blocks", "pinned", "quaran- tined", "jobs", "tokens made", "heard s ago")
_CLASS_FIGURES = ("TTFT", "TPOT", "P99 ITL", "ended, 5 min", "met", "goodput/s")
_DECISION_FIGURES = ("waited s", "behind it", "slack s", "read s", "TTFT s", "real s", "s ago")


def view(seen: FleetStatus | Explanation) -> Group:
    return explanation_view(seen) if isinstance(seen, Explanation) else fleet_view(seen)


def fleet_view(fleet: FleetStatus) -> Group:
    ordered = sorted(fleet.workers, key=lambda one: (one.pool != Pool.PREFILL, one.worker.name))
    parts: list[RenderableType] = [
        f"{fleet.model}: {fleet.running_requests} running, {fleet.waiting_requests} waiting",
        table(("name", "pool", "health"), _WORKER_FIGURES, map(_worker_row, ordered)) if ordered else "no workers yet",
    ]
    classes = [each for each in fleet.classes if each.ended or _has_objectives(each)]
    if classes:
        parts += [table(("SLO class",), _CLASS_FIGURES, map(_class_row, classes)), *_scheduling(ordered)]
    return Group(*parts)


def explanation_view(explanation: Explanation) -> Group:
    objectives = (
        ("TTFT", explanation.ttft_s),
        ("TPOT", explanation.tpot_s),
        ("P99 ITL", explanation.itl_p99_s),
    )
    said = ", ".join(f"{name} {_seconds(objective_s)}" for name, objective_s in objectives if isfinite(objective_s))
    parts: list[RenderableType] = [
        f"{explanation.request_id}: {explanation.prompt_tokens} prompt and {explanation.output_tokens} output tokens, "
        f"{explanation.since_s:.3f} s since it came; class {explanation.slo_class}, priority {explanation.priority}, "
        + (f"objectives {said}" if said else "no objectives")
    ]
    if explanation.place:
        parts.append(f"waits at place {explanation.place} {explanation.waits_for}")
    if explanation.decisions:
        rows = map(_decision_row, explanation.decisions)
        parts.append(table(("prompt read by", "decoded by", "why"), _DECISION_FIGURES, rows))
        parts += [f"{each.decode_worker}: {each.ended}" for each in explanation.decisions if each.ended]
    return Group(*parts)


def _worker_row(status: WorkerStatus) -> tuple[str, ...]:
    load = status.load
    return (
        status.worker.name,
        str(status.pool),
        str(status.health),
        f"{load.free_blocks}/{status.worker.total_blocks}",
        str(load.pinned_blocks),
        str(load.quarantined_blocks),
        str(status.prefills + status.decodes),
        str(load.produced_tokens),
        f"{status.seconds_since_heartbeat:.1f}",
    )


def _has_objectives(status: ClassStatus) -> bool:
    return isfinite(min(status.ttft_s, status.tpot_s, status.itl_p99_s))


def _class_row(status: ClassStatus) -> tuple[str, ...]:
    per_token = f" + {status.ttft_per_token_s * 1000:g} ms/token" if status.ttft_per_token_s else ""
    return (
        status.name,
        f"{_seconds(status.ttft_s)}{per_token}",
        _seconds(status.tpot_s),
        _seconds(status.itl_p99_s),
        str(status.ended),
        f"{status.met / status.ended:.1%}" if status.ended else "-",
        f"{status.goodput_rps:.2f}",
    )


def _scheduling(workers: Sequence[WorkerStatus]) -> list[str]:
    """One line, if there are workers."""
    ready = [each.worker for each in workers if each.health is Health.READY]
    unknown = [worker.name for worker in ready if worker.step_cost is None]
    if not ready:
        return []
    if not unknown:
        return ["scheduling: requests with objectives go by what they are predicted to take, whatever the pools"]
    names = ", ".join(unknown)
    return [
        f"scheduling: by pools alone, since what a step takes is not known of {names}: "
        "set engine.profile to what `splitserve profile` writes"
    ]


def _decision_row(each: Decision) -> tuple[str, ...]:
    reader = each.prefill_worker or (each.decode_worker if not each.moved else "KV from before")
    why = "moved" if each.moved else "predicted" if each.predicted else "pools"
    return (
        reader,
        each.decode_worker,
        why,
        f"{each.waited_s:.3f}",
        str(each.behind),
        f"{each.left_s:.3f}" if isfinite(each.left_s) else "-",
        f"{each.read_s:.3f}" if each.predicted else "-",
        f"{each.ttft_s:.3f}" if each.predicted else "-",
        f"{each.first_token_s:.3f}" if each.first_token_s >= 0 else "-",
        f"{each.since_s:.1f}",
    )


def _seconds(objective_s: float) -> str:
    return f"{objective_s:g} s" if isfinite(objective_s) else "-"
