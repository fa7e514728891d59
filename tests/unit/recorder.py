"""Spans as OpenTelemetry's SDK has them, kept in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Sampler
from opentelemetry.trace import SpanContext, StatusCode

from splitserve.telemetry.otel import RecordingTracer

ERROR, UNSET = StatusCode.ERROR, StatusCode.UNSET
CALLER = "00-0123456789abcdef0123456789abcdef-fedcba9876543210-01"


class Recorder:
    def __init__(self, sampler: Sampler = DEFAULT_ON) -> None:
        self._kept = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self.tracer = RecordingTracer(self.provider)

    @property
    def ended(self) -> list[ReadableSpan]:
        """In the order of their beginning."""
        return sorted(self._kept.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.ended if span.name == name]

    def the(self, name: str) -> ReadableSpan:
        """The only one of this name."""
        (span,) = self.named(name)
        return span


@contextmanager
def recorder(sampler: Sampler = DEFAULT_ON) -> Iterator[Recorder]:
    kept = Recorder(sampler)
    try:
        yield kept
    finally:
        kept.provider.shutdown()


def traceparent(span: ReadableSpan) -> str:
    """What a child of the span is told."""
    return _told(span.get_span_context())


def parent_of(span: ReadableSpan) -> str:
    """The same, of its parent; empty without one."""
    return _told(span.parent)


def _told(known: SpanContext | None) -> str:
    return "" if known is None else f"00-{known.trace_id:032x}-{known.span_id:016x}-{known.trace_flags:02x}"


def said(span: ReadableSpan, name: str) -> object:
    return (span.attributes or {}).get(name)


def events(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]
