"""What a request of the Open Inference Protocol asks, and how its answer looks."""

import json
import struct
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from splitserve.core.errors import InvalidRequest, Limit, ModelNotFound, Overloaded, Unavailable
from splitserve.core.request import Chunk, FinishReason, Logprob, Model, SamplingParams, Timings, Usage
from splitserve.rpc.convert import kserve
from splitserve.rpc.convert.tensors import raw_of_texts, texts_of_raw
from splitserve.rpc.gen import grpc_service_pb2 as pb

TIMINGS = Timings(0.1, 0.2, 0.0, 0.3, 0.01, "p", "d", 5, 4, 1)
WITHIN_S = 60


def tensor(name: str, datatype: str, shape: list[int], **contents: Any) -> pb.ModelInferRequest.InferInputTensor:
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents)
    )


def text(said: str | bytes = "Once") -> pb.ModelInferRequest.InferInputTensor:
    raw = said if isinstance(said, bytes) else said.encode()
    return tensor("text_input", "BYTES", [1], bytes_contents=[raw])


def ids(*token_ids: int) -> pb.ModelInferRequest.InferInputTensor:
    return tensor("input_ids", "INT64", [len(token_ids)], int64_contents=token_ids)


def flag(name: str, said: bool = True) -> pb.ModelInferRequest.InferInputTensor:
    return tensor(name, "BOOL", [1], bool_contents=[said])


def sampling(**said: Any) -> pb.ModelInferRequest.InferInputTensor:
    return tensor("sampling_parameters", "BYTES", [1], bytes_contents=[json.dumps(said).encode()])


def request(
    *inputs: pb.ModelInferRequest.InferInputTensor, outputs: tuple[str, ...] = (), **fields: Any
) -> pb.ModelInferRequest:
    listed = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    return pb.ModelInferRequest(**{"model_name": "model", "id": "r", "inputs": inputs, "outputs": listed, **fields})


def asked(*inputs: pb.ModelInferRequest.InferInputTensor, stream: bool = False, **fields: Any) -> kserve.Asked:
    return kserve.asked_from_proto(request(*inputs, **fields), stream)


def refused_field(message: pb.ModelInferRequest, stream: bool = False) -> str:
    with pytest.raises(InvalidRequest) as refused:
        kserve.asked_from_proto(message, stream)
    return refused.value.field


def chunk(said: str, *token_ids: int, choice: int = 0, logprob: float | None = None, last: bool = False) -> Chunk:
    logprobs = tuple((Logprob(token, logprob, 1),) for token in token_ids) if logprob is not None else ()
    return Chunk(
        request_id="r-77",
        index=0,
        token_ids=token_ids,
        text=said,
        logprobs=logprobs,
        finish_reason=FinishReason.LENGTH if last else None,
        usage=Usage(9, 3) if last else None,
        timings=TIMINGS if last else None,
        choice=choice,
    )


def texts(response: pb.ModelInferResponse, name: str = "text_output") -> tuple[bytes, ...]:
    return texts_of_raw(raw(response, name), name)


def raw(response: pb.ModelInferResponse, name: str) -> bytes:
    (at,) = [at for at, output in enumerate(response.outputs) if output.name == name]
    return response.raw_output_contents[at]


# The wire -----------------------------------------------------------------------------------------------------------
def test_names_and_numbers_are_those_of_tritons_client() -> None:
    """Read in another process: none can have both."""
    code = "from tritonclient.grpc import service_pb2; print(service_pb2.DESCRIPTOR.serialized_pb.hex())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WITHIN_S, check=True)
    theirs = descriptor_pb2.FileDescriptorProto.FromString(bytes.fromhex(ran.stdout))
    ours = descriptor_pb2.FileDescriptorProto.FromString(pb.DESCRIPTOR.serialized_pb)
    assert ours.package == theirs.package
    published = {message.name: message for message in theirs.message_type}
    for message in ours.message_type:
        assert _shape(message) == _shape(published[message.name])
    methods = {method.name: method for method in theirs.service[0].method}
    assert ours.service[0].name == theirs.service[0].name
    for method in ours.service[0].method:
        assert _signature(method) == _signature(methods[method.name])


def _shape(message: descriptor_pb2.DescriptorProto) -> object:
    fields = sorted((one.number, one.name, one.type, one.label, one.type_name) for one in message.field)
    oneofs = {one.name: one.HasField("oneof_index") for one in message.field}
    return message.name, fields, oneofs, sorted(str(_shape(nested)) for nested in message.nested_type)


def _signature(method: descriptor_pb2.MethodDescriptorProto) -> object:
    return method.input_type, method.output_type, method.client_streaming, method.server_streaming


# Requests -----------------------------------------------------------------------------------------------------------
def test_a_text_and_its_sampling_become_a_request() -> None:
    parameters = {"max_tokens": pb.InferParameter(int64_param=5), "priority": pb.InferParameter(uint64_param=2)}
    what = asked(text("Ähm"), sampling(temperature="0", stop=["x"]), parameters=parameters)
    assert what.request.prompt == "Ähm"
    assert what.request.sampling == SamplingParams(max_tokens=5, temperature=0.0, stop=("x",))
    assert (what.request.model, what.request.priority) == ("model", 2)
    assert what.outputs == ("text_output",)
    assert not what.stream


