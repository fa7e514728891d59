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
    __slots__ = ("model", "workers", "waiting_requests", "running_requests", "router_uuid")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ROUTER_UUID_FIELD_NUMBER: _ClassVar[int]
    model: str
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    waiting_requests: int
    running_requests: int
    router_uuid: str
    def __init__(self, model: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., waiting_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., router_uuid: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "pool", "health", "load", "seconds_since_heartbeat", "seconds_since_token", "prefills", "decodes")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PREFILLS_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    worker: _worker_pb2.WorkerInfo
    pool: _worker_pb2.Pool
    health: str
    load: _worker_pb2.Load
    seconds_since_heartbeat: float
    seconds_since_token: float
    prefills: int
    decodes: int
    def __init__(self, worker: _Optional[_Union[_worker_pb2.WorkerInfo, _Mapping]] = ..., pool: _Optional[_Union[_worker_pb2.Pool, str]] = ..., health: _Optional[str] = ..., load: _Optional[_Union[_worker_pb2.Load, _Mapping]] = ..., seconds_since_heartbeat: _Optional[float] = ..., seconds_since_token: _Optional[float] = ..., prefills: _Optional[int] = ..., decodes: _Optional[int] = ...) -> None: ...

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
