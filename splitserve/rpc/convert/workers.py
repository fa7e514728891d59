"""Between wire messages and core's nouns for what routers and workers, and operators, tell each other.

Pure. See the package's docstring.
"""

from collections.abc import Mapping
from typing import Any

from splitserve.core.errors import InvalidRequest
from splitserve.core.fleet import (
    ClassStatus,
    Decision,
    Explanation,
    FleetStatus,
    Health,
    LinkStatus,
    Percentiles,
    Phase,
    RecentOutputs,
    RunningRequest,
    RunningRequests,
    WorkerStatus,
)
from splitserve.core.versions import Versions
from splitserve.core.worker import (
    CONTROL_UNSAID,
    DecodeJob,
    Delta,
    Failure,
    Job,
    KvFormat,
    KvMode,
    KvPart,
    KvPeer,
    Load,
    Objectives,
    Outcome,
    Parse,
    Pool,
    PrefillJob,
    StepCost,
    Ticket,
    TransferStats,
    WorkerInfo,
)
from splitserve.rpc.convert.fields import key_of, same_fields_from, same_fields_to
from splitserve.rpc.convert.requests import (
    FINISH_REASONS,
    logprobs_from_proto,
    logprobs_to_proto,
    sampling_from_proto,
    sampling_to_proto,
    tool_calls_from_proto,
    tool_calls_to_proto,
    tool_choice_from_proto,
    tool_choice_to_proto,
    tools_from_proto,
    tools_to_proto,
)
from splitserve.rpc.gen import admin_pb2, worker_pb2

PROTOCOL_VERSION = 4

_POOLS: Mapping[Pool, worker_pb2.Pool] = {Pool.PREFILL: worker_pb2.POOL_PREFILL, Pool.DECODE: worker_pb2.POOL_DECODE}
_FAILURES: Mapping[Failure, worker_pb2.Failure] = {
    Failure.NOT_NOW: worker_pb2.FAILURE_NOT_NOW,
    Failure.TRANSFER: worker_pb2.FAILURE_TRANSFER,
    Failure.CANCELLED: worker_pb2.FAILURE_CANCELLED,
    Failure.INVALID: worker_pb2.FAILURE_INVALID,
    Failure.ENGINE: worker_pb2.FAILURE_ENGINE,
    Failure.MIGRATED: worker_pb2.FAILURE_MIGRATED,
}


# Workers ------------------------------------------------------------------------------------------------------------
def pool_to_proto(pool: Pool) -> worker_pb2.Pool:
    return _POOLS[pool]


def pool_from_proto(value: int, field: str = "pool") -> Pool:
    pool = key_of(_POOLS, value)
    if pool is None:
        raise InvalidRequest(field, "unspecified; say POOL_PREFILL or POOL_DECODE")
    return pool


def kv_peer_to_proto(peer: KvPeer) -> worker_pb2.KvPeer:
    part, control = same_fields_to(worker_pb2.KvPart, peer.part), same_fields_to(worker_pb2.Versions, peer.control)
    return same_fields_to(worker_pb2.KvPeer, peer, part=part, control=control)


def kv_peer_from_proto(message: worker_pb2.KvPeer) -> KvPeer:
    control = same_fields_from(Versions, message.control) if message.HasField("control") else CONTROL_UNSAID
    return same_fields_from(KvPeer, message, part=same_fields_from(KvPart, message.part), control=control)


def worker_info_to_proto(info: WorkerInfo) -> worker_pb2.WorkerInfo:
    kv = same_fields_to(worker_pb2.KvFormat, info.kv)
    peers = [kv_peer_to_proto(peer) for peer in info.kv_peers]
    cost = same_fields_to(worker_pb2.StepCost, info.step_cost) if info.step_cost is not None else None
    pool = pool_to_proto(info.pool)
    return same_fields_to(worker_pb2.WorkerInfo, info, pool=pool, kv=kv, kv_peers=peers, step_cost=cost)


def worker_info_from_proto(message: worker_pb2.WorkerInfo) -> WorkerInfo:
    """Raises InvalidRequest naming `pool` or `kv.mode` if this version doesn't know its value."""
    try:
        mode = KvMode(message.kv.mode)
    except ValueError as error:
        raise InvalidRequest("kv.mode", f"{message.kv.mode!r} is unknown; this version has push and pull") from error
    return same_fields_from(
        WorkerInfo,
        message,
        pool=pool_from_proto(message.pool),
        kv=same_fields_from(KvFormat, message.kv, mode=mode),
        kv_peers=tuple(kv_peer_from_proto(peer) for peer in message.kv_peers),
        restores=tuple(message.restores),
        loras=tuple(message.loras),
        step_cost=same_fields_from(StepCost, message.step_cost) if message.HasField("step_cost") else None,
    )


