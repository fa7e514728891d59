"""Settings: one YAML per process, and `cluster.yaml` for `splitserve up`. An unknown key is an error naming its path.

Secrets and pod identity come from the environment; everything else is here, with its unit and the reason
for its default.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from splitserve.core.errors import ConfigError
from splitserve.core.worker import KvMode, Pool

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _port_in_range(address: str) -> str:
    if int(address.rpartition(":")[2]) > 65535:
        raise ValueError("the port must be at most 65535")
    return address


Address = Annotated[
    str, Field(pattern=r"^[^\s:]+:\d{1,5}$|^\[[0-9a-fA-F:]+\]:\d{1,5}$"), AfterValidator(_port_in_range)
]


class Settings(BaseModel):
    """Base: frozen, and no key is ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _vllm_unless_said(value: object) -> object:
    return {"kind": "vllm", **value} if isinstance(value, dict) else value


class CudaGraphs(StrEnum):
    """Which CUDA graphs an engine that pushes layer by layer may use."""

    FULL_DECODE = "full_decode"  # whole-step graphs for decode-only batches; prefill runs piece by piece
    PIECEWISE = "piecewise"  # every batch piece by piece, so that each layer's hook runs


class KvBuffer(StrEnum):
    """The memory that KV leaves from and arrives in."""

    AUTO = "auto"  # device, or host where the device's memory can't be registered
    DEVICE = "device"  # the KV cache itself
    HOST = "host"  # a copy of it in host memory, as large as the cache


class KvTransferSettings(Settings):
    """How KV moves. Must be the same on every worker of a fleet, `host` and `buffer` excepted."""

    mode: KvMode = Field(
        KvMode.PUSH, description="push: layer by layer while the prompt is read; pull: stock vLLM connector"
    )
    lease_s: Seconds = Field(30.0, description="how long a source keeps computed KV that nobody has claimed")
    peer_silent_s: Seconds = Field(
        5.0, description="a peer that answers no ping for so long is suspect; a busy GIL stays below"
    )
    quarantine_share: float = Field(
        0.25,
        gt=0,
        le=1,
        description="share of blocks that may wait for a silent peer before the worker drains and restarts",
    )
    link_in_flight_mib: Count = Field(
        64, description="most MiB in flight to one rank of another worker; more waits, the earliest deadline first"
    )
    write_mib: Count = Field(8, description="most MiB in one WRITE, so that a more urgent one need not wait long")
    cuda_graphs: CudaGraphs = Field(
        CudaGraphs.FULL_DECODE,
        description="full_decode keeps TPOT; piecewise lets hooks run in every batch, where prefill uses full graphs",
    )
    buffer: KvBuffer = Field(
        KvBuffer.AUTO,
        description="host takes as much host memory as the KV cache and a copy at each end; auto avoids both if it can",
    )
    host: str = Field(
        "127.0.0.1", description="this machine's address for KV, control channel and transport; peers must reach it"
    )


class VllmSettings(Settings):
    """vLLM's own options, under vLLM's names. Unset means vLLM's default."""

    kind: Literal["vllm"] = "vllm"
    dtype: str = Field("auto", description="float32 for exactness on CPU")
    max_model_len: Count | None = None
    block_size: Count | None = Field(None, description="tokens per KV block; vLLM's CPU default is 128")
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    max_num_seqs: Count = Field(64, description="most sequences in one decode step")
    max_num_batched_tokens: Count = Field(2048, description="most tokens in one step: the prefill chunk")
    kv_cache_gib: Annotated[float, Field(gt=0)] = Field(1.0, description="CPU only: memory for KV, GiB")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    enable_prefix_caching: bool = True
    enforce_eager: bool | None = Field(None, description="default: True on CPU, False on GPU")
    loras: dict[str, str] = Field(
        default_factory=dict, description="LoRA adapters: what requests call each, and its directory (PEFT's format)"
    )
    tool_parser: str | None = Field(None, description="vLLM's parser of this model's tool calls, such as hermes")
    reasoning_parser: str | None = Field(None, description="vLLM's parser of its reasoning, such as deepseek_r1")
    profile: str | None = Field(
        None,
        description="what `splitserve profile` wrote of such a worker: with it requests are scheduled by their SLO "
        "class's objectives",
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="any other vLLM EngineArgs field, passed as it is")


class LatencySource(Settings):
    """Whose time a simulated engine takes: a measured profile's, or a model's on a GPU as the planner knows it."""

    profile: str | None = Field(None, description="what `splitserve profile` wrote")
    model: str | None = Field(None, description="a name that the planner knows, or a Hugging Face directory")
    gpu: str | None = Field(None, description="such as h100")
    tp: Count = 1
    pp: Count = 1

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.profile is None) == (self.model is None or self.gpu is None):
            raise ValueError("say either profile, or model and gpu")
        return self


