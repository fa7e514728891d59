"""Between the Open Inference Protocol's tensors and what the router serves: which inputs and outputs a model has, what
a request asks, and how its answer looks. Pure.

The contract is that of Triton's vLLM backend, so that its clients work unchanged: `text_input`, a JSON object of
`sampling_parameters`, `stream`, `exclude_input_in_output` and the `return_...` inputs; and besides, token ids in
(`input_ids`) and out (`token_ids`), and everything in `parameters` too. A whole answer begins with the prompt unless
`exclude_input_in_output` says no, a stream never does, as there. Nothing that a request says is ignored: what is not
known or can't be done is refused by the name that the client knows it by.

Not in the package's `__init__`, on purpose: Triton's client registers messages of the same names with protobuf, and no
process can have both. So only a router imports this.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from splitserve.core.errors import InvalidRequest, ModelNotFound, Overloaded, SplitserveError
from splitserve.core.request import Chunk, FinishReason, GenerateRequest, Logprob, Model, Prompt, SamplingParams
from splitserve.rpc.convert.parameters import JSON_INPUT, Said, said_in
from splitserve.rpc.convert.tensors import ANY, TensorSpec, add_output, inputs_of
from splitserve.rpc.gen import grpc_service_pb2 as pb
from splitserve.rpc.status import code_of

VERSION = "1"
PLATFORM = "splitserve"
FINAL = "triton_final_response"
ENABLE_FINAL = "triton_enable_empty_final_response"  # each request's last response is marked anyhow
_LONGEST_ID = 200  # the router's own limit, less what makes an id unique there
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's own stand-in

_RETURNS: Mapping[str, str] = {  # input -> the output that it asks for
    f"return_{name}": name
    for name in (
        *("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens", "token_ids"),
    )
}
INPUTS: Mapping[str, TensorSpec] = {
    spec.name: spec
    for spec in (
        TensorSpec("text_input", "BYTES"),
        TensorSpec("input_ids", "INT64", (ANY,), also=("INT32", "UINT32")),
        TensorSpec(JSON_INPUT, "BYTES"),
        TensorSpec("stream", "BOOL"),
        TensorSpec("exclude_input_in_output", "BOOL"),
        *(TensorSpec(name, "BOOL") for name in _RETURNS),
    )
}
OUTPUTS: Mapping[str, TensorSpec] = {
    spec.name: spec
    for spec in (
        TensorSpec("text_output", "BYTES", (ANY,)),  # one text per output of the request (`n`), like those below
        TensorSpec("finish_reason", "BYTES", (ANY,)),  # "None" while there is none
        TensorSpec("cumulative_logprob", "FP32", (ANY,)),
        TensorSpec("logprobs", "BYTES", (ANY,)),  # JSON: for each token an object by token id
        TensorSpec("num_input_tokens", "UINT32", (ANY,)),  # with a request's last response
        TensorSpec("num_output_tokens", "UINT32", (ANY,)),  # of this response
        TensorSpec("token_ids", "INT64", (ANY,)),  # of all outputs, one after the other
    )
}
_CLIENTS_NAMES = {"text": "text_input", "token_ids.ids": "input_ids", "request_id": "id", "lora": "lora_name"}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, and how it is to be answered. `id` is the client's: the router's own has it as its beginning."""

    request: GenerateRequest
    id: str
    outputs: tuple[str, ...]
    stream: bool
    prefix: bytes = b""  # of each text
    places: Mapping[str, str] = field(default_factory=dict)

    def named(self, error: SplitserveError) -> SplitserveError:
        """The error with the field as this client called it."""
        if not isinstance(error, InvalidRequest):
            return error
        name, rest = re.fullmatch(r"(?:sampling\.)?(\w*)(.*)", error.field, re.DOTALL).groups()  # type: ignore[union-attr]
        place = self.places.get(name)
        clients = place + rest if place is not None else _CLIENTS_NAMES.get(error.field, error.field)
        return InvalidRequest(clients, error.message)


