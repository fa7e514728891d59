"""One trace from a client's header down to both workers, sent by three processes to one collector."""

import asyncio
import json
import signal
import threading
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from splitserve.client import AsyncClient
from splitserve.core.worker import Pool
from splitserve.rpc.gen import inference_pb2, inference_pb2_grpc
from tests.cluster.asking import WAIT_S, ask, eventually, greedy, prompt_of
from tests.cluster.processes import ROUTER, Cluster, cluster_of

SPAN_ID = "fedcba9876543210"
NAMES = {"splitserve.request", "queue", "attempt", "prefill", "decode"}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]
    """Keeps every span that is exported to it, with its process's service name, by trace."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, dict[str, Any]] = {}
        self._services: dict[str, set[str]] = {}

    def Export(self, request: Any, context: grpc.ServicerContext) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._lock:
            for resource in request.resource_spans:
                attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        trace_id = span.trace_id.hex()
                        self._spans.setdefault(trace_id, {})[span.name] = span
                        self._services.setdefault(trace_id, set()).add(attributes["service.name"])
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str) -> dict[str, Any]:
        """By name."""
        with self._lock:
            return dict(self._spans.get(trace_id, {}))

    def services(self, trace_id: str) -> set[str]:
        with self._lock:
            return set(self._services.get(trace_id, ()))


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    """And its address."""
    kept, server = Collector(), grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(kept, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield kept, address
    server.stop(None).wait()


@pytest.fixture(scope="module")
def cluster(collector: tuple[Collector, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector[1]}")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        directory: Path = tmp_path_factory.mktemp("traced")
        with cluster_of(directory, router=ROUTER.model_copy(update={"http": "127.0.0.1:0"})) as started:
            yield started


async def check_trace(collector: Collector, trace_id: str) -> None:
    """All of its spans arrive, each under its own parent."""

    async def complete() -> bool:
        return collector.spans(trace_id).keys() >= NAMES

    await eventually(complete, f"the spans {sorted(NAMES)} of {trace_id}")
    spans = collector.spans(trace_id)
    assert spans.keys() == NAMES
    parents = {name: span.parent_span_id.hex() for name, span in spans.items()}
    request, attempt = (spans[name].span_id.hex() for name in ("splitserve.request", "attempt"))
    assert parents == {
        "splitserve.request": SPAN_ID,
        "queue": request,
        "attempt": request,
        "prefill": attempt,
        "decode": attempt,
    }
    assert collector.services(trace_id) == {"splitserve-router", "splitserve-worker"}
    assert {"first_token"} == {event.name for event in spans["decode"].events}
    assert {each.key: each.value for each in spans["prefill"].attributes}["splitserve.kv_bytes"].int_value > 0
    workers = {name: _said(spans[name], "splitserve.worker") for name in ("prefill", "decode")}
    assert workers == {"prefill": f"{Pool.PREFILL}-0", "decode": f"{Pool.DECODE}-0"}
    assert (
        len({_said(spans[name], "splitserve.request_id") for name in ("splitserve.request", "prefill", "decode")}) == 1
    )


def _said(span: Any, name: str) -> str:
    return str({each.key: each.value.string_value for each in span.attributes}[name])


async def test_a_header_of_http_is_the_parent_of_all_that_follows(
    collector: tuple[Collector, str], cluster: Cluster
) -> None:
    trace_id = "1" * 32
    body = {"model": "demo", "prompt": list(prompt_of(300)), "max_tokens": 4, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://{cluster.router.ready()['http']}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "traceparent": f"00-{trace_id}-{SPAN_ID}-01"},
    )

    def ask() -> int:
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    assert await asyncio.to_thread(ask) == 4
    await check_trace(collector[0], trace_id)


async def test_so_is_metadata_of_grpc(collector: tuple[Collector, str], cluster: Cluster) -> None:
    trace_id = "2" * 32
    message = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt_of(300, seed=1)))
    message.sampling.max_tokens = 4
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        metadata = (("traceparent", f"00-{trace_id}-{SPAN_ID}-01"),)
        tokens = [token async for said in stub.Generate(message, metadata=metadata) for token in said.token_ids]
    assert tokens
    await check_trace(collector[0], trace_id)


async def test_a_process_that_drains_sends_its_last_spans_first(
    collector: tuple[Collector, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector[1]}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "one for all")
    trace_id = "3" * 32
    with cluster_of(tmp_path, prefill=0, decode=1) as cluster:
        async with AsyncClient(cluster.address) as client:
            await ask(client, prompt_of(20), greedy(2), traceparent=f"00-{trace_id}-{SPAN_ID}-01")
        for process in (*cluster.workers.values(), cluster.router):
            process.signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.ended) == 0
    assert collector[0].spans(trace_id).keys() == NAMES - {"prefill"}
    assert collector[0].services(trace_id) == {"one for all"}


async def test_a_caller_that_does_not_sample_is_left_out_all_the_way(
    collector: tuple[Collector, str], cluster: Cluster
) -> None:
    async with AsyncClient(cluster.address) as client:
        for trace_id, sampled in (("4" * 32, "00"), ("5" * 32, "01")):
            await ask(client, prompt_of(300, seed=2), greedy(2), traceparent=f"00-{trace_id}-{SPAN_ID}-{sampled}")
    await check_trace(collector[0], "5" * 32)
    assert collector[0].spans("4" * 32) == {}