def load_to_proto(load: Load) -> worker_pb2.Load:
    return same_fields_to(worker_pb2.Load, load, pool=pool_to_proto(load.pool))


def load_from_proto(message: worker_pb2.Load) -> Load:
    return same_fields_from(Load, message, pool=pool_from_proto(message.pool, "load.pool"))


# Jobs ---------------------------------------------------------------------------------------------------------------
def ticket_to_proto(ticket: Ticket) -> worker_pb2.Ticket:
    source, destination = ([kv_peer_to_proto(peer) for peer in side] for side in (ticket.source, ticket.destination))
    return same_fields_to(worker_pb2.Ticket, ticket, source=source, destination=destination)


def ticket_from_proto(message: worker_pb2.Ticket) -> Ticket:
    source, destination = (
        tuple(kv_peer_from_proto(peer) for peer in side) for side in (message.source, message.destination)
    )
    return same_fields_from(Ticket, message, source=source, destination=destination)


def job_to_proto(job: Job, number: int) -> worker_pb2.Job:
    """`number` counts the jobs of one worker's stream from 1."""
    message = worker_pb2.Job(
        number=number,
        job_id=job.job_id,
        request_id=job.request_id,
        prompt=job.prompt,
        deadline_s=job.deadline_s,
        priority=job.priority,
        lora=job.lora,
        cache_salt=job.cache_salt,
        traceparent=job.traceparent,
        ticket=ticket_to_proto(job.ticket) if job.ticket is not None else None,
        objectives=same_fields_to(worker_pb2.Objectives, job.objectives),
    )
    if isinstance(job, DecodeJob):
        sampling, parse = sampling_to_proto(job.sampling), _parse_to_proto(job.parse)
        message.decode.CopyFrom(worker_pb2.DecodeJob(sampling=sampling, output=job.output, parse=parse))
    else:
        message.prefill.SetInParent()
    return message


def job_from_proto(message: worker_pb2.Job) -> Job:
    """Its number stays with the caller: `message.number`. Raises InvalidRequest for a job of no known kind."""
    if message.WhichOneof("kind") == "decode":
        return DecodeJob(
            **_job_fields(message),
            sampling=sampling_from_proto(message.decode.sampling),
            output=tuple(message.decode.output),
            ticket=ticket_from_proto(message.ticket) if message.HasField("ticket") else None,
            parse=_parse_from_proto(message.decode.parse) if message.decode.HasField("parse") else None,
        )
    if message.WhichOneof("kind") == "prefill":
        return PrefillJob(**_job_fields(message), ticket=ticket_from_proto(message.ticket))
    raise InvalidRequest("job.kind", "neither prefill nor decode; router and worker must be of one version")


def delta_to_proto(delta: Delta) -> worker_pb2.Delta:
    return worker_pb2.Delta(
        job_id=delta.job_id,
        index=delta.index,
        token_ids=delta.token_ids,
        text=delta.text,
        logprobs=logprobs_to_proto(delta.logprobs),
        outcome=outcome_to_proto(delta.outcome) if delta.outcome is not None else None,
        reasoning=delta.reasoning,
        tool_calls=tool_calls_to_proto(delta.tool_calls),
        prompt_logprobs=logprobs_to_proto(delta.prompt_logprobs),
    )


def delta_from_proto(message: worker_pb2.Delta) -> Delta:
    """Once per token: what most deltas don't have costs a look."""
    return Delta(
        job_id=message.job_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=logprobs_from_proto(message.logprobs) if message.logprobs else (),
        outcome=outcome_from_proto(message.outcome) if message.HasField("outcome") else None,
        reasoning=message.reasoning,
        tool_calls=tool_calls_from_proto(message.tool_calls) if message.tool_calls else (),
        prompt_logprobs=logprobs_from_proto(message.prompt_logprobs) if message.prompt_logprobs else (),
    )


def outcome_to_proto(outcome: Outcome) -> worker_pb2.Outcome:
    message = worker_pb2.Outcome(message=outcome.message, field=outcome.field, handover=outcome.handover)
    if outcome.finish_reason is not None:
        message.finish_reason = FINISH_REASONS[outcome.finish_reason]
    if outcome.failure is not None:
        message.failure = _FAILURES[outcome.failure]
    if outcome.transfer is not None:
        message.transfer.CopyFrom(same_fields_to(worker_pb2.TransferStats, outcome.transfer))
    return message