@dataclass(frozen=True, slots=True)
class Part:
    """What one response has of one output. `cumulative_logprob` is of all of it so far."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[tuple[Logprob, ...], ...] = ()
    cumulative_logprob: float = 0.0


# Models -------------------------------------------------------------------------------------------------------------
def check_version(model: str, version: str) -> None:
    """Raises ModelNotFound."""
    if version not in ("", VERSION):
        raise ModelNotFound(f"version: {model!r} has version {VERSION} only, not {version!r}")


def model_to_metadata(model: Model) -> pb.ModelMetadataResponse:
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[VERSION],
        platform=PLATFORM,
        inputs=[spec.to_proto() for spec in INPUTS.values()],
        outputs=[spec.to_proto() for spec in OUTPUTS.values()],
    )


# Requests -----------------------------------------------------------------------------------------------------------
def asked_from_proto(message: pb.ModelInferRequest, stream: bool) -> Asked:
    """`stream`: whether the call streams, and so whether this request does unless it says. Raises InvalidRequest with
    the client's name of the field, and ModelNotFound for another version."""
    _check_names(message)
    inputs = inputs_of(message, INPUTS)
    said = _said(message, inputs)
    streams = _one(inputs, "stream", stream)
    if streams and not stream:
        raise InvalidRequest("stream", "ModelInfer gives one whole answer; call ModelStreamInfer, or leave it out")
    prompt, prefix = _prompt(inputs, streams)
    outputs = _outputs(message, inputs)
    return Asked(
        request=GenerateRequest(
            prompt=prompt,
            sampling=_sampling(said, outputs),
            model=message.model_name,
            request_id=f"{message.id}-{uuid4().hex[:12]}" if message.id else "",
            **said.routing,
        ),
        id=message.id,
        outputs=outputs,
        stream=streams,
        prefix=prefix,
        places=said.places,
    )


def _check_names(message: pb.ModelInferRequest) -> None:
    if not message.model_name:
        raise InvalidRequest("model_name", "is empty; name a model")
    check_version(message.model_name, message.model_version)
    if len(message.id) > _LONGEST_ID or not message.id.isprintable():
        raise InvalidRequest("id", f"at most {_LONGEST_ID} printable characters")


def _said(message: pb.ModelInferRequest, inputs: Mapping[str, tuple[Any, ...]]) -> Said:
    parameters = dict(message.parameters)
    marks_final = parameters.pop(ENABLE_FINAL, None)
    if marks_final is not None and marks_final.WhichOneof("parameter_choice") != "bool_param":
        raise InvalidRequest(f"parameters.{ENABLE_FINAL}", "must be true or false")
    return said_in(parameters, _one(inputs, JSON_INPUT, None))


def _prompt(inputs: Mapping[str, tuple[Any, ...]], streams: bool) -> tuple[Prompt, bytes]:
    """And what the text of the answer begins with."""
    if ("text_input" in inputs) == ("input_ids" in inputs):
        said = "both are said" if "text_input" in inputs else "neither is said"
        raise InvalidRequest("text_input", f"{said}; a request has either text_input or input_ids")
    echoes = not _one(inputs, "exclude_input_in_output", streams or "input_ids" in inputs)
    if echoes and streams:
        raise InvalidRequest("exclude_input_in_output", "must be true for a stream: it has new text only")
    if "input_ids" in inputs:
        if echoes:
            raise InvalidRequest("exclude_input_in_output", "must be true with input_ids, which are no text")
        return inputs["input_ids"], b""
    raw: bytes = inputs["text_input"][0]
    try:
        return raw.decode(), raw if echoes else b""
    except UnicodeDecodeError as error:
        raise InvalidRequest("text_input", f"is not UTF-8 at byte {error.start}") from error


def _outputs(message: pb.ModelInferRequest, inputs: Mapping[str, tuple[Any, ...]]) -> tuple[str, ...]:
    """Those that the request lists; else the text, and what it wants returned."""
    for at, output in enumerate(message.outputs):
        if output.name not in OUTPUTS:
            sentence = f"{output.name!r} is unknown; there are {', '.join(OUTPUTS)}"
            raise InvalidRequest(f"outputs[{at}].name", sentence)
        if output.parameters:
            names = ", ".join(sorted(output.parameters))
            raise InvalidRequest(f"{output.name}.parameters", f"{names}: not supported; leave out")
    listed = tuple(dict.fromkeys(output.name for output in message.outputs))
    return listed or ("text_output", *(output for name, output in _RETURNS.items() if _one(inputs, name, False)))


def _sampling(said: Said, outputs: Sequence[str]) -> SamplingParams:
    """Log probabilities are computed where they are to be told."""
    wants_logprobs = {"logprobs", "cumulative_logprob"} & set(outputs)
    least: dict[str, Any] = {"logprobs": 0} if wants_logprobs else {}
    return SamplingParams(**{**least, **said.sampling})


