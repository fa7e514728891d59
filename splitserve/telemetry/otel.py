"""Spans that OpenTelemetry records: the one file that imports it, and only where tracing is on (`traces`).

Its SDK is set up from its own OTEL_* variables, in an object of ours: the program's global tracer provider, if there is
one, is left alone. A `Span` belongs to one task; the SDK's exporter has a thread, which sends batches and gives up what
it can't send rather than wait.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from splitserve import __version__
from splitserve.core.request import GenerateRequest
from splitserve.core.worker import Job
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.traces import (
    REQUEST_SPAN,
    Attributes,
    P,
    Span,
    Tracer,
    asked,
    cancelled,
    job_name,
    job_taken,
    operation,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_SCOPE = "splitserve"
_LAST_SPANS_WITHIN_S = 5.0


class RecordedSpan(Span):
    """One that somebody will see."""

    __slots__ = ("_context", "_span", "_tracer", "_tracestate")
    recorded = True

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        known = span.get_span_context()
        super().__init__(_traceparent(known))
        self._tracestate = known.trace_state.to_header()
        self._tracer = tracer
        self._span = span
        self._context = trace.set_span_in_context(span, Context())

    def child(self, name: str, describe: Callable[P, Attributes], *args: P.args, **named: P.kwargs) -> Span:
        return _begun(self._tracer, name, self._context, trace.SpanKind.INTERNAL, describe(*args, **named))

    def call(self, name: str, describe: Callable[P, Attributes], *args: P.args, **named: P.kwargs) -> Span:
        return _begun(self._tracer, name, self._context, trace.SpanKind.CLIENT, describe(*args, **named))

    def note(self, describe: Callable[P, Attributes], *args: P.args, **named: P.kwargs) -> None:
        if self._span.is_recording():
            self._span.set_attributes(describe(*args, **named))

    def event(self, name: str, describe: Callable[P, Attributes], *args: P.args, **named: P.kwargs) -> None:
        if self._span.is_recording():
            self._span.add_event(name, describe(*args, **named))

    def fail(self, kind: str, sentence: str) -> None:
        if self._span.is_recording():
            self._span.set_attribute("error.type", kind)
            self._span.set_status(trace.StatusCode.ERROR, sentence)
            self._span.end()

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end()

    def carried_by(self, request: GenerateRequest) -> GenerateRequest:
        return replace(request, traceparent=self.traceparent, tracestate=self._tracestate)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.note(cancelled)
        elif error is not None:
            self.fail(type(error).__name__, str(error))
        self.end()


class RecordingTracer(Tracer):
    def __init__(self, provider: trace.TracerProvider) -> None:
        self._tracer = provider.get_tracer(_SCOPE, __version__)

    def request(self, request: GenerateRequest, request_id: str, model: str) -> Span:
        parent, about = _context_of(request.traceparent, request.tracestate), asked(request, request_id, model)
        return _begun(self._tracer, REQUEST_SPAN, parent, trace.SpanKind.SERVER, about)

    def job(self, job: Job, worker: str) -> Span:
        parent = _context_of(job.traceparent) if job.traceparent else Context()
        if not trace.get_current_span(parent).get_span_context().is_valid:
            return Span()
        return _begun(self._tracer, job_name(job), parent, trace.SpanKind.SERVER, job_taken(job, worker))


# Setting up ---------------------------------------------------------------------------------------------------------
def exporting(service: str) -> "TracerProvider":
    """What the environment says, sent to where it says. Raises ImportError for a part that is not installed."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: service}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


@contextmanager
def recording(provider: "TracerProvider") -> Iterator[Tracer]:
    """At the end the last spans get a moment to be sent: a collector that is away must not hold up a process's end."""
    try:
        yield RecordingTracer(provider)
    finally:
        sending = threading.Thread(target=provider.shutdown, name="send the last spans", daemon=True)
        sending.start()
        sending.join(_LAST_SPANS_WITHIN_S)
        if sending.is_alive():
            Logger("traces").warning("the last spans were not sent: the collector took too long")


# Clients ------------------------------------------------------------------------------------------------------------
def calling(request: GenerateRequest) -> Span:
    """Under the program's current span, and recorded by whatever the program has set up."""
    tracer = trace.get_tracer(_SCOPE, __version__)
    name = f"{operation(request)} {request.model}".strip()
    return _begun(tracer, name, None, trace.SpanKind.CLIENT, asked(request, request.request_id, request.model))


# --------------------------------------------------------------------------------------------------------------------
def _begun(
    tracer: trace.Tracer, name: str, parent: Context | None, kind: trace.SpanKind, attributes: Attributes
) -> Span:
    """One that is not sampled is not recorded, and says so to its children elsewhere."""
    span = tracer.start_span(name, parent, kind, attributes)
    known = span.get_span_context()
    if span.is_recording():
        return RecordedSpan(tracer, span)
    return Span(_traceparent(known) if known.is_valid else "")


def _traceparent(known: trace.SpanContext) -> str:
    return f"00-{known.trace_id:032x}-{known.span_id:016x}-{known.trace_flags:02x}"


def _context_of(traceparent: str, tracestate: str = "") -> Context:
    """Empty for one that is not W3C's."""
    carrier = {"traceparent": traceparent, "tracestate": tracestate}
    return TraceContextTextMapPropagator().extract(carrier, Context())