def test_token_ids_are_a_prompt_too() -> None:
    assert asked(ids(5, 6)).request.prompt == (5, 6)


def test_raw_contents_and_typed_ones_say_the_same() -> None:
    typed = request(text(), flag("return_token_ids"))
    raw = request(*typed.inputs, raw_input_contents=[raw_of_texts([b"Once"]), b"\x01"])
    for one in raw.inputs:
        one.ClearField("contents")
    first, second = (kserve.asked_from_proto(message, stream=False) for message in (typed, raw))
    assert (first.request.prompt, first.outputs) == (second.request.prompt, second.outputs)


def test_the_routers_id_is_unique_and_begins_with_the_clients() -> None:
    first, second = asked(text(), id="1"), asked(text(), id="1")
    assert first.request.request_id != second.request.request_id
    assert first.request.request_id.startswith("1-")
    assert first.id == "1"
    assert asked(text(), id="").request.request_id == ""


@pytest.mark.parametrize(
    ("inputs", "stream", "prefix"),
    [
        ((text("a"),), False, b"a"),
        ((text("a"), flag("exclude_input_in_output", False)), False, b"a"),
        ((text("a"), flag("exclude_input_in_output")), False, b""),
        ((ids(5),), False, b""),
        ((text("a"),), True, b""),
        ((text("a"), flag("stream", False)), True, b"a"),
    ],
)
def test_a_whole_answer_begins_with_its_prompt_unless_excluded(inputs: Any, stream: bool, prefix: bytes) -> None:
    assert asked(*inputs, stream=stream).prefix == prefix