class SimSettings(Settings):
    """The simulated engine: deterministic tokens; a step takes `step_s` and so much per token, or what `latency`
    says."""

    kind: Literal["sim"] = "sim"
    total_blocks: Count = 4096
    block_size: Count = Field(16, description="tokens per KV block")
    max_model_len: Count | None = Field(None, description="default: the model's")
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 2048
    step_s: float = Field(0.002, ge=0, description="fixed cost of a step")
    prefill_token_s: float = Field(0.00002, ge=0, description="per prompt token in a step")
    decode_token_s: float = Field(0.0001, ge=0, description="per decoding sequence in a step")
    context_token_s: float = Field(0.0, ge=0, description="per token of context read by decoding sequences")
    latency: LatencySource | None = Field(None, description="in place of these four")
    transport: Literal["auto", "shm", "tcp"] = Field(
        "auto",
        description="how KV moves: shared memory within a machine, TCP between machines; auto: shm where "
        "kv_transfer.host is loopback. The same on every worker",
    )
    loras: list[str] = Field(default_factory=list, description="names of adapters; each makes other tokens")
    tool_parser: Literal["sim"] | None = Field(None, description="outputs of chats may call tools")
    reasoning_parser: Literal["sim"] | None = Field(None, description="outputs of chats begin with reasoning")


EngineSettings = Annotated[VllmSettings | SimSettings, Field(discriminator="kind"), BeforeValidator(_vllm_unless_said)]


class TlsSettings(Settings):
    """What a listener shows of itself, and whom it lets in: PEM files, read again when they change."""

    certificate: str = Field(description="file: the listener's certificate, then those between it and its CA")
    key: str = Field(description="file: the certificate's private key")
    client_ca: str | None = Field(
        None, description="file: only clients with a certificate of these CAs are let in (mTLS); default: any client"
    )


