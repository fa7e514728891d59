"""What a client asks for, and what it gets: plain values, no behaviour."""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


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


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request as the client sent it. `prompt` is text, token ids or chat messages; deadlines are seconds."""

    prompt: str | tuple[int, ...] | tuple[ChatMessage, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""
    request_id: str = ""
    slo_class: str = "standard"
    priority: int = 0
    session_id: str = ""
    deadline_s: float | None = None
    inter_token_deadline_s: float | None = None


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
    """A piece of the output. `index` is the position of its first token; the last chunk has finish_reason, usage and
    timings. `logprobs` has one tuple per token, the sampled token first, or is empty."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[tuple[Logprob, ...], ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
