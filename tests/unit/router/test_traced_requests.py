"""One trace of a request: its client's span, the router's, a wait and an attempt for each route."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest
from opentelemetry import trace
from prometheus_client import CollectorRegistry

from splitserve.client import AsyncClient, Client, Retries
from splitserve.core.config import RouterConfig
from splitserve.core.errors import DeadlineExceeded, EngineError, InvalidRequest
from splitserve.core.model import ModelInfo
from splitserve.core.request import Chunk, FinishReason, SamplingParams
from splitserve.core.worker import Failure, Outcome, Pool
from splitserve.router.serve import Router
from splitserve.rpc.channel import open_channel
from splitserve.rpc.gen import grpc_service_pb2, grpc_service_pb2_grpc, inference_pb2, inference_pb2_grpc
from splitserve.telemetry.metrics import RouterMetrics
from splitserve.telemetry.traces import ATTEMPT_SPAN, FIRST_TOKEN, QUEUE_SPAN, REQUEST_SPAN, Span, Tracer
from tests.unit.recorder import CALLER, ERROR, UNSET, Recorder, events, parent_of, recorder, said, traceparent
from tests.unit.router.scripted import DEMO_MODEL, WITHIN_S
from tests.unit.router.wired import WiredWorker

AnyT = TypeVar("AnyT")
FOUR = SamplingParams(max_tokens=4)
STOPPED = Outcome(FinishReason.STOP)
BROKEN = Outcome(failure=Failure.ENGINE, message="broken")


@pytest.fixture
def kept() -> Iterator[Recorder]:
    with recorder() as recording:
        yield recording


def traced_router(tracer: Tracer, **config: object) -> Router:
    settings = RouterConfig.model_validate({"listen": "127.0.0.1:0", "heartbeat_interval_s": 0.05, **config})
    model = ModelInfo.read(DEMO_MODEL, name="model")
    return Router(settings, model, RouterMetrics(CollectorRegistry()), tracer=tracer)


@pytest.fixture
async def router(kept: Recorder) -> AsyncIterator[Router]:
    async with traced_router(kept.tracer) as started:
        yield started


@pytest.fixture
async def client(router: Router) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.address, Retries(most=0)) as opened:
        yield opened


@asynccontextmanager
async def attached(router: Router, name: str, pool: Pool = Pool.DECODE) -> AsyncIterator[WiredWorker]:
    async with WiredWorker(router.address, name, pool) as worker:
        await worker.told("peers")
        yield worker


async def collect(client: AsyncClient, **options: object) -> list[Chunk]:
    return [chunk async for chunk in client.generate([5, 6], FOUR, **options)]  # type: ignore[arg-type]


async def within(call: "asyncio.Task[AnyT]") -> AnyT:
    async with asyncio.timeout(WITHIN_S):
        return await call


async def ended(kept: Recorder) -> None:
    """Waits until the request's span has."""
    async with asyncio.timeout(WITHIN_S):
        while not kept.named(REQUEST_SPAN):  # noqa: ASYNC110 - the router's task has no event to wait for
            await asyncio.sleep(0)


# All goes well ------------------------------------------------------------------------------------------------------
async def test_a_request_has_a_span_under_its_callers_and_its_jobs_are_told_of_the_attempts(
    kept: Recorder, router: Router, client: AsyncClient
) -> None:
    async with attached(router, "p0", Pool.PREFILL) as prefill, attached(router, "d0") as decode:
        call = asyncio.create_task(collect(client, request_id="mine", traceparent=CALLER))
        job = await decode.job()
        await prefill.until(lambda: bool(prefill.jobs))
        (reading,) = prefill.jobs
        decode.say(job, 10, 11)
        prefill.say(reading, outcome=Outcome(FinishReason.LENGTH))
        decode.say(job, 12, index=2, outcome=STOPPED)
        await within(call)
    await ended(kept)
    request, queue, attempt = kept.the(REQUEST_SPAN), kept.the(QUEUE_SPAN), kept.the(ATTEMPT_SPAN)
    assert parent_of(request) == CALLER
    assert parent_of(queue) == parent_of(attempt) == traceparent(request)
    assert job.traceparent == reading.traceparent == traceparent(attempt)
    assert (said(attempt, "splitserve.prefill_worker"), said(attempt, "splitserve.decode_worker")) == ("p0", "d0")
    assert (said(attempt, "splitserve.outcome"), events(attempt)) == ("stop", [FIRST_TOKEN])
    assert queue.end_time is not None
    assert attempt.start_time is not None
    assert queue.end_time <= attempt.start_time


