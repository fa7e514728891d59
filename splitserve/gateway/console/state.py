"""What the console's page is told: a fleet and its requests as plain values for JSON. Pure.

Seconds, bytes and counts as they are; None where there is none of something, an objective or a measurement. Nothing of
prompts or outputs, and no addresses or keys of workers.
"""

from math import isfinite
from typing import Any

from splitserve import __version__
from splitserve.core.fleet import (
    ClassStatus,
    FleetStatus,
    LinkStatus,
    Percentiles,
    RunningRequest,
    RunningRequests,
    WorkerStatus,
)


def state_of(fleet: FleetStatus, running: RunningRequests) -> dict[str, Any]:
    return {
        "version": __version__,
        "model": fleet.model,
        "router": fleet.router_uuid,
        "waiting": fleet.waiting_requests,
        "running": fleet.running_requests,
        "workers": [_worker(each) for each in fleet.workers],
        "classes": [_class(each) for each in fleet.classes],
        "links": [_link(each) for each in fleet.links],
        "requests": [_request(each) for each in running.requests],
        "requests_total": running.total,
    }


def _worker(status: WorkerStatus) -> dict[str, Any]:
    info, load = status.worker, status.load
    return {
        "uuid": info.uuid,
        "name": info.name,
        "pool": status.pool.value,
        "health": status.health.value,
        "engine": info.engine,
        "kv_mode": info.kv.mode.value,
        "total_blocks": info.total_blocks,
        "free_blocks": load.free_blocks,
        "pinned_blocks": load.pinned_blocks,
        "quarantined_blocks": load.quarantined_blocks,
        "running": load.running,
        "max_sequences": info.max_sequences,
        "prefills": status.prefills,
        "decodes": status.decodes,
        "prefill_tokens": load.prefill_tokens,
        "produced_tokens": load.produced_tokens,
        "step_s": status.step_s if status.step_s > 0 else None,  # an older router says 0
        "slowdown": load.slowdown if info.step_cost is not None else None,
        "heard_s": status.seconds_since_heartbeat,
        "token_s": _measured(status.seconds_since_token),
    }


def _class(status: ClassStatus) -> dict[str, Any]:
    recent = status.last_minute
    return {
        "name": status.name,
        "ttft_s": _objective(status.ttft_s),
        "ttft_per_token_s": status.ttft_per_token_s,
        "tpot_s": _objective(status.tpot_s),
        "itl_p99_s": _objective(status.itl_p99_s),
        "ended_5m": status.ended,
        "met_5m": status.met,
        "goodput_rps": status.goodput_rps,
        "ended": recent.ended,
        "met": recent.met,
        "attainment": recent.met / recent.ended if recent.ended else None,
        "ttft": _percentiles(recent.ttft),
        "tpot": _percentiles(recent.tpot),
    }


def _link(status: LinkStatus) -> dict[str, Any]:
    return {
        "source": status.source,
        "destination": status.destination,
        "transfers": status.transfers,
        "failed": status.failed,
        "bytes": status.bytes,
        "early_bytes": status.bytes_before_prefill_ended,
    }


def _request(request: RunningRequest) -> dict[str, Any]:
    return {
        "id": request.request_id,
        "class": request.slo_class,
        "phase": request.phase.value,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "age_s": request.since_s,
        "prefill_worker": request.prefill_worker,
        "decode_worker": request.decode_worker,
    }


def _percentiles(each: Percentiles) -> dict[str, float | None]:
    return {"p50_s": _measured(each.p50_s), "p90_s": _measured(each.p90_s), "p99_s": _measured(each.p99_s)}


def _measured(seconds: float) -> float | None:
    return seconds if seconds >= 0 else None


def _objective(seconds: float) -> float | None:
    return seconds if isfinite(seconds) else None
