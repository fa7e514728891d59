"""Whether anybody records, what is told then, and that it costs nothing if nobody does."""

import io
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, rpc_attributes
from opentelemetry.semconv.attributes import error_attributes

from splitserve.core.request import (
    Chat,
    ChatMessage,
    Chunk,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Timings,
    Usage,
)
from splitserve.core.worker import DecodeJob, Failure, Outcome
from splitserve.telemetry import otel, traces
from splitserve.telemetry.logs import configure
from splitserve.telemetry.traces import Span, Tracer, calling, carried, tracing
from tests.unit.recorder import CALLER, ERROR, UNSET, Recorder, parent_of, recorder, said, traceparent

COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
EXPORTER = "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"
REQUEST = GenerateRequest("a prompt", traceparent=CALLER, tracestate="vendor=1")
JOB = DecodeJob("j", "r", (1, 2, 3), SamplingParams(), 5.0, traceparent=CALLER)
SAMPLING = SamplingParams(
    7, temperature=0.5, top_p=0.9, top_k=3, presence_penalty=0.1, frequency_penalty=0.2, seed=1, n=2
)
TIMINGS = Timings(0.1, 0.2, 0.0, 0.3, 0.01, "p0", "d0", 4096, 2048, 2)


@pytest.fixture
def kept() -> Iterator[Recorder]:
    with recorder() as recording:
        yield recording


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    lines = io.StringIO()
    configure(stream=lines)
    yield lines
    root.handlers, root.level = handlers, level