async def test_its_span_says_what_was_asked_and_what_came_of_it(
    kept: Recorder, router: Router, client: AsyncClient
) -> None:
    async with attached(router, "d0") as decode:
        call = asyncio.create_task(collect(client, request_id="mine"))
        decode.say(await decode.job(), 10, 11, outcome=STOPPED)
        await within(call)
    await ended(kept)
    request = kept.the(REQUEST_SPAN)
    assert (parent_of(request), request.kind, request.status.status_code) == ("", trace.SpanKind.SERVER, UNSET)
    expected = {
        "splitserve.request_id": "mine",
        "gen_ai.request.model": "model",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop",),
        "rpc.response.status_code": "OK",
        "splitserve.attempts": 1,
        "splitserve.decode_worker": "d0",
    }
    assert {name: said(request, name) for name in expected} == expected


async def test_every_output_of_a_request_has_its_attempt(kept: Recorder, router: Router, client: AsyncClient) -> None:
    async with attached(router, "d0") as decode:
        sampling = SamplingParams(max_tokens=4, n=2)
        call = asyncio.create_task(_all(client, sampling))
        first = await decode.job()
        decode.say(first, 10)
        second = await decode.job()
        decode.say(second, 20, outcome=Outcome(FinishReason.LENGTH))
        decode.say(first, 11, index=1, outcome=STOPPED)
        await within(call)
    await ended(kept)
    assert [said(span, "splitserve.choice") for span in kept.named(ATTEMPT_SPAN)] == [0, 1]
    assert said(kept.the(REQUEST_SPAN), "gen_ai.response.finish_reasons") == ("stop", "length")


async def _all(client: AsyncClient, sampling: SamplingParams) -> list[Chunk]:
    return [chunk async for chunk in client.generate([5, 6], sampling)]


# Endings ------------------------------------------------------------------------------------------------------------
async def test_a_request_that_is_tried_again_has_a_span_for_each_attempt(
    kept: Recorder, router: Router, client: AsyncClient
) -> None:
    async with attached(router, "d0") as one, attached(router, "d1") as other:
        call = asyncio.create_task(collect(client))
        begun = [asyncio.create_task(_has_a_job(worker)) for worker in (one, other)]
        await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
        failing, taking = (one, other) if one.jobs else (other, one)
        job = await failing.job()
        failing.say(job, 10)
        failing.say(job, outcome=BROKEN)
        again = await taking.job()
        await asyncio.wait(begun)
        taking.say(again, 11, index=1, outcome=STOPPED)
        await within(call)
    await ended(kept)
    failed, good = kept.named(ATTEMPT_SPAN)
    assert (failed.status.status_code, said(failed, "error.type")) == (ERROR, Failure.ENGINE.value)
    assert (good.status.status_code, said(good, "splitserve.outcome")) == (UNSET, "stop")
    assert [said(span, "gen_ai.usage.output_tokens") for span in (failed, good)] == [1, 1]
    assert [said(span, "splitserve.route") for span in (failed, good)] == [1, 2]
    assert (again.traceparent, len(kept.named(QUEUE_SPAN))) == (traceparent(good), 2)
    assert kept.the(REQUEST_SPAN).status.status_code is UNSET
    assert said(kept.the(REQUEST_SPAN), "splitserve.attempts") == 2


async def _has_a_job(worker: WiredWorker) -> None:
    await worker.until(lambda: bool(worker.jobs))


async def test_a_request_that_fails_for_good_says_so_with_its_code(
    kept: Recorder, router: Router, client: AsyncClient
) -> None:
    async with attached(router, "d0") as decode:
        call = asyncio.create_task(collect(client))
        decode.say(await decode.job(), outcome=BROKEN)
        decode.say(await decode.job(), outcome=BROKEN)
        with pytest.raises(EngineError):
            await within(call)
    await ended(kept)
    request = kept.the(REQUEST_SPAN)
    assert (request.status.status_code, said(request, "rpc.response.status_code")) == (ERROR, "INTERNAL")
    assert [span.status.status_code for span in kept.named(ATTEMPT_SPAN)] == [ERROR, ERROR]


async def test_a_request_that_its_caller_got_wrong_is_not_the_routers_error(
    kept: Recorder, client: AsyncClient
) -> None:
    with pytest.raises(InvalidRequest):
        await collect(client, model="", deadline_s=-1.0)
    await ended(kept)
    request = kept.the(REQUEST_SPAN)
    assert (request.status.status_code, said(request, "rpc.response.status_code")) == (UNSET, "INVALID_ARGUMENT")


async def test_a_request_that_is_cancelled_is_marked_and_so_is_its_attempt(
    kept: Recorder, router: Router, client: AsyncClient
) -> None:
    async with attached(router, "d0") as decode:
        chunks = client.generate([5, 6], FOUR)
        reading = asyncio.create_task(anext(chunks))
        decode.say(await decode.job(), 10)
        await within(reading)
        await chunks.aclose()
        await ended(kept)
    request, attempt = kept.the(REQUEST_SPAN), kept.the(ATTEMPT_SPAN)
    assert said(request, "rpc.response.status_code") == "CANCELLED"
    assert said(request, "splitserve.cancelled") is said(attempt, "splitserve.cancelled") is True
    assert (request.status.status_code, attempt.status.status_code) == (UNSET, UNSET)


