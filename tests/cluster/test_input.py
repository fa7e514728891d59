"""Bad input over gRPC: the status code, and the field in the details, whatever the field."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from splitserve.client import AsyncClient
from splitserve.rpc.gen import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.cluster.asking import ask, prompt_of, settled
from tests.cluster.conftest import Expected
from tests.cluster.processes import Cluster, cluster_of

DETAILS = "grpc-status-details-bin"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
IDS = inference_pb2.TokenIds(ids=[300, 301])
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_of(tmp_path_factory.mktemp("input")) as started:
        yield started


@pytest.fixture
async def stub(cluster: Cluster) -> AsyncIterator[Any]:
    """After each refusal nothing is held."""
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        yield inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
    async with AsyncClient(cluster.address) as client:
        await settled(client, 2)


def chat(*messages: tuple[str, str]) -> inference_pb2.ChatMessages:
    return inference_pb2.ChatMessages(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    )


def ids(*token_ids: int) -> dict[str, Any]:
    return {"token_ids": inference_pb2.TokenIds(ids=token_ids)}


def sampling(**fields: Any) -> dict[str, Any]:
    return {"token_ids": IDS, "sampling": inference_pb2.SamplingParams(**fields)}


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"text": ""}, "text"),
    ({"token_ids": inference_pb2.TokenIds()}, "token_ids.ids"),
    (ids(2048), "token_ids.ids"),
    (ids(5, 2**32 - 1), "token_ids.ids"),
    (ids(*[300] * 8192), "token_ids.ids"),
    ({"text": "truth " * 9000}, "text"),
    ({"messages": chat()}, "messages"),
    (sampling(max_tokens=0), "sampling.max_tokens"),
    (sampling(max_tokens=-5), "sampling.max_tokens"),
    (sampling(max_tokens=8191), "sampling.max_tokens"),
    (sampling(min_tokens=-1), "sampling.min_tokens"),
    (sampling(max_tokens=3, min_tokens=4), "sampling.min_tokens"),
    (sampling(temperature=-0.1), "sampling.temperature"),
    (sampling(temperature=NAN), "sampling.temperature"),
    (sampling(temperature=INF), "sampling.temperature"),
    (sampling(top_p=0.0), "sampling.top_p"),
    (sampling(top_p=1.1), "sampling.top_p"),
    (sampling(top_p=NAN), "sampling.top_p"),
    (sampling(top_k=-2), "sampling.top_k"),
    (sampling(min_p=-0.1), "sampling.min_p"),
    (sampling(min_p=NAN), "sampling.min_p"),
    (sampling(presence_penalty=2.1), "sampling.presence_penalty"),
    (sampling(presence_penalty=NAN), "sampling.presence_penalty"),
    (sampling(frequency_penalty=-2.1), "sampling.frequency_penalty"),
    (sampling(frequency_penalty=NAN), "sampling.frequency_penalty"),
    (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=NAN), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=INF), "sampling.repetition_penalty"),
    (sampling(logprobs=-1), "sampling.logprobs"),
    (sampling(logprobs=1000), "sampling.logprobs"),
    (sampling(stop=[""]), "sampling.stop"),
    (sampling(stop=["x"] * 100), "sampling.stop"),
    (sampling(stop_token_ids=[2048]), "sampling.stop_token_ids"),
    ({"token_ids": IDS, "deadline_s": 0.0}, "deadline_s"),
    ({"token_ids": IDS, "deadline_s": NAN}, "deadline_s"),
    ({"token_ids": IDS, "deadline_s": -1.0}, "deadline_s"),
    ({"token_ids": IDS, "inter_token_deadline_s": 0.0}, "inter_token_deadline_s"),
    ({"token_ids": IDS, "inter_token_deadline_s": INF}, "inter_token_deadline_s"),
    ({"token_ids": IDS, "slo_class": "platinum"}, "slo_class"),
    ({"token_ids": IDS, "priority": 10**6}, "priority"),
    ({"token_ids": IDS, "request_id": "x" * 1000}, "request_id"),
    ({"token_ids": IDS, "session_id": "line\nbreak"}, "session_id"),
]


@pytest.mark.parametrize(("request_fields", "field"), BAD, ids=[f"{n}-{field}" for n, (_, field) in enumerate(BAD)])
async def test_bad_input_is_refused_with_the_field_and_a_sentence(
    stub: Any, request_fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in stub.Generate(inference_pb2.GenerateRequest(**request_fields)):
            pass
    assert refused.value.code() is INVALID
    assert field in _fields(refused.value)
    assert str(refused.value.details()).startswith(f"{field}: ")


async def test_bad_input_disturbs_nobody(cluster: Cluster, stub: Any, expected: Expected) -> None:
    async def refused(request_fields: dict[str, Any]) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in stub.Generate(inference_pb2.GenerateRequest(**request_fields)):
                pass
        return error.value.code()

    async with AsyncClient(cluster.address) as client, asyncio.TaskGroup() as tasks:
        good = [tasks.create_task(ask(client, prompt_of(300, seed=number))) for number in range(4)]
        bad = [tasks.create_task(refused(request_fields)) for request_fields, _ in BAD]
    assert {task.result() for task in bad} == {INVALID}
    for number, task in enumerate(good):
        assert task.result().same_as(await expected(prompt_of(300, seed=number)))


async def test_an_unknown_model_is_not_found(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="'gpt-9' is not served here; there are: 'demo'") as refused:
        async for _ in stub.Generate(inference_pb2.GenerateRequest(model="gpt-9", text="x")):
            pass
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_message_beyond_the_limit_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        async for _ in stub.Generate(inference_pb2.GenerateRequest(text="x" * (17 << 20))):
            pass
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("call", "request_message", "code", "says"),
    [
        ("Drain", admin_pb2.DrainRequest(worker="nobody"), grpc.StatusCode.NOT_FOUND, "there are: "),
        ("Drain", admin_pb2.DrainRequest(worker="decode-0", timeout_s=-1), INVALID, "timeout_s"),
        ("Drain", admin_pb2.DrainRequest(worker="decode-0", timeout_s=NAN), INVALID, "timeout_s"),
        ("SetWorkerPool", admin_pb2.SetWorkerPoolRequest(worker="decode-0"), INVALID, "pool"),
        (
            "SetWorkerPool",
            admin_pb2.SetWorkerPoolRequest(worker="", pool="POOL_DECODE"),
            grpc.StatusCode.NOT_FOUND,
            "there are: ",
        ),
    ],
)
async def test_what_an_operator_asks_wrongly_is_refused_too(
    cluster: Cluster, stub: Any, call: str, request_message: Any, code: grpc.StatusCode, says: str
) -> None:
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        admin = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await getattr(admin, call)(request_message)
    assert refused.value.code() is code
    assert says in str(refused.value.details())


def _fields(error: grpc.aio.AioRpcError) -> list[str]:
    metadata = error.trailing_metadata()
    packed = next(value for key, value in metadata if key == DETAILS)
    fields = []
    for detail in status_pb2.Status.FromString(packed).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
    return fields
