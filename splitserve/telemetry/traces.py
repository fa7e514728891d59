"""What a router, a worker and a client tell of one request's way, as spans; and whether anybody records it.

A `Span` of this file records nothing and costs a method call: what it would be told is put together only by one that
records. Those, and OpenTelemetry, are in `otel`, which is imported once the environment switches tracing on. No global
state: `cli` makes a process's `Tracer` and hands it down, and a span's children are made from it, never found by
context. Spans never hold prompts or outputs. The names of attributes are here, each once: OpenTelemetry's own where
there is one (`gen_ai.*`, `rpc.*`, `error.*`), else `splitserve.*` with units.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, ParamSpec, Self

from splitserve.core.request import Chat, Chunk, FinishReason, GenerateRequest
from splitserve.core.worker import Failure, Job, Outcome, PrefillJob, TransferStats, WorkerInfo
from splitserve.telemetry.logs import Logger

REQUEST_SPAN = "splitserve.request"
QUEUE_SPAN = "queue"
ATTEMPT_SPAN = "attempt"
FIRST_TOKEN = "first_token"
TRACEPARENT = "traceparent"  # W3C Trace Context's header, in HTTP and gRPC alike

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTER = "OTEL_TRACES_EXPORTER"
_DISABLED = "OTEL_SDK_DISABLED"
_TRACESTATE = "tracestate"
_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_NO_FAULT = frozenset({Failure.NOT_NOW, Failure.CANCELLED, Failure.MIGRATED})
_CANCELLED = "CANCELLED"
# Which codes are a server's own fault, by OpenTelemetry's conventions for RPC.
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]
P = ParamSpec("P")


class Span:
    """`with span: ...` ends it, however the block ends. This one is not recorded; it passes its trace context on.

    `traceparent` is W3C's, for children elsewhere; empty if there is no trace. `describe(*args)` gives attributes and
    is called only if they are recorded.
    """

    __slots__ = ("traceparent",)
    recorded = False

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    def child(self, name: str, describe: Callable[P, Attributes], *args: P.args, **named: P.kwargs) -> "Span":
        return self

    def call(self, name: str, describe: Callable[P, Attributes], *args: P.args, **named: P.kwargs) -> "Span":
        """A child whose work is another process's."""
        return self

    def note(self, describe: Callable[P, Attributes], *args: P.args, **named: P.kwargs) -> None:
        """More attributes."""

    def event(self, name: str, describe: Callable[P, Attributes], *args: P.args, **named: P.kwargs) -> None: ...

    def fail(self, kind: str, sentence: str) -> None:
        """Ends it with an error, of a kind that one may count by."""

    def end(self) -> None:
        """Before its block does. What comes after is not recorded."""

    def carried_by(self, request: GenerateRequest) -> GenerateRequest:
        """The request with this span as its parent, if there is a trace."""
        return replace(request, traceparent=self.traceparent) if self.traceparent else request

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


_NONE = Span()


class Tracer:
    """Makes a process's first spans. This one records nothing: a request's trace goes past it to the workers."""

    def request(self, request: GenerateRequest, request_id: str, model: str) -> Span:
        """A router's span of a request that has come; `model` is what is served."""
        if not request.traceparent or _PARENT.fullmatch(request.traceparent) is None:
            return _NONE
        return Span(request.traceparent)

    def job(self, job: Job, worker: str) -> Span:
        """A worker's span of a job that it has taken; not recorded for a job that is not traced."""
        return _NONE


# Whether it is on ---------------------------------------------------------------------------------------------------
@contextmanager
def tracing(service: str, environment: Mapping[str, str] = os.environ) -> Iterator[Tracer]:
    """A process's tracer, and at the end its last spans sent. Off unless OpenTelemetry's variables name a collector;
    then a line in the log says why if it stays off all the same. `service` is its name unless they say another."""
    if not _asked_for(environment):
        yield Tracer()
        return
    try:
        from splitserve.telemetry import otel

        provider = otel.exporting(service) if _protocol(environment) == "grpc" else None
        reason = f"{_PROTOCOLS[1]} is {_protocol(environment)!r}; spans are sent by grpc only"
    except ImportError as error:
        provider, reason = None, f"{error.name} is not installed: pip install 'splitserve[otel]'"
    if provider is None:
        Logger("traces").warning("tracing is asked for, but off", reason=reason)
        yield Tracer()
        return
    with otel.recording(provider) as tracer:
        yield tracer


def _asked_for(environment: Mapping[str, str]) -> bool:
    """An exporter other than otlp is somebody else's."""
    if environment.get(_DISABLED, "").strip().lower() == "true":
        return False
    exporter = environment.get(_EXPORTER, "").strip()
    named = any(environment.get(name, "").strip() for name in _ENDPOINTS)
    return "otlp" in (part.strip() for part in exporter.split(",")) if exporter else named


def _protocol(environment: Mapping[str, str]) -> str:
    return next((said for name in _PROTOCOLS if (said := environment.get(name, "").strip())), "grpc")


def calling(request: GenerateRequest) -> Span:
    """A client's span of a request, under its program's current one. Not recorded for a program that has not loaded
    OpenTelemetry, or set it up; nor if the request brings a trace context along."""
    if "opentelemetry.trace" not in sys.modules or request.traceparent:
        return _NONE
    from splitserve.telemetry import otel

    return otel.calling(request)


