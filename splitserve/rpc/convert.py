"""Between wire messages and core's nouns, both ways, for every message: the one place that knows both.

Pure functions. What a peer may get wrong raises InvalidRequest naming the proto field; values are only converted here,
their ranges are `router/validate`'s business.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from splitserve.core.errors import InvalidRequest
from splitserve.core.fleet import FleetStatus, Health, WorkerStatus
from splitserve.core.request import (
    ChatMessage,
    Chunk,
    FinishReason,
    GenerateRequest,
    Logprob,
    SamplingParams,
    Timings,
    Usage,
)
from splitserve.core.worker import (
    DecodeJob,
    Delta,
    Failure,
    Job,
    KvFormat,
    KvMode,
    KvPart,
    KvPeer,
    Load,
    Outcome,
    Pool,
    PrefillJob,
    Ticket,
    TransferStats,
    WorkerInfo,
)
from splitserve.rpc.gen import admin_pb2, inference_pb2, worker_pb2

PROTOCOL_VERSION = 2

KeyT = TypeVar("KeyT")

_POOLS: Mapping[Pool, worker_pb2.Pool] = {Pool.PREFILL: worker_pb2.POOL_PREFILL, Pool.DECODE: worker_pb2.POOL_DECODE}
_FINISH_REASONS: Mapping[FinishReason, inference_pb2.FinishReason] = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
_FAILURES: Mapping[Failure, worker_pb2.Failure] = {
    Failure.NOT_NOW: worker_pb2.FAILURE_NOT_NOW,
    Failure.TRANSFER: worker_pb2.FAILURE_TRANSFER,
    Failure.CANCELLED: worker_pb2.FAILURE_CANCELLED,
    Failure.INVALID: worker_pb2.FAILURE_INVALID,
    Failure.ENGINE: worker_pb2.FAILURE_ENGINE,
    Failure.MIGRATED: worker_pb2.FAILURE_MIGRATED,
}
_SAMPLING_DEFAULTS = SamplingParams()
_SAMPLING_SCALARS = tuple(
    field.name for field in inference_pb2.SamplingParams.DESCRIPTOR.fields if field.has_presence
)  # `optional` in the proto: unset takes the dataclass's default


# Requests and what comes back ---------------------------------------------------------------------------------------
def sampling_to_proto(sampling: SamplingParams) -> inference_pb2.SamplingParams:
    """Raises InvalidRequest naming the field that has no room in its wire type."""
    message = inference_pb2.SamplingParams(ignore_eos=sampling.ignore_eos)
    _fill(message.stop, sampling.stop, "sampling.stop")
    _fill(message.stop_token_ids, sampling.stop_token_ids, "sampling.stop_token_ids")
    for name in _SAMPLING_SCALARS:
        value = getattr(sampling, name)
        if value != getattr(_SAMPLING_DEFAULTS, name):
            _assign(message, name, value, f"sampling.{name}")
    return message


def sampling_from_proto(message: inference_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        **{name: getattr(message, name) for name in _SAMPLING_SCALARS if message.HasField(name)},
    )


def request_to_proto(request: GenerateRequest) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequest naming the field that has no room in its wire type."""
    message = inference_pb2.GenerateRequest(
        model=request.model,
        sampling=sampling_to_proto(request.sampling),
        request_id=request.request_id,
        slo_class=request.slo_class,
        session_id=request.session_id,
    )
    _assign(message, "priority", request.priority, "priority")
    for name in ("deadline_s", "inter_token_deadline_s"):
        if getattr(request, name) is not None:
            _assign(message, name, getattr(request, name), name)
    _set_prompt(message, request.prompt)
    return message


def request_from_proto(message: inference_pb2.GenerateRequest) -> GenerateRequest:
    """Raises InvalidRequest if there is no prompt."""
    return GenerateRequest(
        prompt=_prompt(message),
        sampling=sampling_from_proto(message.sampling),
        model=message.model,
        request_id=message.request_id,
        slo_class=message.slo_class or "standard",
        priority=message.priority,
        session_id=message.session_id,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        inter_token_deadline_s=message.inter_token_deadline_s if message.HasField("inter_token_deadline_s") else None,
    )


def chunk_to_proto(chunk: Chunk) -> inference_pb2.GenerateResponse:
    message = inference_pb2.GenerateResponse(
        request_id=chunk.request_id,
        index=chunk.index,
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=_logprobs_to_proto(chunk.logprobs),
    )
    if chunk.finish_reason is not None:
        message.finish_reason = _FINISH_REASONS[chunk.finish_reason]
    if chunk.usage is not None:
        message.usage.prompt_tokens = chunk.usage.prompt_tokens
        message.usage.output_tokens = chunk.usage.output_tokens
    if chunk.timings is not None:
        message.timings.CopyFrom(_same_fields_to(inference_pb2.Timings, chunk.timings))
    return message