def outcome_from_proto(message: worker_pb2.Outcome) -> Outcome:
    return Outcome(
        finish_reason=key_of(FINISH_REASONS, message.finish_reason),
        failure=key_of(_FAILURES, message.failure),
        message=message.message,
        field=message.field,
        handover=message.handover,
        transfer=same_fields_from(TransferStats, message.transfer) if message.HasField("transfer") else None,
    )


# Fleet status -------------------------------------------------------------------------------------------------------
def worker_status_to_proto(status: WorkerStatus) -> admin_pb2.WorkerStatus:
    return same_fields_to(
        admin_pb2.WorkerStatus,
        status,
        worker=worker_info_to_proto(status.worker),
        pool=pool_to_proto(status.pool),
        health=status.health.value,
        load=load_to_proto(status.load),
    )


def worker_status_from_proto(message: admin_pb2.WorkerStatus) -> WorkerStatus:
    return same_fields_from(
        WorkerStatus,
        message,
        worker=worker_info_from_proto(message.worker),
        pool=pool_from_proto(message.pool),
        health=Health(message.health),
        load=load_from_proto(message.load),
    )


def fleet_status_to_proto(status: FleetStatus) -> admin_pb2.FleetStatus:
    return same_fields_to(
        admin_pb2.FleetStatus,
        status,
        workers=[worker_status_to_proto(worker) for worker in status.workers],
        classes=[_class_to_proto(each) for each in status.classes],
        links=[same_fields_to(admin_pb2.LinkStatus, each) for each in status.links],
    )


def explanation_to_proto(explanation: Explanation) -> admin_pb2.Explanation:
    decisions = [same_fields_to(admin_pb2.Decision, each) for each in explanation.decisions]
    return same_fields_to(admin_pb2.Explanation, explanation, decisions=decisions)


def explanation_from_proto(message: admin_pb2.Explanation) -> Explanation:
    decisions = tuple(same_fields_from(Decision, each) for each in message.decisions)
    return same_fields_from(Explanation, message, decisions=decisions)


def fleet_status_from_proto(message: admin_pb2.FleetStatus) -> FleetStatus:
    return same_fields_from(
        FleetStatus,
        message,
        workers=tuple(worker_status_from_proto(worker) for worker in message.workers),
        classes=tuple(_class_from_proto(each) for each in message.classes),
        links=tuple(same_fields_from(LinkStatus, each) for each in message.links),
    )


def running_requests_to_proto(running: RunningRequests) -> admin_pb2.RunningRequests:
    requests = [same_fields_to(admin_pb2.RunningRequest, each, phase=each.phase.value) for each in running.requests]
    return admin_pb2.RunningRequests(requests=requests, total=running.total)


def running_requests_from_proto(message: admin_pb2.RunningRequests) -> RunningRequests:
    requests = (same_fields_from(RunningRequest, each, phase=Phase(each.phase)) for each in message.requests)
    return RunningRequests(tuple(requests), message.total)


def _class_to_proto(status: ClassStatus) -> admin_pb2.ClassStatus:
    recent = status.last_minute
    ttft, tpot = (same_fields_to(admin_pb2.Percentiles, each) for each in (recent.ttft, recent.tpot))
    last_minute = same_fields_to(admin_pb2.RecentOutputs, recent, ttft=ttft, tpot=tpot)
    return same_fields_to(admin_pb2.ClassStatus, status, last_minute=last_minute)


def _class_from_proto(message: admin_pb2.ClassStatus) -> ClassStatus:
    """A router that is older than `last_minute` has none."""
    if not message.HasField("last_minute"):
        return same_fields_from(ClassStatus, message, last_minute=RecentOutputs())
    recent = message.last_minute
    ttft, tpot = (same_fields_from(Percentiles, each) for each in (recent.ttft, recent.tpot))
    last_minute = same_fields_from(RecentOutputs, recent, ttft=ttft, tpot=tpot)
    return same_fields_from(ClassStatus, message, last_minute=last_minute)


def _job_fields(message: worker_pb2.Job) -> dict[str, Any]:
    names = ("job_id", "request_id", "deadline_s", "priority", "lora", "cache_salt", "traceparent")
    objectives = same_fields_from(Objectives, message.objectives)
    return {"prompt": tuple(message.prompt), "objectives": objectives, **{n: getattr(message, n) for n in names}}


def _parse_to_proto(parse: Parse | None) -> worker_pb2.Parse | None:
    if parse is None:
        return None
    return worker_pb2.Parse(tools=tools_to_proto(parse.tools), tool_choice=tool_choice_to_proto(parse.tool_choice))


def _parse_from_proto(message: worker_pb2.Parse) -> Parse:
    return Parse(tools_from_proto(message.tools), tool_choice_from_proto(message.tool_choice))