async def test_the_wait_of_a_request_that_no_worker_ever_took_ends_too(kept: Recorder) -> None:
    async with traced_router(kept.tracer) as router, attached(router, "d0") as decode:
        decode.report(free_sequences=0)
        async with AsyncClient(router.address, Retries(most=0)) as client:
            with pytest.raises(DeadlineExceeded):
                await collect(client, deadline_s=0.1)
        await ended(kept)
    request = kept.the(REQUEST_SPAN)
    assert (request.status.status_code, said(request, "error.type")) == (ERROR, "DEADLINE_EXCEEDED")
    assert (parent_of(kept.the(QUEUE_SPAN)), kept.named(ATTEMPT_SPAN)) == (traceparent(request), [])


# Where the caller's trace context comes from ------------------------------------------------------------------------
async def test_metadata_says_it_for_a_call_that_is_one_request(kept: Recorder, router: Router) -> None:
    async with attached(router, "d0") as decode, open_channel(router.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        message = inference_pb2.GenerateRequest(text="hello")
        call = stub.Generate(message, metadata=(("traceparent", CALLER),))
        decode.say(await decode.job(), 10, outcome=STOPPED)
        assert [response.usage.output_tokens async for response in call][-1] == 1
    await ended(kept)
    assert parent_of(kept.the(REQUEST_SPAN)) == CALLER


async def test_metadata_says_it_for_model_infer(kept: Recorder, router: Router) -> None:
    async with attached(router, "d0") as decode, open_channel(router.address) as channel:
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        message = grpc_service_pb2.ModelInferRequest(model_name="model")
        tensor = message.inputs.add(name="text_input", datatype="BYTES", shape=(1,))
        tensor.contents.bytes_contents.append(b"hello")
        call = asyncio.ensure_future(stub.ModelInfer(message, metadata=(("traceparent", CALLER),)))
        decode.say(await decode.job(), 10, outcome=STOPPED)
        await call
    await ended(kept)
    assert parent_of(kept.the(REQUEST_SPAN)) == CALLER


async def test_a_clients_span_is_the_requests_parent(
    kept: Recorder, router: Router, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: kept.provider)
    async with attached(router, "d0") as decode:
        with kept.provider.get_tracer("app").start_as_current_span("app"):
            call = asyncio.create_task(collect(client))
        decode.say(await decode.job(), 10, outcome=STOPPED)
        await within(call)
    await ended(kept)
    app, calling, request = kept.the("app"), kept.the("text_completion"), kept.the(REQUEST_SPAN)
    assert (parent_of(calling), parent_of(request)) == (traceparent(app), traceparent(calling))
    assert said(calling, "gen_ai.usage.output_tokens") == 1


async def test_the_client_for_threads_has_one_too_and_says_how_its_call_failed(
    kept: Recorder, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: kept.provider)

    def ask() -> None:
        with Client(router.address, Retries(most=0)) as client:
            list(client.generate([5, 6], FOUR, deadline_s=-1.0))

    with pytest.raises(InvalidRequest):
        await asyncio.to_thread(ask)
    await ended(kept)
    calling = kept.the("text_completion")
    assert parent_of(kept.the(REQUEST_SPAN)) == traceparent(calling)
    assert (calling.status.status_code, said(calling, "error.type")) == (ERROR, "INVALID_ARGUMENT")


# Cost ---------------------------------------------------------------------------------------------------------------
class _Counting(Span):
    """Counts what it is told."""

    __slots__ = ("calls",)
    recorded = True

    def __init__(self) -> None:
        super().__init__(CALLER)
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> object:
        if name in ("child", "call", "note", "event", "fail", "end"):
            self.calls.append(name)
        return super().__getattribute__(name)


class _CountingTracer(Tracer):
    def __init__(self) -> None:
        self.span = _Counting()

    def request(self, *_: object) -> Span:
        return self.span


async def told_of(tokens: int) -> int:
    tracer = _CountingTracer()
    async with (
        traced_router(tracer) as router,
        attached(router, "d0") as decode,
        AsyncClient(router.address) as client,
    ):
        call = asyncio.create_task(_all(client, SamplingParams(max_tokens=tokens)))
        job = await decode.job()
        for index in range(tokens - 1):
            decode.say(job, 10, index=index)
        decode.say(job, 10, index=tokens - 1, outcome=STOPPED)
        await within(call)
    return len(tracer.span.calls)


async def test_a_token_costs_no_span_anything() -> None:
    few = await told_of(2)
    assert 0 < few == await told_of(60)
