"""A traced job's span, from taken to its outcome."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from splitserve.core.request import FinishReason, SamplingParams
from splitserve.core.worker import DecodeJob, Delta, Failure, Outcome, PrefillJob, TransferStats
from splitserve.telemetry.traces import FIRST_TOKEN, Tracer
from splitserve.worker.spans import JobSpans
from tests.unit.peers import TICKET
from tests.unit.recorder import CALLER, ERROR, UNSET, Recorder, events, parent_of, recorder, said, traceparent

DECODE = DecodeJob("j", "r", (1, 2, 3), SamplingParams(), 5.0, output=(4,), ticket=TICKET, traceparent=CALLER)
PREFILL = PrefillJob("p", "r", (1, 2, 3), TICKET, 5.0, traceparent=CALLER)
DONE = Outcome(FinishReason.LENGTH)


@pytest.fixture
def kept() -> Iterator[Recorder]:
    with recorder() as recording:
        yield recording


def test_a_decode_is_a_child_of_its_attempt_and_the_engine_is_told_of_it(kept: Recorder) -> None:
    spans = JobSpans(kept.tracer)
    job = spans.taken(DECODE, "d0")
    for step in ([], [Delta("j", 1, (5,)), Delta("another", 0, (9,))], [Delta("j", 2, (6, 7), outcome=DONE)]):
        spans.step(step)
    span = kept.the("decode")
    assert (parent_of(span), job) == (CALLER, replace(DECODE, traceparent=traceparent(span)))
    assert (events(span), said(span, "gen_ai.usage.output_tokens")) == ([FIRST_TOKEN], 3)
    assert (said(span, "splitserve.request_id"), said(span, "splitserve.worker")) == ("r", "d0")
    assert (said(span, "splitserve.tokens"), said(span, "splitserve.waits_for_kv")) == (4, True)
    assert (said(span, "splitserve.outcome"), span.status.status_code) == ("length", UNSET)


def test_a_prefill_says_what_kv_it_sent_and_how_late(kept: Recorder) -> None:
    spans = JobSpans(kept.tracer)
    spans.taken(PREFILL, "p0")
    spans.step([Delta("p", outcome=replace(DONE, transfer=TransferStats(4096, 2048, -0.01, 3)))])
    span = kept.the("prefill")
    assert (said(span, "splitserve.kv_bytes"), said(span, "splitserve.uncovered_s")) == (4096, -0.01)
    assert events(span) == []


def test_a_job_that_fails_says_why(kept: Recorder) -> None:
    spans = JobSpans(kept.tracer)
    spans.taken(DECODE, "d0")
    spans.step([Delta("j", outcome=Outcome(failure=Failure.TRANSFER, message="no KV came"))])
    span = kept.the("decode")
    assert (span.status.status_code, span.status.description) == (ERROR, "no KV came")


def test_what_runs_when_the_worker_ends_ends_with_it(kept: Recorder) -> None:
    spans = JobSpans(kept.tracer)
    for job in (DECODE, PREFILL):
        spans.taken(job, "w")
    spans.close()
    assert [span.status.status_code for span in kept.ended] == [ERROR, ERROR]
    spans.step([Delta("j", outcome=DONE)])
    assert len(kept.ended) == 2


@pytest.mark.parametrize("job", [DECODE, replace(DECODE, traceparent="")], ids=["traced elsewhere", "not traced"])
def test_without_tracing_a_job_stays_as_it_is_and_steps_are_not_looked_at(job: DecodeJob) -> None:
    spans = JobSpans(Tracer())
    assert spans.taken(job, "w") is job
    spans.step(_Unseen())


class _Unseen(list[Delta]):
    def __iter__(self) -> Iterator[Delta]:
        raise AssertionError("nobody is traced")