# Whether it is on ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "mine"},
        {**COLLECTOR, "OTEL_SDK_DISABLED": "true"},
        {**COLLECTOR, "OTEL_TRACES_EXPORTER": "none"},
        {**COLLECTOR, "OTEL_EXPORTER_OTLP_ENDPOINT": " "},
    ],
    ids=str,
)
def test_it_is_off_unless_a_collector_is_named(environment: dict[str, str], log: io.StringIO) -> None:
    with tracing("splitserve-test", environment) as tracer:
        assert type(tracer) is Tracer
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    "environment",
    [
        COLLECTOR,
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
        {**COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
    ],
    ids=str,
)
def test_a_collector_in_the_environment_switches_it_on(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with tracing("splitserve-test") as tracer:
        assert isinstance(tracer, otel.RecordingTracer)


def test_without_its_extra_one_line_says_how_to_install_it(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with tracing("splitserve-test", COLLECTOR) as tracer:
        assert type(tracer) is Tracer
    assert log.getvalue().count("\n") == 1
    assert "pip install 'splitserve[otel]'" in log.getvalue()


def test_a_protocol_that_it_does_not_speak_leaves_it_off_with_a_line(log: io.StringIO) -> None:
    with tracing("splitserve-test", {**COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}) as tracer:
        assert type(tracer) is Tracer
    assert "http/protobuf" in log.getvalue()


def test_the_process_is_called_what_the_environment_says_else_by_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _service_of("splitserve-router") == "splitserve-router"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=by-attributes,zone=a")
    assert _service_of("splitserve-router") == "by-attributes"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "by-name")
    assert _service_of("splitserve-router") == "by-name"


def _service_of(default: str) -> object:
    provider = otel.exporting(default)
    provider.shutdown()
    return provider.resource.attributes[SERVICE_NAME]


def test_a_collector_that_is_away_does_not_hold_up_the_end(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch, kept: Recorder
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(otel, "_LAST_SPANS_WITHIN_S", 0.01)
    monkeypatch.setattr(kept.provider, "shutdown", let_go.wait)
    with otel.recording(kept.provider):
        pass
    let_go.set()
    assert "not sent" in log.getvalue()


# Off ----------------------------------------------------------------------------------------------------------------
OFF = """
import sys
import splitserve.cli.build, splitserve.cli.gateway, splitserve.client, splitserve.router.serve, splitserve.worker.serve
from splitserve.core.request import GenerateRequest
from splitserve.telemetry.traces import calling, tracing
request = GenerateRequest("a prompt", traceparent=%r)
with tracing("splitserve-test", {}) as tracer, tracer.request(request, "r", "m") as span, calling(request):
    assert span.traceparent == request.traceparent
print([name for name in sys.modules if name.partition(".")[0] == "opentelemetry"])
"""


def test_when_it_is_off_opentelemetry_is_never_imported() -> None:
    done = subprocess.run([sys.executable, "-c", OFF % CALLER], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_when_it_is_off_nothing_is_put_together() -> None:
    def describe() -> traces.Attributes:
        raise AssertionError("nobody reads this")

    with Tracer().request(REQUEST, "r", "m") as span:
        with span.child("queue", describe) as queue, span.call("attempt", describe) as attempt:
            attempt.event("first_token", describe)
            queue.note(describe)
        span.fail("kind", "sentence")
        span.end()
        assert attempt.traceparent == CALLER


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "no",
        CALLER[:-1],
        CALLER + "x",
        CALLER.upper(),
        "ff" + CALLER[2:],
        f"00-{'0' * 32}-{'1' * 16}-01",
        "0" * 5000,
    ],
)
def test_what_is_no_trace_context_goes_no_further(parent: str, kept: Recorder) -> None:
    request = GenerateRequest("a prompt", traceparent=parent)
    assert Tracer().request(request, "r", "m").traceparent == ""
    with kept.tracer.request(request, "r", "m"):
        pass
    assert parent_of(kept.the(traces.REQUEST_SPAN)) == ""


# On -----------------------------------------------------------------------------------------------------------------
def test_a_request_is_a_child_of_its_caller_and_has_its_trace_state(kept: Recorder) -> None:
    with kept.tracer.request(REQUEST, "r", "m") as span:
        passed_on = span.carried_by(GenerateRequest("a prompt"))
    recorded = kept.the(traces.REQUEST_SPAN)
    assert (parent_of(recorded), traceparent(recorded)) == (CALLER, span.traceparent)
    assert (passed_on.traceparent, passed_on.tracestate) == (span.traceparent, "vendor=1")


def test_one_that_is_not_sampled_is_not_recorded_and_tells_its_children_so() -> None:
    with recorder(ParentBased(ALWAYS_OFF)) as kept:
        with kept.tracer.request(GenerateRequest("a prompt"), "r", "m") as span:
            assert span.child("queue", traces.nothing).traceparent == span.traceparent
            assert int(span.traceparent[-2:], 16) & trace.TraceFlags.SAMPLED == 0
        assert not kept.tracer.job(replace(JOB, traceparent=span.traceparent), "w").recorded
    assert kept.ended == []


@pytest.mark.parametrize("parent", ["", "00-1"])
def test_a_job_without_a_trace_begins_none(parent: str, kept: Recorder) -> None:
    assert not kept.tracer.job(replace(JOB, traceparent=parent), "w").recorded


@pytest.mark.parametrize(
    ("code", "status"),
    [
        *((code, UNSET) for code in ("OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "CANCELLED")),
        *((code, ERROR) for code in ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED")),
    ],
)
def test_a_servers_status_is_an_error_where_it_is_the_servers_fault(
    code: str, status: trace.StatusCode, kept: Recorder
) -> None:
    with kept.tracer.request(REQUEST, "r", "m") as span:
        traces.end_request(span, code, "the sentence")
    recorded = kept.the(traces.REQUEST_SPAN)
    assert (recorded.status.status_code, said(recorded, "rpc.response.status_code")) == (status, code)
    assert (recorded.status.description, said(recorded, "error.type")) == (
        ("the sentence", code) if status is ERROR else (None, None)
    )
    assert said(recorded, "splitserve.cancelled") == (True if code == "CANCELLED" else None)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        *((failure, ERROR) for failure in (Failure.ENGINE, Failure.TRANSFER, Failure.INVALID)),
        *((failure, UNSET) for failure in (Failure.CANCELLED, Failure.MIGRATED, Failure.NOT_NOW)),
    ],
)
def test_a_jobs_status_is_an_error_where_something_failed(
    failure: Failure, status: trace.StatusCode, kept: Recorder
) -> None:
    traces.end_job(kept.tracer.job(JOB, "w"), Outcome(failure=failure, message="why"), 3)
    recorded = kept.the("decode")
    assert (recorded.status.status_code, said(recorded, "splitserve.outcome")) == (status, failure.value)
    assert said(recorded, "gen_ai.usage.output_tokens") == 3


def test_a_block_that_fails_ends_its_span_with_the_error(kept: Recorder) -> None:
    def fails() -> None:
        with kept.tracer.request(REQUEST, "r", "m") as span, span.child("queue", traces.nothing) as queue:
            queue.end()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fails()
    recorded = kept.the(traces.REQUEST_SPAN)
    assert (recorded.status.status_code, said(recorded, "error.type")) == (ERROR, "ValueError")
    assert kept.the("queue").status.status_code is UNSET, "it had ended before"


def test_names_that_are_opentelemetrys_are_spelt_as_its_conventions_spell_them() -> None:
    known = {
        value
        for module in (gen_ai_attributes, rpc_attributes, error_attributes)
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    }
    request = GenerateRequest(Chat((ChatMessage("user", "hello"),)), SAMPLING, lora="poet", output=(1,))
    answer = Chunk("r", 3, (), "", finish_reason=FinishReason.STOP, usage=Usage(3, 4), timings=TIMINGS)
    told = {
        **traces.asked(request, "r", "m"),
        **traces.answered(answer),
        **traces.finish_reasons({0: FinishReason.STOP}),
        **traces.status("OK"),
        **traces.ending("stop", 1),
    }
    theirs = {name for name in told if not name.startswith("splitserve.")}
    assert theirs <= known
    assert len(theirs) >= 15
    assert "error.type" in known


def test_a_request_is_told_of_without_what_it_says() -> None:
    told = traces.asked(GenerateRequest("a secret", SAMPLING), "r", "m")
    assert (told["gen_ai.operation.name"], told["gen_ai.request.model"]) == ("text_completion", "m")
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.choice.count"]) == (7, 2)
    assert "secret" not in str(told)


def test_every_timing_is_told() -> None:
    told = traces.answered(Chunk("r", 3, (), "", usage=Usage(3, 4), timings=TIMINGS))
    assert {f"splitserve.{field.name}" for field in fields(Timings)} <= told.keys()
    assert told["gen_ai.response.time_to_first_chunk"] == TIMINGS.ttft_s


def test_outputs_are_told_of_in_their_order() -> None:
    told = traces.finish_reasons({1: FinishReason.LENGTH, 0: FinishReason.STOP})
    assert told == {"gen_ai.response.finish_reasons": ["stop", "length"]}


# Where a trace context comes from -----------------------------------------------------------------------------------
def test_headers_say_it_where_the_request_does_not() -> None:
    headers = [("traceparent", CALLER), ("tracestate", "a=1"), ("authorization", "x"), ("tracestate", "b=2")]
    got = carried(GenerateRequest("a prompt"), headers)
    assert (got.traceparent, got.tracestate) == (CALLER, "a=1,b=2")
    assert carried(REQUEST, [("traceparent", "other")]) is REQUEST
    without = GenerateRequest("a prompt")
    assert carried(without, None) is carried(without, [("tracestate", "a=1")]) is without


def test_a_program_that_traces_without_an_sdk_of_its_own_is_still_the_parent(kept: Recorder) -> None:
    with kept.provider.get_tracer("app").start_as_current_span("app"):
        span = calling(GenerateRequest("a prompt"))
    assert span.traceparent == traceparent(kept.the("app"))
    assert span.carried_by(GenerateRequest("a prompt")).traceparent == span.traceparent


def test_a_program_that_has_no_span_now_and_no_sdk_carries_nothing() -> None:
    request = GenerateRequest("a prompt")
    assert calling(request).carried_by(request) is request


def test_a_request_that_has_a_trace_context_keeps_it(kept: Recorder) -> None:
    with kept.provider.get_tracer("app").start_as_current_span("app"):
        assert calling(REQUEST).carried_by(REQUEST) is REQUEST


def test_a_clients_span_is_recorded_by_what_its_program_has_set_up(
    kept: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def provider() -> TracerProvider:
        return kept.provider

    monkeypatch.setattr(trace, "get_tracer_provider", provider)
    with calling(GenerateRequest("a prompt", model="m")) as span:
        assert isinstance(span, Span)
    recorded = kept.the("text_completion m")
    assert recorded.kind is trace.SpanKind.CLIENT
