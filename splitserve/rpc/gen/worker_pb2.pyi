from splitserve.rpc.gen import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Pool(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOL_UNSPECIFIED: _ClassVar[Pool]
    POOL_PREFILL: _ClassVar[Pool]
    POOL_DECODE: _ClassVar[Pool]

class Failure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_UNSPECIFIED: _ClassVar[Failure]
    FAILURE_NOT_NOW: _ClassVar[Failure]
    FAILURE_TRANSFER: _ClassVar[Failure]
    FAILURE_CANCELLED: _ClassVar[Failure]
    FAILURE_INVALID: _ClassVar[Failure]
    FAILURE_ENGINE: _ClassVar[Failure]
    FAILURE_MIGRATED: _ClassVar[Failure]
POOL_UNSPECIFIED: Pool
POOL_PREFILL: Pool
POOL_DECODE: Pool
FAILURE_UNSPECIFIED: Failure
FAILURE_NOT_NOW: Failure
FAILURE_TRANSFER: Failure
FAILURE_CANCELLED: Failure
FAILURE_INVALID: Failure
FAILURE_ENGINE: Failure
FAILURE_MIGRATED: Failure

class WorkerMessage(_message.Message):
    __slots__ = ("join", "deltas", "load", "cache_news")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CACHE_NEWS_FIELD_NUMBER: _ClassVar[int]
    join: Join
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    load: Load
    cache_news: _containers.RepeatedCompositeFieldContainer[CacheNews]
    def __init__(self, join: _Optional[_Union[Join, _Mapping]] = ..., deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., cache_news: _Optional[_Iterable[_Union[CacheNews, _Mapping]]] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("welcome", "job", "cancel", "peers", "set_pool", "drain", "hand_over")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    SET_POOL_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    job: Job
    cancel: Cancel
    peers: Peers
    set_pool: SetPool
    drain: Drain
    hand_over: HandOver
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., job: _Optional[_Union[Job, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., peers: _Optional[_Union[Peers, _Mapping]] = ..., set_pool: _Optional[_Union[SetPool, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., hand_over: _Optional[_Union[HandOver, _Mapping]] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("protocol_version", "worker", "max_protocol_version")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MAX_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker: WorkerInfo
    max_protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ..., worker: _Optional[_Union[WorkerInfo, _Mapping]] = ..., max_protocol_version: _Optional[int] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("uuid", "name", "pool", "model", "kv", "kv_peers", "total_blocks", "max_sequences", "max_model_len", "metrics_address", "pid", "engine", "restores", "loras", "step_cost")
    UUID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    KV_PEERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    STEP_COST_FIELD_NUMBER: _ClassVar[int]
    uuid: str
    name: str
    pool: Pool
    model: str
    kv: KvFormat
    kv_peers: _containers.RepeatedCompositeFieldContainer[KvPeer]
    total_blocks: int
    max_sequences: int
    max_model_len: int
    metrics_address: str
    pid: int
    engine: str
    restores: _containers.RepeatedScalarFieldContainer[str]
    loras: _containers.RepeatedScalarFieldContainer[str]
    step_cost: StepCost
    def __init__(self, uuid: _Optional[str] = ..., name: _Optional[str] = ..., pool: _Optional[_Union[Pool, str]] = ..., model: _Optional[str] = ..., kv: _Optional[_Union[KvFormat, _Mapping]] = ..., kv_peers: _Optional[_Iterable[_Union[KvPeer, _Mapping]]] = ..., total_blocks: _Optional[int] = ..., max_sequences: _Optional[int] = ..., max_model_len: _Optional[int] = ..., metrics_address: _Optional[str] = ..., pid: _Optional[int] = ..., engine: _Optional[str] = ..., restores: _Optional[_Iterable[str]] = ..., loras: _Optional[_Iterable[str]] = ..., step_cost: _Optional[_Union[StepCost, _Mapping]] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("fixed_s", "prefill_fixed_s", "token_s", "token_break", "token_more_s", "pair_s", "chunk_s", "decode_s", "decode_break", "decode_more_s", "context_s", "stages")
    FIXED_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIXED_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BREAK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_MORE_S_FIELD_NUMBER: _ClassVar[int]
    PAIR_S_FIELD_NUMBER: _ClassVar[int]
    CHUNK_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_BREAK_FIELD_NUMBER: _ClassVar[int]
    DECODE_MORE_S_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_S_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    fixed_s: float
    prefill_fixed_s: float
    token_s: float
    token_break: float
    token_more_s: float
    pair_s: float
    chunk_s: float
    decode_s: float
    decode_break: float
    decode_more_s: float
    context_s: float
    stages: int
    def __init__(self, fixed_s: _Optional[float] = ..., prefill_fixed_s: _Optional[float] = ..., token_s: _Optional[float] = ..., token_break: _Optional[float] = ..., token_more_s: _Optional[float] = ..., pair_s: _Optional[float] = ..., chunk_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., decode_break: _Optional[float] = ..., decode_more_s: _Optional[float] = ..., context_s: _Optional[float] = ..., stages: _Optional[int] = ...) -> None: ...

class KvFormat(_message.Message):
    __slots__ = ("model_fingerprint", "dtype", "block_size", "layers", "kv_heads", "head_dim", "mode", "block_bytes", "transport")
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    model_fingerprint: str
    dtype: str
    block_size: int
    layers: int
    kv_heads: int
    head_dim: int
    mode: str
    block_bytes: int
    transport: str
    def __init__(self, model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., mode: _Optional[str] = ..., block_bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class KvPeer(_message.Message):
    __slots__ = ("uuid", "endpoint", "part", "public_key", "control")
    UUID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    uuid: str
    endpoint: str
    part: KvPart
    public_key: str
    control: Versions
    def __init__(self, uuid: _Optional[str] = ..., endpoint: _Optional[str] = ..., part: _Optional[_Union[KvPart, _Mapping]] = ..., public_key: _Optional[str] = ..., control: _Optional[_Union[Versions, _Mapping]] = ...) -> None: ...

class Versions(_message.Message):
    __slots__ = ("lowest", "highest")
    LOWEST_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_FIELD_NUMBER: _ClassVar[int]
    lowest: int
    highest: int
    def __init__(self, lowest: _Optional[int] = ..., highest: _Optional[int] = ...) -> None: ...

class KvPart(_message.Message):
    __slots__ = ("first_layer", "layers", "first_head", "heads", "tensor_rank", "replica", "replicas")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_RANK_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    layers: int
    first_head: int
    heads: int
    tensor_rank: int
    replica: int
    replicas: int
    def __init__(self, first_layer: _Optional[int] = ..., layers: _Optional[int] = ..., first_head: _Optional[int] = ..., heads: _Optional[int] = ..., tensor_rank: _Optional[int] = ..., replica: _Optional[int] = ..., replicas: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("seen_jobs", "free_blocks", "free_sequences", "prefill_tokens", "prefill_token_limit", "parked_limit_blocks", "running", "quarantined_blocks", "pinned_blocks", "pool", "draining", "produced_tokens", "routers", "tpot_s", "slack_s", "slowdown", "growth_blocks")
    SEEN_JOBS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKEN_LIMIT_FIELD_NUMBER: _ClassVar[int]
    PARKED_LIMIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PRODUCED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    SLACK_S_FIELD_NUMBER: _ClassVar[int]
    SLOWDOWN_FIELD_NUMBER: _ClassVar[int]
    GROWTH_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    seen_jobs: int
    free_blocks: int
    free_sequences: int
    prefill_tokens: int
    prefill_token_limit: int
    parked_limit_blocks: int
    running: int
    quarantined_blocks: int
    pinned_blocks: int
    pool: Pool
    draining: bool
    produced_tokens: int
    routers: int
    tpot_s: float
    slack_s: float
    slowdown: float
    growth_blocks: int
    def __init__(self, seen_jobs: _Optional[int] = ..., free_blocks: _Optional[int] = ..., free_sequences: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., prefill_token_limit: _Optional[int] = ..., parked_limit_blocks: _Optional[int] = ..., running: _Optional[int] = ..., quarantined_blocks: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., pool: _Optional[_Union[Pool, str]] = ..., draining: _Optional[bool] = ..., produced_tokens: _Optional[int] = ..., routers: _Optional[int] = ..., tpot_s: _Optional[float] = ..., slack_s: _Optional[float] = ..., slowdown: _Optional[float] = ..., growth_blocks: _Optional[int] = ...) -> None: ...

class CacheNews(_message.Message):
    __slots__ = ("number", "events")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    number: int
    events: _containers.RepeatedCompositeFieldContainer[CacheEvent]
    def __init__(self, number: _Optional[int] = ..., events: _Optional[_Iterable[_Union[CacheEvent, _Mapping]]] = ...) -> None: ...

class CacheEvent(_message.Message):
    __slots__ = ("stored", "removed", "cleared")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    stored: BlocksStored
    removed: BlocksRemoved
    cleared: BlocksCleared
    def __init__(self, stored: _Optional[_Union[BlocksStored, _Mapping]] = ..., removed: _Optional[_Union[BlocksRemoved, _Mapping]] = ..., cleared: _Optional[_Union[BlocksCleared, _Mapping]] = ...) -> None: ...

class BlocksStored(_message.Message):
    __slots__ = ("hashes", "parent", "tokens", "block_size", "extras")
    HASHES_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[int]
    parent: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    block_size: int
    extras: _containers.RepeatedCompositeFieldContainer[BlockKeys]
    def __init__(self, hashes: _Optional[_Iterable[int]] = ..., parent: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., block_size: _Optional[int] = ..., extras: _Optional[_Iterable[_Union[BlockKeys, _Mapping]]] = ...) -> None: ...

class BlockKeys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[_Iterable[str]] = ...) -> None: ...

class BlocksRemoved(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hashes: _Optional[_Iterable[int]] = ...) -> None: ...

class BlocksCleared(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("router_uuid", "heartbeat_interval_s", "protocol_version")
    ROUTER_UUID_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    router_uuid: str
    heartbeat_interval_s: float
    protocol_version: int
    def __init__(self, router_uuid: _Optional[str] = ..., heartbeat_interval_s: _Optional[float] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("number", "job_id", "request_id", "prefill", "decode", "prompt", "ticket", "deadline_s", "priority", "lora", "cache_salt", "traceparent", "objectives")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVES_FIELD_NUMBER: _ClassVar[int]
    number: int
    job_id: str
    request_id: str
    prefill: PrefillJob
    decode: DecodeJob
    prompt: _containers.RepeatedScalarFieldContainer[int]
    ticket: Ticket
    deadline_s: float
    priority: int
    lora: str
    cache_salt: str
    traceparent: str
    objectives: Objectives
    def __init__(self, number: _Optional[int] = ..., job_id: _Optional[str] = ..., request_id: _Optional[str] = ..., prefill: _Optional[_Union[PrefillJob, _Mapping]] = ..., decode: _Optional[_Union[DecodeJob, _Mapping]] = ..., prompt: _Optional[_Iterable[int]] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ..., deadline_s: _Optional[float] = ..., priority: _Optional[int] = ..., lora: _Optional[str] = ..., cache_salt: _Optional[str] = ..., traceparent: _Optional[str] = ..., objectives: _Optional[_Union[Objectives, _Mapping]] = ...) -> None: ...

class Objectives(_message.Message):
    __slots__ = ("first_token_s", "tpot_s", "itl_s")
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    ITL_S_FIELD_NUMBER: _ClassVar[int]
    first_token_s: float
    tpot_s: float
    itl_s: float
    def __init__(self, first_token_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., itl_s: _Optional[float] = ...) -> None: ...

class PrefillJob(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeJob(_message.Message):
    __slots__ = ("sampling", "output", "parse")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    PARSE_FIELD_NUMBER: _ClassVar[int]
    sampling: _inference_pb2.SamplingParams
    output: _containers.RepeatedScalarFieldContainer[int]
    parse: Parse
    def __init__(self, sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., output: _Optional[_Iterable[int]] = ..., parse: _Optional[_Union[Parse, _Mapping]] = ...) -> None: ...

class Parse(_message.Message):
    __slots__ = ("tools", "tool_choice")
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CHOICE_FIELD_NUMBER: _ClassVar[int]
    tools: _containers.RepeatedCompositeFieldContainer[_inference_pb2.Tool]
    tool_choice: _inference_pb2.ToolChoice
    def __init__(self, tools: _Optional[_Iterable[_Union[_inference_pb2.Tool, _Mapping]]] = ..., tool_choice: _Optional[_Union[_inference_pb2.ToolChoice, _Mapping]] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("transfer_id", "epoch", "source", "destination", "handover")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    epoch: int
    source: _containers.RepeatedCompositeFieldContainer[KvPeer]
    destination: _containers.RepeatedCompositeFieldContainer[KvPeer]
    handover: bytes
    def __init__(self, transfer_id: _Optional[str] = ..., epoch: _Optional[int] = ..., source: _Optional[_Iterable[_Union[KvPeer, _Mapping]]] = ..., destination: _Optional[_Iterable[_Union[KvPeer, _Mapping]]] = ..., handover: _Optional[bytes] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class HandOver(_message.Message):
    __slots__ = ("job_id", "ticket", "at_end")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    AT_END_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    ticket: Ticket
    at_end: bool
    def __init__(self, job_id: _Optional[str] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ..., at_end: _Optional[bool] = ...) -> None: ...

class Peers(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[KvPeer]
    def __init__(self, peers: _Optional[_Iterable[_Union[KvPeer, _Mapping]]] = ...) -> None: ...

class SetPool(_message.Message):
    __slots__ = ("pool",)
    POOL_FIELD_NUMBER: _ClassVar[int]
    pool: Pool
    def __init__(self, pool: _Optional[_Union[Pool, str]] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Delta(_message.Message):
    __slots__ = ("job_id", "index", "token_ids", "text", "logprobs", "outcome", "reasoning", "tool_calls", "prompt_logprobs")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASONING_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    outcome: Outcome
    reasoning: str
    tool_calls: _containers.RepeatedCompositeFieldContainer[_inference_pb2.ToolCall]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    def __init__(self, job_id: _Optional[str] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., reasoning: _Optional[str] = ..., tool_calls: _Optional[_Iterable[_Union[_inference_pb2.ToolCall, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("finish_reason", "failure", "message", "field", "handover", "transfer")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _inference_pb2.FinishReason
    failure: Failure
    message: str
    field: str
    handover: bytes
    transfer: TransferStats
    def __init__(self, finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., failure: _Optional[_Union[Failure, str]] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., handover: _Optional[bytes] = ..., transfer: _Optional[_Union[TransferStats, _Mapping]] = ...) -> None: ...

class TransferStats(_message.Message):
    __slots__ = ("bytes", "bytes_before_prefill_ended", "uncovered_s", "writes", "writing_s", "queued_s")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_BEFORE_PREFILL_ENDED_FIELD_NUMBER: _ClassVar[int]
    UNCOVERED_S_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    WRITING_S_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    bytes_before_prefill_ended: int
    uncovered_s: float
    writes: int
    writing_s: float
    queued_s: float
    def __init__(self, bytes: _Optional[int] = ..., bytes_before_prefill_ended: _Optional[int] = ..., uncovered_s: _Optional[float] = ..., writes: _Optional[int] = ..., writing_s: _Optional[float] = ..., queued_s: _Optional[float] = ...) -> None: ...
