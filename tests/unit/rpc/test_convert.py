"""Every message survives the wire."""

import dataclasses
from math import inf
from typing import Any

import pytest

from splitserve.core.errors import InvalidRequest
from splitserve.core.fleet import ClassStatus, Decision, Explanation, FleetStatus, Health, WorkerStatus
from splitserve.core.request import (
    Chat,
    ChatMessage,
    Chunk,
    FinishReason,
    GenerateRequest,
    Logprob,
    Model,
    SamplingParams,
    StructuredOutput,
    Timings,
    Tool,
    ToolCall,
    ToolChoice,
    ToolMode,
    Usage,
)
from splitserve.core.versions import Versions
from splitserve.core.worker import (
    DecodeJob,
    Delta,
    Failure,
    KvFormat,
    KvMode,
    KvPart,
    KvPeer,
    Load,
    Objectives,
    Outcome,
    Parse,
    Pool,
    PrefillJob,
    StepCost,
    Ticket,
    TransferStats,
    WorkerInfo,
)
from splitserve.rpc import convert
from splitserve.rpc.gen import admin_pb2, inference_pb2, worker_pb2
from tests.unit.peers import peer

SAMPLING = SamplingParams(
    max_tokens=7,
    min_tokens=2,
    temperature=0.5,
    top_p=0.25,
    top_k=40,
    min_p=0.125,
    presence_penalty=-1.5,
    frequency_penalty=1.5,
    repetition_penalty=1.25,
    seed=-(2**63),
    stop=("a", "ß"),
    stop_token_ids=(3, 4),
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=2,
    n=3,
    logit_bias={5: -1.5, 9: 100.0},
    structured_output=StructuredOutput(choice=("a", "b")),
    skip_special_tokens=False,
    include_stop=True,
)
CALL = ToolCall(1, "call-1", "weather", '{"city":')
TOOLS = (Tool("weather", "of a city", '{"type": "object"}'), Tool("time"))
CHAT = Chat(
    (ChatMessage("user", "hi"), ChatMessage("assistant", "", (CALL,), "call-0", "bob", "hm")),
    TOOLS,
    ToolChoice(ToolMode.REQUIRED),
    '{"enable_thinking": false}',
    True,
)
RANKS = tuple(KvPeer(f"u/{n}", "tcp://127.0.0.1:5", KvPart(2, 2, n, 1, n, 1, 2), "key", Versions(3, 4)) for n in (1, 2))
KV = KvFormat("print", "bfloat16", 128, 4, 2, 64, 65536, KvMode.PULL, "nixl")
INFO = WorkerInfo(
    "u",
    "p0",
    Pool.PREFILL,
    "demo",
    KV,
    RANKS,
    100,
    8,
    4096,
    "vllm",
    77,
    "127.0.0.1:9401",
    ("presence_penalty", "seed"),
    ("poet",),
    StepCost(0.005, 0.001, 2e-4, 300.0, 1e-5, 1e-9, 2e-4, 5e-4, float("inf"), 0.0, 3e-8, 2),
)
LOAD = Load(3, 90, 7, 12, 4096, 50, 2, 1, 4, Pool.DECODE, True, 999, 3, 0.05, -0.25, 1.5, 11)
OBJECTIVES = Objectives(0.5, 0.05, float("inf"))
TICKET = Ticket("t", 2, RANKS, (peer("v"),), b"\x00\xff")
LOGPROBS = ((Logprob(5, -0.5, 1), Logprob(6, -1.5, 2)), (Logprob(7, -0.25, 1),))
TIMINGS = Timings(0.1, 0.2, 0.3, 0.4, 0.5, "p0", "d0", 1024, 512, 2)


def unlike_the_default(value: object) -> bool:
    """So that a field forgotten on the way can't pass for one that came through."""
    return all(getattr(value, f.name) != default_of(f) for f in dataclasses.fields(value))  # type: ignore[arg-type]


def default_of(field: "dataclasses.Field[Any]") -> object:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


