from splitserve.rpc.gen import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetFleetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FleetStatus(_message.Message):
    __slots__ = ("model", "workers", "waiting_requests", "running_requests", "router_uuid", "classes", "links")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_UUID_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    waiting_requests: int
    running_requests: int
    router_uuid: str
    classes: _containers.RepeatedCompositeFieldContainer[ClassStatus]
    links: _containers.RepeatedCompositeFieldContainer[LinkStatus]
    def __init__(self, model: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., waiting_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., router_uuid: _Optional[str] = ..., classes: _Optional[_Iterable[_Union[ClassStatus, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[LinkStatus, _Mapping]]] = ...) -> None: ...

class ClassStatus(_message.Message):
    __slots__ = ("name", "ttft_s", "ttft_per_token_s", "tpot_s", "itl_p99_s", "ended", "met", "goodput_rps", "last_minute")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_PER_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    ITL_P99_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    MET_FIELD_NUMBER: _ClassVar[int]
    GOODPUT_RPS_FIELD_NUMBER: _ClassVar[int]
    LAST_MINUTE_FIELD_NUMBER: _ClassVar[int]
    name: str
    ttft_s: float
    ttft_per_token_s: float
    tpot_s: float
    itl_p99_s: float
    ended: int
    met: int
    goodput_rps: float
    last_minute: RecentOutputs
    def __init__(self, name: _Optional[str] = ..., ttft_s: _Optional[float] = ..., ttft_per_token_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., itl_p99_s: _Optional[float] = ..., ended: _Optional[int] = ..., met: _Optional[int] = ..., goodput_rps: _Optional[float] = ..., last_minute: _Optional[_Union[RecentOutputs, _Mapping]] = ...) -> None: ...

class RecentOutputs(_message.Message):
    __slots__ = ("ended", "met", "ttft", "tpot")
    ENDED_FIELD_NUMBER: _ClassVar[int]
    MET_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TPOT_FIELD_NUMBER: _ClassVar[int]
    ended: int
    met: int
    ttft: Percentiles
    tpot: Percentiles
    def __init__(self, ended: _Optional[int] = ..., met: _Optional[int] = ..., ttft: _Optional[_Union[Percentiles, _Mapping]] = ..., tpot: _Optional[_Union[Percentiles, _Mapping]] = ...) -> None: ...

class Percentiles(_message.Message):
    __slots__ = ("p50_s", "p90_s", "p99_s")
    P50_S_FIELD_NUMBER: _ClassVar[int]
    P90_S_FIELD_NUMBER: _ClassVar[int]
    P99_S_FIELD_NUMBER: _ClassVar[int]
    p50_s: float
    p90_s: float
    p99_s: float
    def __init__(self, p50_s: _Optional[float] = ..., p90_s: _Optional[float] = ..., p99_s: _Optional[float] = ...) -> None: ...

class LinkStatus(_message.Message):
    __slots__ = ("source", "destination", "transfers", "failed", "bytes", "bytes_before_prefill_ended")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_BEFORE_PREFILL_ENDED_FIELD_NUMBER: _ClassVar[int]
    source: str
    destination: str
    transfers: int
    failed: int
    bytes: int
    bytes_before_prefill_ended: int
    def __init__(self, source: _Optional[str] = ..., destination: _Optional[str] = ..., transfers: _Optional[int] = ..., failed: _Optional[int] = ..., bytes: _Optional[int] = ..., bytes_before_prefill_ended: _Optional[int] = ...) -> None: ...

class ListRequestsRequest(_message.Message):
    __slots__ = ("most",)
    MOST_FIELD_NUMBER: _ClassVar[int]
    most: int
    def __init__(self, most: _Optional[int] = ...) -> None: ...

class RunningRequests(_message.Message):
    __slots__ = ("requests", "total")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RunningRequest]
    total: int
    def __init__(self, requests: _Optional[_Iterable[_Union[RunningRequest, _Mapping]]] = ..., total: _Optional[int] = ...) -> None: ...