def chunk_from_proto(message: inference_pb2.GenerateResponse) -> Chunk:
    return Chunk(
        request_id=message.request_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=_logprobs_from_proto(message.logprobs),
        finish_reason=_key_of(_FINISH_REASONS, message.finish_reason),
        usage=Usage(message.usage.prompt_tokens, message.usage.output_tokens) if message.HasField("usage") else None,
        timings=_same_fields_from(Timings, message.timings) if message.HasField("timings") else None,
    )


# Workers ------------------------------------------------------------------------------------------------------------
def pool_to_proto(pool: Pool) -> worker_pb2.Pool:
    return _POOLS[pool]


def pool_from_proto(value: int, field: str = "pool") -> Pool:
    pool = _key_of(_POOLS, value)
    if pool is None:
        raise InvalidRequest(field, "unspecified; say POOL_PREFILL or POOL_DECODE")
    return pool


def kv_peer_to_proto(peer: KvPeer) -> worker_pb2.KvPeer:
    return worker_pb2.KvPeer(uuid=peer.uuid, endpoint=peer.endpoint, part=_same_fields_to(worker_pb2.KvPart, peer.part))


def kv_peer_from_proto(message: worker_pb2.KvPeer) -> KvPeer:
    return KvPeer(uuid=message.uuid, endpoint=message.endpoint, part=_same_fields_from(KvPart, message.part))


def worker_info_to_proto(info: WorkerInfo) -> worker_pb2.WorkerInfo:
    kv = _same_fields_to(worker_pb2.KvFormat, info.kv)
    peers = [kv_peer_to_proto(peer) for peer in info.kv_peers]
    return _same_fields_to(worker_pb2.WorkerInfo, info, pool=pool_to_proto(info.pool), kv=kv, kv_peers=peers)


def worker_info_from_proto(message: worker_pb2.WorkerInfo) -> WorkerInfo:
    """Raises InvalidRequest naming `pool` or `kv.mode` if this version doesn't know its value."""
    try:
        mode = KvMode(message.kv.mode)
    except ValueError as error:
        raise InvalidRequest("kv.mode", f"{message.kv.mode!r} is unknown; this version has push and pull") from error
    return _same_fields_from(
        WorkerInfo,
        message,
        pool=pool_from_proto(message.pool),
        kv=_same_fields_from(KvFormat, message.kv, mode=mode),
        kv_peers=tuple(kv_peer_from_proto(peer) for peer in message.kv_peers),
        restores=tuple(message.restores),
    )


def load_to_proto(load: Load) -> worker_pb2.Load:
    return _same_fields_to(worker_pb2.Load, load, pool=pool_to_proto(load.pool))


def load_from_proto(message: worker_pb2.Load) -> Load:
    return _same_fields_from(Load, message, pool=pool_from_proto(message.pool, "load.pool"))


# Jobs ---------------------------------------------------------------------------------------------------------------
def ticket_to_proto(ticket: Ticket) -> worker_pb2.Ticket:
    source, destination = ([kv_peer_to_proto(peer) for peer in side] for side in (ticket.source, ticket.destination))
    return _same_fields_to(worker_pb2.Ticket, ticket, source=source, destination=destination)


def ticket_from_proto(message: worker_pb2.Ticket) -> Ticket:
    source, destination = (
        tuple(kv_peer_from_proto(peer) for peer in side) for side in (message.source, message.destination)
    )
    return _same_fields_from(Ticket, message, source=source, destination=destination)


def job_to_proto(job: Job, number: int) -> worker_pb2.Job:
    """`number` counts the jobs of one worker's stream from 1."""
    message = worker_pb2.Job(
        number=number,
        job_id=job.job_id,
        request_id=job.request_id,
        prompt=job.prompt,
        deadline_s=job.deadline_s,
        priority=job.priority,
        ticket=ticket_to_proto(job.ticket) if job.ticket is not None else None,
    )
    if isinstance(job, DecodeJob):
        message.decode.CopyFrom(worker_pb2.DecodeJob(sampling=sampling_to_proto(job.sampling), output=job.output))
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
        logprobs=_logprobs_to_proto(delta.logprobs),
        outcome=outcome_to_proto(delta.outcome) if delta.outcome is not None else None,
    )


def delta_from_proto(message: worker_pb2.Delta) -> Delta:
    return Delta(
        job_id=message.job_id,
        index=message.index,
        token_ids=tuple(message.token_ids),
        text=message.text,
        logprobs=_logprobs_from_proto(message.logprobs),
        outcome=outcome_from_proto(message.outcome) if message.HasField("outcome") else None,
    )


def outcome_to_proto(outcome: Outcome) -> worker_pb2.Outcome:
    message = worker_pb2.Outcome(message=outcome.message, field=outcome.field, handover=outcome.handover)
    if outcome.finish_reason is not None:
        message.finish_reason = _FINISH_REASONS[outcome.finish_reason]
    if outcome.failure is not None:
        message.failure = _FAILURES[outcome.failure]
    if outcome.transfer is not None:
        message.transfer.CopyFrom(_same_fields_to(worker_pb2.TransferStats, outcome.transfer))
    return message


