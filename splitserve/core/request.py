"""What a client asks for, and what it gets: plain values, no behaviour."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # as STOP, and the output calls tools


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the output must keep to: exactly one of these is set. `json_schema` is JSON text, `grammar` EBNF."""

    json_schema: str = ""
    json_object: bool = False
    regex: str = ""
    choice: tuple[str, ...] = ()
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `max_tokens` None means: what the model's length leaves after the prompt."""

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    structured_output: StructuredOutput | None = None
    skip_special_tokens: bool = True
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON. Of an output these are pieces: `id` and `name` are in a call's first one, and the arguments
    are to be put together; `index` says which call."""

    index: int = 0
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema; empty: it has none."""

    name: str
    description: str = ""
    parameters: str = ""


class ToolMode(StrEnum):
    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`function`, if it is set, must be called; `mode` does not count then."""

    mode: ToolMode = ToolMode.AUTO
    function: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """Rendered with the model's chat template. `template_args` is a JSON object of further variables for it."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    template_args: str = ""
    continue_final_message: bool = False


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request as the client sent it. `prompt` is text, token ids or a chat; deadlines are seconds; `output` is what
    an earlier stream of it made before that was cut off."""

    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""
    request_id: str = ""
    slo_class: str = "standard"
    priority: int = 0
    session_id: str = ""
    deadline_s: float | None = None
    inter_token_deadline_s: float | None = None
    lora: str = ""
    cache_salt: str = ""
    output: tuple[int, ...] = ()
    traceparent: str = ""  # W3C Trace Context of the caller's span; empty: it has none
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """What is served. `parent` is the model that a LoRA adapter adapts; `created` is Unix time."""

    name: str
    max_model_len: int
    parent: str = ""
    created: int = 0


@dataclass(frozen=True, slots=True)
class Logprob:
    """`rank` 1 is the likeliest token."""

    token_id: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the request's arrival; fields as in inference.proto."""

    queue_s: float
    prefill_s: float
    transfer_s: float
    ttft_s: float
    tpot_s: float
    prefill_worker: str
    decode_worker: str
    kv_bytes: int
    kv_bytes_before_prefill_ended: int
    attempts: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one choice's output. `index` is the position of its first token; a choice's last chunk has
    finish_reason, the stream's last one usage and timings. `logprobs` has one tuple per token, the sampled token first,
    or is empty; `prompt_logprobs` one per prompt token in the first chunk, the first of them empty."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[tuple[Logprob, ...], ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    choice: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_logprobs: tuple[tuple[Logprob, ...], ...] = ()