def _one(inputs: Mapping[str, tuple[Any, ...]], name: str, unless_said: Any) -> Any:
    return inputs[name][0] if name in inputs else unless_said


# Answers ------------------------------------------------------------------------------------------------------------
def part_of(chunks: Sequence[Chunk], logprob_before: float = 0.0) -> Part:
    """One output's chunks together; `logprob_before` is the cumulative log probability of what came before."""
    logprobs = tuple(token for chunk in chunks for token in chunk.logprobs)
    return Part(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=chunks[-1].finish_reason,
        logprobs=logprobs,
        cumulative_logprob=logprob_before + sum(token[0].logprob for token in logprobs),
    )


def whole_to_proto(asked: Asked, chunks: Sequence[Chunk]) -> pb.ModelInferResponse:
    """All outputs' chunks, in the order in which they came."""
    outputs: list[list[Chunk]] = [[] for _ in range(asked.request.sampling.n)]
    for chunk in chunks:
        outputs[chunk.choice].append(chunk)
    return answer_to_proto(asked, [part_of(output) for output in outputs], chunks[-1])


def answer_to_proto(asked: Asked, parts: Sequence[Part], chunk: Chunk) -> pb.ModelInferResponse:
    """`chunk` is the latest: it has what only a request's end tells."""
    message = pb.ModelInferResponse(
        model_name=asked.request.model, model_version=VERSION, id=asked.id or chunk.request_id
    )
    for name in asked.outputs:
        elements = _elements(name, asked, parts, chunk)
        if elements is not None:
            add_output(message, OUTPUTS[name], elements)
    if asked.stream and asked.request.sampling.n > 1:
        message.parameters["choice"].int64_param = chunk.choice
    _tell_end(message, chunk)
    return message


def streamed(response: pb.ModelInferResponse, final: bool) -> pb.ModelStreamInferResponse:
    response.parameters[FINAL].bool_param = final
    return pb.ModelStreamInferResponse(infer_response=response)


def failure_to_proto(message: pb.ModelInferRequest, error: SplitserveError) -> pb.ModelStreamInferResponse:
    """For one request of a stream that goes on. The sentence has the id and the code, since Triton's client shows only
    that; the response's parameters have all that a status' details would."""
    code = code_of(error).name
    of_request = f"[request id: {message.id}] " if message.id else ""
    response = pb.ModelInferResponse(model_name=message.model_name, model_version=VERSION, id=message.id)
    response.parameters["code"].string_param = code
    if isinstance(error, InvalidRequest):
        response.parameters["field"].string_param = error.field
    if isinstance(error, Overloaded):
        response.parameters["retry_after_s"].double_param = error.retry_after_s
        response.parameters["limit"].string_param = error.limit.value
    failure = streamed(response, final=True)
    failure.error_message = f"{of_request}{code}: {error}"
    return failure


def _elements(name: str, asked: Asked, parts: Sequence[Part], chunk: Chunk) -> Sequence[Any] | None:
    """None: not known yet."""
    if name == "text_output":
        return [asked.prefix + part.text.encode(errors="replace") for part in parts]
    if name == "finish_reason":
        return [str(part.finish_reason).encode() for part in parts]
    if name == "cumulative_logprob":
        return [part.cumulative_logprob for part in parts]
    if name == "logprobs":
        return [json.dumps([_by_token(token) for token in part.logprobs]).encode() for part in parts]
    if name == "num_output_tokens":
        return [len(part.token_ids) for part in parts]
    if name == "token_ids":
        return [token for part in parts for token in part.token_ids]
    assert name == "num_input_tokens"
    return [chunk.usage.prompt_tokens] if chunk.usage is not None else None


def _by_token(token: Iterable[Logprob]) -> dict[int, dict[str, float]]:
    return {one.token_id: {"logprob": max(one.logprob, _LEAST_LOGPROB), "rank": one.rank} for one in token}


def _tell_end(message: pb.ModelInferResponse, chunk: Chunk) -> None:
    """Usage and timings, in seconds, and the router's own id, under the names that they have elsewhere."""
    if chunk.usage is not None:
        message.parameters["request_id"].string_param = chunk.request_id
    for value in (chunk.usage, chunk.timings):
        for name in getattr(value, "__dataclass_fields__", ()):
            _set(message.parameters[name], getattr(value, name))


def _set(parameter: pb.InferParameter, value: float | str) -> None:
    if isinstance(value, str):
        parameter.string_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    else:
        parameter.double_param = value