@pytest.mark.parametrize(
    ("value", "there", "back"),
    [
        (SAMPLING, convert.sampling_to_proto, convert.sampling_from_proto),
        (INFO, convert.worker_info_to_proto, convert.worker_info_from_proto),
        (RANKS[1], convert.kv_peer_to_proto, convert.kv_peer_from_proto),
        (LOAD, convert.load_to_proto, convert.load_from_proto),
        (TICKET, convert.ticket_to_proto, convert.ticket_from_proto),
        (
            GenerateRequest(
                "text", SAMPLING, "m", "r", "batch", -5, "s", 1.5, 0.5, "poet", "salt", (4, 5), "00-1", "v=1"
            ),
            convert.request_to_proto,
            convert.request_from_proto,
        ),
        (
            Chunk(
                *("r", 3, (5, 7), "ab", LOGPROBS, FinishReason.TOOL_CALLS, Usage(3, 4), TIMINGS),
                *(2, "hm", (CALL,), ((), *LOGPROBS)),
            ),
            convert.chunk_to_proto,
            convert.chunk_from_proto,
        ),
        (
            Delta("j", 4, (5, 7), "ab", LOGPROBS, Outcome(FinishReason.STOP), "hm", (CALL,), ((), *LOGPROBS)),
            convert.delta_to_proto,
            convert.delta_from_proto,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_field_comes_back(value: object, there: Any, back: Any) -> None:
    assert unlike_the_default(value)
    wire = there(value)
    assert back(type(wire).FromString(wire.SerializeToString())) == value


@pytest.mark.parametrize(
    "job",
    [
        DecodeJob("r/1/decode", "r", (1, 2), SAMPLING, 5.0, (3,), TICKET, -1),
        DecodeJob("r", "r", (1,), SAMPLING, 5.0, lora="poet", cache_salt="s", traceparent="00-1", parse=Parse(TOOLS)),
        DecodeJob("r", "r", (1,), SAMPLING, 5.0, parse=Parse(TOOLS, ToolChoice(function="time"))),
        DecodeJob("r/1/decode", "r", (1, 2), SAMPLING, 5.0),
        PrefillJob("r/1/prefill", "r", (1, 2), TICKET, 5.0, 3),
        PrefillJob("r/1/prefill", "r", (1, 2), TICKET, 5.0, 3, "poet", "salt", "00-1", OBJECTIVES),
        DecodeJob("r", "r", (1,), SAMPLING, 5.0, objectives=OBJECTIVES),
    ],
)
def test_a_job_comes_back_and_keeps_its_number(job: DecodeJob | PrefillJob) -> None:
    wire = convert.job_to_proto(job, 17)
    assert wire.number == 17
    assert convert.job_from_proto(wire) == job


@pytest.mark.parametrize("failure", Failure)
def test_every_failure_comes_back(failure: Failure) -> None:
    outcome = Outcome(None, failure, "why", "sampling.stop", b"h", TransferStats(5, 4, -0.5))
    assert convert.outcome_from_proto(convert.outcome_to_proto(outcome)) == outcome


@pytest.mark.parametrize(
    "structured",
    [
        StructuredOutput(json_schema="{}"),
        StructuredOutput(json_object=True),
        StructuredOutput(regex="a+"),
        StructuredOutput(choice=("a", "b")),
        StructuredOutput(grammar="root ::= 'a'"),
    ],
)
def test_every_kind_of_structured_output_comes_back(structured: StructuredOutput) -> None:
    wire = convert.sampling_to_proto(SamplingParams(structured_output=structured))
    assert convert.sampling_from_proto(wire).structured_output == structured


@pytest.mark.parametrize("structured", [StructuredOutput(), StructuredOutput(regex="a", grammar="b")])
def test_a_structured_output_says_exactly_one_kind(structured: StructuredOutput) -> None:
    with pytest.raises(InvalidRequest, match=r"^sampling\.structured_output"):
        convert.sampling_to_proto(SamplingParams(structured_output=structured))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (inference_pb2.StructuredOutput(), "sampling.structured_output"),
        (inference_pb2.StructuredOutput(regex=""), "sampling.structured_output.regex"),
        (inference_pb2.StructuredOutput(choice=inference_pb2.Choices()), "sampling.structured_output.choice"),
        (inference_pb2.StructuredOutput(json_object=False), "sampling.structured_output.json_object"),
    ],
)
def test_a_structured_output_that_says_nothing_is_refused_by_name(
    message: inference_pb2.StructuredOutput, field: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        convert.sampling_from_proto(inference_pb2.SamplingParams(structured_output=message))
    assert raised.value.field == field


@pytest.mark.parametrize("prompt", ["text", CHAT])
def test_a_prompt_to_tokenise_comes_back(prompt: Any) -> None:
    assert convert.tokenize_from_proto(convert.tokenize_to_proto(prompt, "m")) == prompt


def test_a_model_comes_back() -> None:
    model = Model("poet", 2048, "demo", 1_700_000_000)
    assert convert.model_from_proto(convert.model_to_proto(model)) == model


def test_a_fleets_status_comes_back() -> None:
    worker = WorkerStatus(INFO, Pool.DECODE, Health.SILENT, LOAD, 0.5, -1.0, 2, 3)
    chat = ClassStatus("chat", 1.0, 0.0005, 0.05, inf, 100, 93, 0.31)
    status = FleetStatus("demo", (worker,), 4, 5, "router", (chat,))
    assert convert.fleet_status_from_proto(convert.fleet_status_to_proto(status)) == status


def test_an_explanation_comes_back() -> None:
    decision = Decision("d0", "p0", True, True, 0.5, 3, inf, 0.25, 0.26, -1.0, 1.5, "it was moved")
    explanation = Explanation("r", "chat", -10, 400, 7, 2.5, 1.2, 0.05, inf, 3, "for a worker", (decision,))
    assert convert.explanation_from_proto(convert.explanation_to_proto(explanation)) == explanation


@pytest.mark.parametrize("prompt", ["hello", (1, 2, 3), CHAT])
def test_every_kind_of_prompt_comes_back(prompt: Any) -> None:
    request = GenerateRequest(prompt)
    assert convert.request_from_proto(convert.request_to_proto(request)) == request


def test_an_unset_field_takes_its_default_and_a_set_zero_stays() -> None:
    assert convert.sampling_from_proto(inference_pb2.SamplingParams()) == SamplingParams()
    assert convert.sampling_from_proto(inference_pb2.SamplingParams(temperature=0.0)).temperature == 0.0
    greedy = convert.sampling_to_proto(SamplingParams(temperature=0.0))
    assert convert.sampling_from_proto(greedy).temperature == 0.0


@pytest.mark.parametrize(
    ("wire", "dataclass"),
    [
        (worker_pb2.WorkerInfo, WorkerInfo),
        (worker_pb2.KvFormat, KvFormat),
        (worker_pb2.KvPeer, KvPeer),
        (worker_pb2.KvPart, KvPart),
        (worker_pb2.Load, Load),
        (worker_pb2.StepCost, StepCost),
        (worker_pb2.Objectives, Objectives),
        (worker_pb2.TransferStats, TransferStats),
        (worker_pb2.Ticket, Ticket),
        (worker_pb2.Delta, Delta),
        (worker_pb2.Outcome, Outcome),
        (inference_pb2.SamplingParams, SamplingParams),
        (inference_pb2.Timings, Timings),
        (inference_pb2.Usage, Usage),
        (inference_pb2.Model, Model),
        (inference_pb2.Tool, Tool),
        (inference_pb2.ToolCall, ToolCall),
        (inference_pb2.ChatMessage, ChatMessage),
        (inference_pb2.ChatMessages, Chat),
        (worker_pb2.Parse, Parse),
        (admin_pb2.WorkerStatus, WorkerStatus),
        (admin_pb2.FleetStatus, FleetStatus),
        (admin_pb2.ClassStatus, ClassStatus),
        (admin_pb2.Explanation, Explanation),
        (admin_pb2.Decision, Decision),
    ],
)
def test_wire_and_core_name_their_fields_alike(wire: Any, dataclass: Any) -> None:
    assert {field.name for field in wire.DESCRIPTOR.fields} == {field.name for field in dataclasses.fields(dataclass)}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (GenerateRequest((1, -1)), "token_ids"),
        (GenerateRequest((1, 2**32)), "token_ids"),
        (GenerateRequest("a", SamplingParams(seed=2**63)), "sampling.seed"),
        (GenerateRequest("a", SamplingParams(stop_token_ids=(-1,))), "sampling.stop_token_ids"),
        (GenerateRequest("a", priority=2**31), "priority"),
        (GenerateRequest("a", SamplingParams(logit_bias={-1: 1.0})), "sampling.logit_bias"),
        (GenerateRequest("a", output=(-1,)), "output"),
    ],
)
def test_what_the_wire_has_no_room_for_is_named(request_: GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        convert.request_to_proto(request_)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (inference_pb2.GenerateRequest(), "prompt"),
        (inference_pb2.GenerateRequest(messages=inference_pb2.ChatMessages()), "messages"),
    ],
)
def test_a_request_without_a_prompt_is_refused_by_name(message: inference_pb2.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        convert.request_from_proto(message)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (worker_pb2.WorkerInfo(kv=worker_pb2.KvFormat(mode="carry"), pool=worker_pb2.POOL_DECODE), "kv.mode"),
        (worker_pb2.WorkerInfo(kv=worker_pb2.KvFormat(mode="push")), "pool"),
    ],
)
def test_a_worker_of_another_kind_is_refused_by_name(message: worker_pb2.WorkerInfo, field: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        convert.worker_info_from_proto(message)
    assert raised.value.field == field


def test_a_job_of_no_kind_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"job\.kind"):
        convert.job_from_proto(worker_pb2.Job(job_id="j"))


def test_a_rank_that_says_no_range_speaks_what_was_spoken_before_ranges_were_said() -> None:
    said = convert.kv_peer_to_proto(RANKS[0])
    said.ClearField("control")
    assert convert.kv_peer_from_proto(said) == dataclasses.replace(RANKS[0], control=Versions(2, 2))