@pytest.mark.parametrize(
    ("message", "stream", "field"),
    [
        (request(), False, "text_input"),
        (request(text(), ids(5)), False, "text_input"),
        (request(text(b"\xff")), False, "text_input"),
        (request(text(), model_name=""), False, "model_name"),
        (request(text(), id="x" * 201), False, "id"),
        (request(text(), id="a\nb"), False, "id"),
        (request(text(), flag("stream")), False, "stream"),
        (request(text(), flag("exclude_input_in_output", False)), True, "exclude_input_in_output"),
        (request(ids(5), flag("exclude_input_in_output", False)), False, "exclude_input_in_output"),
        (request(text(), outputs=("text_output", "logits")), False, "outputs[1].name"),
        (request(text(), flag("return_everything")), False, "inputs[1].name"),
        (
            request(text(), parameters={"triton_enable_empty_final_response": pb.InferParameter(int64_param=1)}),
            True,
            "parameters.triton_enable_empty_final_response",
        ),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(message: pb.ModelInferRequest, stream: bool, field: str) -> None:
    assert refused_field(message, stream) == field


def test_an_output_with_parameters_is_refused() -> None:
    message = request(text(), outputs=("text_output",))
    message.outputs[0].parameters["classification"].int64_param = 3
    assert refused_field(message) == "text_output.parameters"


def test_another_version_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="'model' has version 1 only, not '2'"):
        asked(text(), model_version="2")
    assert asked(text(), model_version="1").request.model == "model"


def test_outputs_are_those_listed_or_else_the_text_and_what_is_to_be_returned() -> None:
    returned = flag("return_finish_reason"), flag("return_num_output_tokens"), flag("return_token_ids", False)
    assert asked(text(), *returned).outputs == ("text_output", "finish_reason", "num_output_tokens")
    assert asked(text(), *returned, outputs=("token_ids",)).outputs == ("token_ids",)


@pytest.mark.parametrize("name", ["return_logprobs", "return_cumulative_logprob"])
def test_log_probabilities_are_computed_where_they_are_told(name: str) -> None:
    assert asked(text()).request.sampling.logprobs is None
    assert asked(text(), flag(name)).request.sampling.logprobs == 0
    assert asked(text(), flag(name), sampling(logprobs=3)).request.sampling.logprobs == 3


@pytest.mark.parametrize(
    ("raised", "named"),
    [
        ("sampling.max_tokens", "parameters.max_tokens"),
        ("sampling.temperature", "sampling_parameters.temperature"),
        ("sampling.logit_bias[5]", "sampling_parameters.logit_bias[5]"),
        ("sampling.structured_output.json_schema", "sampling_parameters.guided_decoding.json_schema"),
        ("sampling.include_stop", "sampling_parameters.include_stop_str_in_output"),
        ("deadline_s", "parameters.timeout"),
        ("text", "text_input"),
        ("token_ids.ids", "input_ids"),
        ("request_id", "id"),
        ("sampling.top_p", "sampling.top_p"),
    ],
)
def test_the_routers_refusal_names_what_the_client_said(raised: str, named: str) -> None:
    what = asked(
        text(),
        sampling(temperature=3, logit_bias={"5": 1}, guided_decoding={"json": "{"}, include_stop_str_in_output=True),
        parameters={"max_tokens": pb.InferParameter(int64_param=0), "timeout": pb.InferParameter(int64_param=5)},
    )
    assert str(what.named(InvalidRequest(raised, "no"))) == f"{named}: no"


def test_an_error_of_another_kind_stays_as_it_is() -> None:
    error = Unavailable("sampling.max_tokens: gone")
    assert asked(text()).named(error) is error


# Answers ------------------------------------------------------------------------------------------------------------
def test_a_whole_answer_has_all_chunks_of_all_outputs() -> None:
    what = asked(text("a:"), sampling(n=2), outputs=("text_output", "token_ids", "num_output_tokens", "finish_reason"))
    chunks = [
        chunk("x", 1),
        chunk("y", 2, choice=1),
        chunk("z", 3, 4),
        chunk("", choice=0),
        chunk("!", 5, choice=1, last=True),
    ]
    response = kserve.whole_to_proto(what, chunks)
    assert texts(response) == (b"a:xz", b"a:y!")
    assert struct.unpack("<5q", raw(response, "token_ids")) == (1, 3, 4, 2, 5)
    assert struct.unpack("<2I", raw(response, "num_output_tokens")) == (3, 2)
    assert texts(response, "finish_reason") == (b"None", b"length")
    assert (response.id, response.model_name, response.model_version) == ("r", "model", "1")


def test_the_last_response_has_usage_timings_and_the_routers_id() -> None:
    what = asked(text(), flag("return_num_input_tokens"), stream=True)
    first, last = chunk("x", 1), chunk("", last=True)
    early, late = (kserve.answer_to_proto(what, (kserve.part_of((one,)),), one) for one in (first, last))
    assert not early.parameters
    assert [output.name for output in early.outputs] == ["text_output"]
    assert late.parameters["prompt_tokens"].int64_param == 9
    assert late.parameters["ttft_s"].double_param == 0.3
    assert late.parameters["decode_worker"].string_param == "d"
    assert late.parameters["request_id"].string_param == "r-77"
    assert struct.unpack("<I", raw(late, "num_input_tokens")) == (9,)


def test_a_request_without_an_id_is_answered_with_the_routers() -> None:
    one = chunk("x", 1)
    assert kserve.answer_to_proto(asked(text(), id=""), (kserve.part_of((one,)),), one).id == "r-77"


def test_log_probabilities_are_json_by_token_and_add_up() -> None:
    what = asked(text(), flag("return_logprobs"), flag("return_cumulative_logprob"))
    parts = kserve.part_of((chunk("x", 7, logprob=-0.5), chunk("y", 8, logprob=-0.25)), logprob_before=-1.0)
    response = kserve.answer_to_proto(what, (parts,), chunk("y", 8))
    (told,) = texts(response, "logprobs")
    assert json.loads(told) == [{"7": {"logprob": -0.5, "rank": 1}}, {"8": {"logprob": -0.25, "rank": 1}}]
    assert struct.unpack("<f", raw(response, "cumulative_logprob")) == (-1.75,)


def test_json_has_no_infinite_log_probability() -> None:
    part = kserve.part_of((chunk("x", 7, logprob=float("-inf")),))
    (told,) = texts(kserve.answer_to_proto(asked(text(), outputs=("logprobs",)), (part,), chunk("x", 7)), "logprobs")
    assert json.loads(told)[0]["7"]["logprob"] == -9999.0


def test_a_streams_chunk_says_which_output_it_belongs_to_if_there_are_several() -> None:
    one = chunk("x", 1, choice=1)
    several, single = (asked(text(), sampling(n=n), stream=True) for n in (2, 1))
    assert kserve.answer_to_proto(several, (kserve.part_of((one,)),), one).parameters["choice"].int64_param == 1
    assert "choice" not in kserve.answer_to_proto(single, (kserve.part_of((one,)),), one).parameters


def test_a_failure_within_a_stream_says_all_that_a_status_would() -> None:
    invalid = kserve.failure_to_proto(request(), InvalidRequest("text_input", "is empty"))
    assert invalid.error_message == "[request id: r] INVALID_ARGUMENT: text_input: is empty"
    parameters = invalid.infer_response.parameters
    assert (parameters["code"].string_param, parameters["field"].string_param) == ("INVALID_ARGUMENT", "text_input")
    assert parameters["triton_final_response"].bool_param
    assert invalid.infer_response.id == "r"
    full = kserve.failure_to_proto(request(id=""), Overloaded("full", 2.5, Limit.QUEUE))
    assert full.error_message == "RESOURCE_EXHAUSTED: full"
    assert full.infer_response.parameters["retry_after_s"].double_param == 2.5
    assert full.infer_response.parameters["limit"].string_param == "QUEUE"


def test_a_models_metadata_has_every_input_and_output_by_name() -> None:
    metadata = kserve.model_to_metadata(Model("polite", 8192, "demo"))
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("polite", ["1"], "splitserve")
    assert {one.name for one in metadata.inputs} == set(kserve.INPUTS)
    assert {one.name for one in metadata.outputs} == set(kserve.OUTPUTS)