class RunningRequest(_message.Message):
    __slots__ = ("request_id", "slo_class", "phase", "prompt_tokens", "output_tokens", "since_s", "prefill_worker", "decode_worker")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SLO_CLASS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    slo_class: str
    phase: str
    prompt_tokens: int
    output_tokens: int
    since_s: float
    prefill_worker: str
    decode_worker: str
    def __init__(self, request_id: _Optional[str] = ..., slo_class: _Optional[str] = ..., phase: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., since_s: _Optional[float] = ..., prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("request_id", "slo_class", "priority", "prompt_tokens", "output_tokens", "since_s", "ttft_s", "tpot_s", "itl_p99_s", "place", "waits_for", "decisions")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SLO_CLASS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    ITL_P99_S_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    slo_class: str
    priority: int
    prompt_tokens: int
    output_tokens: int
    since_s: float
    ttft_s: float
    tpot_s: float
    itl_p99_s: float
    place: int
    waits_for: str
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    def __init__(self, request_id: _Optional[str] = ..., slo_class: _Optional[str] = ..., priority: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., since_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., itl_p99_s: _Optional[float] = ..., place: _Optional[int] = ..., waits_for: _Optional[str] = ..., decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("decode_worker", "prefill_worker", "moved", "predicted", "waited_s", "behind", "left_s", "read_s", "ttft_s", "first_token_s", "since_s", "ended")
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    READ_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    decode_worker: str
    prefill_worker: str
    moved: bool
    predicted: bool
    waited_s: float
    behind: int
    left_s: float
    read_s: float
    ttft_s: float
    first_token_s: float
    since_s: float
    ended: str
    def __init__(self, decode_worker: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., moved: _Optional[bool] = ..., predicted: _Optional[bool] = ..., waited_s: _Optional[float] = ..., behind: _Optional[int] = ..., left_s: _Optional[float] = ..., read_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., first_token_s: _Optional[float] = ..., since_s: _Optional[float] = ..., ended: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "pool", "health", "load", "seconds_since_heartbeat", "seconds_since_token", "prefills", "decodes", "step_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PREFILLS_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    worker: _worker_pb2.WorkerInfo
    pool: _worker_pb2.Pool
    health: str
    load: _worker_pb2.Load
    seconds_since_heartbeat: float
    seconds_since_token: float
    prefills: int
    decodes: int
    step_s: float
    def __init__(self, worker: _Optional[_Union[_worker_pb2.WorkerInfo, _Mapping]] = ..., pool: _Optional[_Union[_worker_pb2.Pool, str]] = ..., health: _Optional[str] = ..., load: _Optional[_Union[_worker_pb2.Load, _Mapping]] = ..., seconds_since_heartbeat: _Optional[float] = ..., seconds_since_token: _Optional[float] = ..., prefills: _Optional[int] = ..., decodes: _Optional[int] = ..., step_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker", "timeout_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    worker: str
    timeout_s: float
    def __init__(self, worker: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("finished_requests", "migrated_requests")
    FINISHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MIGRATED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    finished_requests: int
    migrated_requests: int
    def __init__(self, finished_requests: _Optional[int] = ..., migrated_requests: _Optional[int] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("request_id", "worker", "timeout_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    worker: str
    timeout_s: float
    def __init__(self, request_id: _Optional[str] = ..., worker: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class MigrateResponse(_message.Message):
    __slots__ = ("from_worker", "to_worker", "stall_s")
    FROM_WORKER_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    from_worker: str
    to_worker: str
    stall_s: float
    def __init__(self, from_worker: _Optional[str] = ..., to_worker: _Optional[str] = ..., stall_s: _Optional[float] = ...) -> None: ...

class SetWorkerPoolRequest(_message.Message):
    __slots__ = ("worker", "pool")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    worker: str
    pool: _worker_pb2.Pool
    def __init__(self, worker: _Optional[str] = ..., pool: _Optional[_Union[_worker_pb2.Pool, str]] = ...) -> None: ...