def outcome_from_proto(message: worker_pb2.Outcome) -> Outcome:
    return Outcome(
        finish_reason=_key_of(_FINISH_REASONS, message.finish_reason),
        failure=_key_of(_FAILURES, message.failure),
        message=message.message,
        field=message.field,
        handover=message.handover,
        transfer=_same_fields_from(TransferStats, message.transfer) if message.HasField("transfer") else None,
    )


# Fleet status -------------------------------------------------------------------------------------------------------
def worker_status_to_proto(status: WorkerStatus) -> admin_pb2.WorkerStatus:
    return _same_fields_to(
        admin_pb2.WorkerStatus,
        status,
        worker=worker_info_to_proto(status.worker),
        pool=pool_to_proto(status.pool),
        health=status.health.value,
        load=load_to_proto(status.load),
    )


def worker_status_from_proto(message: admin_pb2.WorkerStatus) -> WorkerStatus:
    return _same_fields_from(
        WorkerStatus,
        message,
        worker=worker_info_from_proto(message.worker),
        pool=pool_from_proto(message.pool),
        health=Health(message.health),
        load=load_from_proto(message.load),
    )


def fleet_status_to_proto(status: FleetStatus) -> admin_pb2.FleetStatus:
    return _same_fields_to(
        admin_pb2.FleetStatus, status, workers=[worker_status_to_proto(worker) for worker in status.workers]
    )


def fleet_status_from_proto(message: admin_pb2.FleetStatus) -> FleetStatus:
    return _same_fields_from(
        FleetStatus, message, workers=tuple(worker_status_from_proto(worker) for worker in message.workers)
    )


# Shared -------------------------------------------------------------------------------------------------------------
MessageT = TypeVar("MessageT", bound=Message)
ValueT = TypeVar("ValueT")


def _same_fields_to(kind: type[MessageT], value: object, **others: Any) -> MessageT:
    """The proto and the dataclass name their fields alike (a test asserts it); `others` are those of other types."""
    names = (field.name for field in kind.DESCRIPTOR.fields)
    return kind(**{name: getattr(value, name) for name in names if name not in others}, **others)


def _same_fields_from(kind: type[ValueT], message: Message, **others: Any) -> ValueT:
    names = (field.name for field in message.DESCRIPTOR.fields)
    return kind(**{name: getattr(message, name) for name in names if name not in others}, **others)


def _key_of(table: Mapping[KeyT, int], value: int) -> KeyT | None:
    return next((key for key, number in table.items() if number == value), None)


def _job_fields(message: worker_pb2.Job) -> dict[str, Any]:
    names = ("job_id", "request_id", "deadline_s", "priority")
    return {"prompt": tuple(message.prompt), **{name: getattr(message, name) for name in names}}


def _set_prompt(
    message: inference_pb2.GenerateRequest, prompt: str | tuple[int, ...] | tuple[ChatMessage, ...]
) -> None:
    if isinstance(prompt, str):
        message.text = prompt
    elif prompt and isinstance(prompt[0], ChatMessage):
        message.messages.messages.extend(
            inference_pb2.ChatMessage(role=said.role, content=said.content)
            for said in prompt
            if isinstance(said, ChatMessage)
        )
    else:
        message.token_ids.SetInParent()
        _fill(message.token_ids.ids, prompt, "token_ids")


def _prompt(message: inference_pb2.GenerateRequest) -> str | tuple[int, ...] | tuple[ChatMessage, ...]:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return message.text
    if kind == "token_ids":
        return tuple(message.token_ids.ids)
    if kind == "messages":
        messages = message.messages.messages
        if messages:
            return tuple(ChatMessage(said.role, said.content) for said in messages)
    raise InvalidRequest(kind or "prompt", "is empty; set text, token_ids or messages")


def _logprobs_to_proto(tokens: Iterable[tuple[Logprob, ...]]) -> list[inference_pb2.TokenLogprobs]:
    return [
        inference_pb2.TokenLogprobs(
            top=[inference_pb2.Logprob(token_id=p.token_id, logprob=p.logprob, rank=p.rank) for p in token]
        )
        for token in tokens
    ]


def _logprobs_from_proto(tokens: Iterable[inference_pb2.TokenLogprobs]) -> tuple[tuple[Logprob, ...], ...]:
    return tuple(tuple(Logprob(p.token_id, p.logprob, p.rank) for p in token.top) for token in tokens)


def _assign(message: Message, name: str, value: object, field: str) -> None:
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field, f"{value!r} can't be sent: {error}") from error


def _fill(repeated: Any, values: Iterable[object], field: str) -> None:
    try:
        repeated.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field, f"can't be sent: {error}") from error