class ClientTls(Settings):
    """How whoever calls a router knows it, and shows who it is: PEM files, read when a channel is opened."""

    ca: str | None = Field(None, description="file: the CAs that may vouch for the router; default: the public ones")
    certificate: str | None = Field(None, description="file: the caller's own certificate, for a router that asks")
    key: str | None = Field(None, description="file: that certificate's private key")
    server_name: str | None = Field(
        None, description="the name in the router's certificate, where it is called by another one, such as an address"
    )

    @model_validator(mode="after")
    def _a_pair(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("say both certificate and key, or neither")
        return self


class NodesSettings(Settings):
    """The machines of one worker, where its engine spans several: one process on each. Node 0 leads: it joins routers
    and serves. The others hold their ranks and end with it."""

    count: Count = Field(1, description="machines; each holds as many of the engine's ranks")
    rank: int = Field(0, ge=0, description="which of them this one is; node 0 leads")
    leader: str | None = Field(None, description="node 0's host, as it and the others reach it")
    port: int = Field(
        29600, ge=1, le=65534, description="node 0 listens here, and the engine's ranks meet at the next; same on all"
    )
    wait_s: Seconds = Field(600.0, description="how long a node waits for the others, before any loads the model")
    silent_s: Seconds = Field(
        10.0, description="a node that says nothing for so long is gone; above it a busy GIL is not"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.rank >= self.count:
            raise ValueError(f"rank {self.rank} is none of {self.count} nodes; they count from 0 to {self.count - 1}")
        if self.count > 1 and self.leader is None:
            raise ValueError("leader is not said; every node must know node 0's host (--leader)")
        return self


class WorkerConfig(Settings):
    """One worker process."""

    name: str = Field("", description="for people; default: pool and a short uuid")
    pool: Pool
    model: str = Field(
        "demo", description="Hugging Face model directory, or `demo` for the one that ships with splitserve"
    )
    served_model_name: str = Field("", description="default: the directory's name")
    routers: list[Address] = Field(
        default=["127.0.0.1:50051"],
        min_length=1,
        description="every router to join; a name stands for all addresses that it has, now and later",
    )
    engine: EngineSettings = Field(default_factory=VllmSettings)
    kv_transfer: KvTransferSettings = Field(default_factory=KvTransferSettings)
    nodes: NodesSettings = Field(default_factory=NodesSettings)
    router_tls: ClientTls | None = Field(None, description="TLS towards the routers; none unless said")
    api_key_file: str | None = Field(
        None, description="file: the API key for the routers, of scope worker; default: $SPLITSERVE_API_KEY, or none"
    )
    metrics: Address | None = Field(None, description="Prometheus address; none unless said")
    metrics_tls: TlsSettings | None = Field(None, description="serve metrics over HTTPS")
    insecure: bool = Field(False, description="let others than this machine reach what is not encrypted")
    cpu_core: int | None = Field(
        None,
        ge=0,
        description="pin an in-process CPU engine to this core; two engines on one core are ten times slower",
    )


class RequestLimits(Settings):
    """What a router takes of its clients; beyond it requests are refused by the field's name."""

    prompt_tokens: Count | None = Field(None, description="longest prompt; default: what the fleet can hold")
    choices: Count = Field(16, description="most outputs of one request: sampling.n")
    stop_strings: Count = Field(16, description="each is looked for in every token's text")
    logprobs: Count = Field(20, description="most of the likeliest tokens told per token")
    prompt_logprobs: Count = Field(
        200_000, description="entries of sampling.prompt_logprobs, over all prompt tokens: they come in one message"
    )
    logit_biases: Count = Field(1024, description="tokens in sampling.logit_bias")
    schema_kib: Count = Field(64, description="KiB of one schema, regex or grammar, and of all tools together")
    tools: Count = Field(128, description="functions in messages.tools")
    streams: Count = Field(10_000, description="requests at once, waiting or running; more get RESOURCE_EXHAUSTED")
    client_buffer_tokens: Count = Field(
        2048,
        description="tokens kept for a client that does not read; then its request stops, and resumes once it reads",
    )
    client_stall_s: Seconds = Field(
        60.0, description="a client that takes nothing for so long is ended with RESOURCE_EXHAUSTED"
    )


class Late(StrEnum):
    """What becomes of a request that can't meet its class's TTFT objective."""

    QUEUE = "queue"  # it waits, and lets those pass that still can
    REFUSE = "refuse"  # RESOURCE_EXHAUSTED at once, with the time after which to try again


class SloClass(Settings):
    """What requests of a class are to meet, and who goes first. What is not said is no objective."""

    ttft_s: Seconds | None = Field(None, description="time to first token")
    ttft_per_token_s: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="and so much more for each token of the prompt"
    )
    tpot_s: Seconds | None = Field(None, description="mean time per output token after the first")
    itl_p99_s: Seconds | None = Field(None, description="what 99% of the gaps between tokens are no longer than")
    priority: int = Field(0, ge=-1000, le=1000, description="added to the request's own; the lowest goes first")
    late: Late = Field(
        Late.QUEUE, description="what becomes of a request that would miss its TTFT objective: `queue` or `refuse`"
    )

    @model_validator(mode="after")
    def _what_needs_a_ttft(self) -> Self:
        if self.ttft_per_token_s and self.ttft_s is None:
            raise ValueError("ttft_per_token_s comes on top of ttft_s: say that too")
        if self.late is Late.REFUSE and self.ttft_s is None:
            raise ValueError("late: refuse is for those that would miss ttft_s: say that too")
        return self


DEFAULT_CLASS = "standard"
SLO_CLASSES = {
    "interactive": SloClass(ttft_s=1.0, ttft_per_token_s=0.0005, tpot_s=0.05, priority=-10),
    DEFAULT_CLASS: SloClass(),
    "batch": SloClass(priority=10),
}


class RouterConfig(Settings):
    """One router process."""

    listen: Address = "127.0.0.1:50051"
    http: Address | None = Field(
        None, description="OpenAI-compatible HTTP in this process; `up` takes 127.0.0.1:8000, a router by itself none"
    )
    console: bool = Field(True, description="serve the operators' page at /console, where there is HTTP")
    metrics: Address | None = Field("127.0.0.1:9400", description="Prometheus address")
    model: str = Field("demo", description="model directory, for its tokenizer and chat template")
    served_model_name: str = Field("", description="default: the directory's name")
    plan: str | None = Field(None, description="plan file: how far live traffic is from its workload becomes a metric")
    deadline_s: Seconds = Field(600.0, description="default deadline of a request")
    inter_token_deadline_s: Seconds = Field(
        30.0,
        description="default longest gap between tokens once the first is out, and the longest wait for a dispatched "
        "worker's first sign",
    )
    drain_timeout_s: Seconds = Field(
        60.0, description="how long running requests get to end on SIGTERM; then they end with UNAVAILABLE"
    )
    heartbeat_interval_s: Seconds = Field(0.5, description="how often workers report their load")
    heartbeat_timeout_s: Seconds = Field(
        8.0, description="a worker silent for so long is gone; above it a busy GIL is not"
    )
    probe_after_s: Seconds = Field(
        30.0, description="a worker that did nothing for so long is asked for a token; without one it gets no requests"
    )
    probe_timeout_s: Seconds = Field(10.0, description="how long that may take")
    chunk_gap_s: float = Field(
        0.004,
        ge=0,
        description="tokens of one request that come within so long of its last message go out together; longer steps "
        "than that notice nothing",
    )
    max_waiting_requests: Count = Field(4096, description="requests beyond this are refused with RESOURCE_EXHAUSTED")
    max_attempts: Count = Field(
        8, description="most routes tried for one request after failures (a full worker does not count)"
    )
    max_message_mib: Count = Field(
        16, description="largest gRPC message, MiB: a prompt of a million token ids takes 3 to 5, gRPC's default is 4"
    )
    max_body_mib: Count = Field(32, description="largest HTTP body, MiB: a million-token prompt takes 7")
    slo_classes: dict[str, SloClass] = Field(
        default_factory=lambda: dict(SLO_CLASSES),
        description="what a request's slo_class may be, beside `interactive`, `standard` and `batch`; what is said of "
        "one of these replaces it. A request that says none is of class `standard`",
    )
    debug: bool = Field(False, description="log each routing decision by prediction too, with its terms in seconds")
    limits: RequestLimits = Field(default_factory=RequestLimits)
    tls: TlsSettings | None = Field(None, description="TLS for gRPC, HTTP and metrics; none unless said")
    api_keys: str | None = Field(
        None, description="file: who may call, for what and how much (`router/keys`); default: whoever reaches it"
    )
    insecure: bool = Field(False, description="let others than this machine reach what has no TLS or asks for no key")

    @field_validator("slo_classes")
    @classmethod
    def _beside_the_usual(cls, said: dict[str, SloClass]) -> dict[str, SloClass]:
        return {**SLO_CLASSES, **said}


class PoolSettings(Settings):
    """One pool of `splitserve up`. Engine options here override the cluster's."""

    workers: int = Field(1, ge=0)
    engine: dict[str, Any] = Field(default_factory=dict)
    cpu_cores: list[int] | None = Field(
        None, description="without a GPU, one core per worker; default: spread over the machine's"
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="variables of these workers' processes, such as CUDA_MPS_ACTIVE_THREAD_PERCENTAGE; "
        "CUDA_VISIBLE_DEVICES is dealt out among them instead of the machine's GPUs",
    )


class ClusterConfig(Settings):
    """`cluster.yaml`: everything `splitserve up` starts on this machine."""

    model: str = "demo"
    served_model_name: str = ""
    engine: EngineSettings = Field(default_factory=VllmSettings)
    kv_transfer: KvTransferSettings = Field(default_factory=KvTransferSettings)
    router: RouterConfig = Field(default_factory=RouterConfig)
    pools: dict[Pool, PoolSettings] = Field(
        default_factory=lambda: {Pool.PREFILL: PoolSettings(), Pool.DECODE: PoolSettings()}
    )
    worker_metrics_port: int | None = Field(
        9401, ge=1, le=65535, description="first worker's Prometheus port, then upwards; taken ports are skipped"
    )
    restart: bool = Field(True, description="start a dead worker again")
    router_tls: ClientTls | None = Field(None, description="the workers' TLS towards the router, where that has tls")
    api_key_file: str | None = Field(None, description="file: the workers' API key, where the router has api_keys")

    @model_validator(mode="after")
    def _workers_reach_the_router(self) -> Self:
        if (self.router.tls is None) != (self.router_tls is None):
            raise ValueError("router.tls and router_tls go together: the router's side of TLS and its workers'")
        return self


SettingsT = TypeVar("SettingsT", bound=Settings)


def load(kind: type[SettingsT], file: str | Path) -> SettingsT:
    """Reads and validates one YAML file. Raises ConfigError naming the file and the path of the key at fault."""
    return parse(kind, read(file), str(file))


def read(file: str | Path) -> dict[str, Any]:
    """The mapping in one YAML file, not validated yet. Raises ConfigError naming the file."""
    try:
        loaded = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise ConfigError(str(file), error.strerror or str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), f"not valid YAML: {error}") from error
    if not isinstance(loaded, dict | None):
        raise ConfigError(str(file), "must hold a mapping of settings")
    return loaded or {}


def parse(kind: type[SettingsT], value: object, source: str) -> SettingsT:
    """Validates a loaded value; `source` (a file or an option) begins the error's path."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{source}: {_path(first['loc'])}", _sentence(first["type"], first["msg"])) from error


def _path(location: tuple[int | str, ...]) -> str:
    """The key's path as it stands in the file: pydantic puts the chosen engine kind after `engine`."""
    parts = [str(part) for part in location]
    kept = [part for before, part in zip(["", *parts], parts, strict=False) if (before, part) not in _UNION_TAGS]
    return ".".join(kept) or "(top)"


_UNION_TAGS = frozenset({("engine", "vllm"), ("engine", "sim")})
_SENTENCES = {
    "extra_forbidden": "unknown key; check its spelling and its place",
    "string_pattern_mismatch": "must be host:port, such as 127.0.0.1:50051",
}


def _sentence(kind: str, message: str) -> str:
    return _SENTENCES.get(kind, message.removeprefix("Value error, "))