def carried(request: GenerateRequest, headers: Iterable[tuple[str, Any]] | None) -> GenerateRequest:
    """The request with the trace context that a call's headers say, where it says none itself."""
    if request.traceparent:
        return request
    said = [(name, value) for name, value in headers or () if name in (TRACEPARENT, _TRACESTATE)]
    parent = next((value for name, value in said if name == TRACEPARENT), "")
    states = [value for name, value in said if name == _TRACESTATE]
    return replace(request, traceparent=parent, tracestate=",".join(states)) if parent else request


# What spans say -----------------------------------------------------------------------------------------------------
def nothing() -> Attributes:
    return {}


def operation(request: GenerateRequest) -> str:
    return "chat" if isinstance(request.prompt, Chat) else "text_completion"


def asked(request: GenerateRequest, request_id: str, model: str) -> Attributes:
    """What is set: fields that have their default are left out where the default is "none"."""
    sampling = request.sampling
    said: dict[str, Value | None] = {
        "gen_ai.operation.name": operation(request),
        "gen_ai.provider.name": "splitserve",
        "gen_ai.request.model": model or None,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": sampling.n if sampling.n != 1 else None,
        "gen_ai.response.id": request_id or None,
        "splitserve.request_id": request_id or None,
        "splitserve.slo_class": request.slo_class,
        "splitserve.priority": request.priority,
        "splitserve.lora": request.lora or None,
        "splitserve.resumed_tokens": len(request.output) or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def answered(last: Chunk) -> Attributes:
    """Of a request's last chunk."""
    said: dict[str, Value] = {}
    if last.usage is not None:
        said["gen_ai.usage.input_tokens"] = last.usage.prompt_tokens
        said["gen_ai.usage.output_tokens"] = last.usage.output_tokens
    if last.timings is not None:
        said["gen_ai.response.time_to_first_chunk"] = last.timings.ttft_s
        said |= {f"splitserve.{field.name}": getattr(last.timings, field.name) for field in fields(last.timings)}
    return said


def note_answered(span: Span, last: Chunk | None) -> None:
    if last is not None:
        span.note(answered, last)


def finish_reasons(reasons: Mapping[int, FinishReason | None]) -> Attributes:
    """Of each of a request's outputs, by its number."""
    return {"gen_ai.response.finish_reasons": [str(reasons[choice]) for choice in sorted(reasons)]}


def status(code: str) -> Attributes:
    """What the call ended with: a gRPC code's name."""
    return {"rpc.response.status_code": code}


def cancelled() -> Attributes:
    return {"splitserve.cancelled": True}


def waits(number: int, choice: int, tokens: int) -> Attributes:
    """The wait for a route. `number` counts routes from 1, `choice` is the output's, `tokens` go to the model."""
    return {"splitserve.route": number, "splitserve.choice": choice, "splitserve.tokens": tokens}


def route(number: int, choice: int, decode: WorkerInfo, prefill: WorkerInfo | None, moved: bool) -> Attributes:
    """An attempt's; `moved`: it goes on with KV that came from another decode worker."""
    return {
        "splitserve.route": number,
        "splitserve.choice": choice,
        "splitserve.prefill_worker": prefill.name if prefill is not None else "",
        "splitserve.decode_worker": decode.name,
        "splitserve.moved": moved,
    }


def ending(outcome: str, output_tokens: int) -> Attributes:
    """How an attempt or a job ended, a finish reason or why not, and the tokens that it made itself."""
    return {"splitserve.outcome": outcome, "gen_ai.usage.output_tokens": output_tokens}


def job_taken(job: Job, worker: str) -> Attributes:
    return {
        "splitserve.request_id": job.request_id,
        "splitserve.job_id": job.job_id,
        "splitserve.worker": worker,
        "splitserve.tokens": len(job.prompt) if isinstance(job, PrefillJob) else len(job.prompt) + len(job.output),
        "splitserve.waits_for_kv": not isinstance(job, PrefillJob) and job.ticket is not None,
    }


def transferred(stats: TransferStats) -> Attributes:
    """What a prefill worker has written, as either side knows it; `uncovered_s` below 0: it was there before the
    prefill's end."""
    return {
        "splitserve.kv_bytes": stats.bytes,
        "splitserve.kv_bytes_before_prefill_ended": stats.bytes_before_prefill_ended,
        "splitserve.uncovered_s": stats.uncovered_s,
        "splitserve.writes": stats.writes,
        "splitserve.writing_s": stats.writing_s,
        "splitserve.write_queued_s": stats.queued_s,
    }


def job_name(job: Job) -> str:
    return "prefill" if isinstance(job, PrefillJob) else "decode"


def end_request(span: Span, code: str, sentence: str) -> None:
    """Tells a router's span of a request how it ended, a gRPC code's name, and ends it. Its status is an error where
    that is the server's fault; the rest is its caller's business."""
    span.note(status, code)
    if code == _CANCELLED:
        span.note(cancelled)
    if code in _SERVER_FAULTS:
        span.fail(code, sentence)
    span.end()


def end_job(span: Span, outcome: Outcome, output_tokens: int) -> None:
    """Tells a job's span how it ended, and ends it."""
    failure = outcome.failure
    if outcome.transfer is not None:
        span.note(transferred, outcome.transfer)
    span.note(ending, str(failure or outcome.finish_reason), output_tokens)
    if failure is not None and failure not in _NO_FAULT:
        span.fail(failure.value, outcome.message)
    span.end()
