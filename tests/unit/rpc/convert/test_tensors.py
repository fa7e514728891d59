"""Whatever bytes a client sends as a tensor, it is read exactly or refused by name."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.core.errors import InvalidRequest
from splitserve.rpc.convert.tensors import ANY, TensorSpec, add_output, inputs_of, raw_of_texts, texts_of_raw
from splitserve.rpc.gen import grpc_service_pb2 as pb

SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("texts", "BYTES", (ANY,)),
        TensorSpec("one", "BYTES"),
        TensorSpec("ids", "INT64", (ANY,), also=("INT32", "UINT32")),
        TensorSpec("flags", "BOOL", (ANY,)),
    )
}
TEXTS = st.lists(st.binary(max_size=20), max_size=8).map(tuple)


def request(
    name: str, datatype: str, shape: list[int], raw: bytes | None = None, **contents: Any
) -> pb.ModelInferRequest:
    typed = pb.InferTensorContents(**contents) if contents else None
    tensor = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=typed)
    return pb.ModelInferRequest(inputs=[tensor], raw_input_contents=[] if raw is None else [raw])


def refused_field(message: pb.ModelInferRequest) -> str:
    with pytest.raises(InvalidRequest) as refused:
        inputs_of(message, SPECS)
    return refused.value.field


@settings(deadline=None)
@given(TEXTS)
def test_raw_texts_come_back_as_they_were(texts: tuple[bytes, ...]) -> None:
    assert texts_of_raw(raw_of_texts(texts), "texts") == texts


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_any_raw_bytes_are_texts_exactly_or_refused(raw: bytes) -> None:
    texts = _unless_refused(lambda: texts_of_raw(raw, "texts"), "texts")
    assert texts is None or raw_of_texts(texts) == raw


@settings(deadline=None)
@given(TEXTS.filter(bool), st.data())
def test_raw_texts_that_are_cut_short_are_refused(texts: tuple[bytes, ...], data: st.DataObject) -> None:
    whole = raw_of_texts(texts)
    last = len(whole) - len(texts[-1]) - 4
    cut = data.draw(st.integers(last + 1, len(whole) - 1))
    with pytest.raises(InvalidRequest):
        texts_of_raw(whole[:cut], "texts")


def test_a_length_far_beyond_the_bytes_takes_no_memory() -> None:
    with pytest.raises(InvalidRequest, match="say 4294967295 bytes at byte 4; 1 are left"):
        texts_of_raw(b"\xff\xff\xff\xffx", "texts")


@settings(deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.sampled_from(["BYTES", "BOOL", "INT32", "INT64", "UINT32", "FP32", "", "x"]),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    st.binary(max_size=40),
)
def test_no_raw_tensor_breaks_the_reading(name: str, datatype: str, shape: list[int], raw: bytes) -> None:
    elements = _unless_refused(lambda: inputs_of(request(name, datatype, shape, raw), SPECS)[name], name)
    assert elements is None or len(elements) == shape[0]


def _unless_refused(read: Callable[[], tuple[Any, ...]], field: str) -> tuple[Any, ...] | None:
    """None if it was, by this name."""
    named = None
    try:
        return read()
    except InvalidRequest as error:
        named = error.field
    assert named == field
    return None


@pytest.mark.parametrize(("datatype", "code"), [("INT64", "q"), ("INT32", "i"), ("UINT32", "I")])
@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple))
def test_whole_numbers_are_little_endian(datatype: str, code: str, ids: tuple[int, ...]) -> None:
    raw = struct.pack(f"<{len(ids)}{code}", *ids)
    assert inputs_of(request("ids", datatype, [len(ids)], raw), SPECS) == {"ids": ids}


@pytest.mark.parametrize(
    ("message", "elements"),
    [
        (request("texts", "BYTES", [2], bytes_contents=[b"a", b""]), (b"a", b"")),
        (request("ids", "INT64", [2], int64_contents=[1, -1]), (1, -1)),
        (request("ids", "INT32", [1], int_contents=[7]), (7,)),
        (request("ids", "UINT32", [1], uint_contents=[2**32 - 1]), (2**32 - 1,)),
        (request("flags", "BOOL", [2], bool_contents=[True, False]), (True, False)),
        (request("flags", "BOOL", [2], b"\x01\x00"), (True, False)),
        (request("texts", "BYTES", [0], b""), ()),
        (request("ids", "INT64", [0]), ()),
    ],
)
def test_elements_come_raw_or_typed(message: pb.ModelInferRequest, elements: tuple[Any, ...]) -> None:
    assert tuple(inputs_of(message, SPECS).values()) == (elements,)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (request("other", "BYTES", [1], b""), "inputs[0].name"),
        (request("one", "INT64", [1], bytes(8)), "one"),
        (request("one", "BYTES", [], raw_of_texts([b"x"])), "one"),
        (request("one", "BYTES", [1, 1], raw_of_texts([b"x"])), "one"),
        (request("one", "BYTES", [1], raw_of_texts([b"x", b"y"])), "one"),
        (request("one", "BYTES", [1], b""), "one"),
        (request("one", "BYTES", [1]), "one"),
        (request("texts", "BYTES", [-1], b""), "texts"),
        (request("ids", "INT64", [1], bytes(7)), "ids"),
        (request("ids", "INT64", [2**62], bytes(8)), "ids"),
        (request("ids", "INT64", [1], bytes(8), int64_contents=[1]), "ids.contents"),
        (request("ids", "INT64", [1], int_contents=[1]), "ids.contents.int_contents"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(message: pb.ModelInferRequest, field: str) -> None:
    assert refused_field(message) == field


def test_an_input_that_comes_twice_or_with_parameters_is_refused() -> None:
    message = request("one", "BYTES", [1], bytes_contents=[b"x"])
    message.inputs.append(message.inputs[0])
    assert refused_field(message) == "one"
    del message.inputs[1]
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert refused_field(message) == "one.parameters"


def test_raw_contents_are_there_for_each_input_or_for_none() -> None:
    message = request("one", "BYTES", [1], raw_of_texts([b"x"]))
    message.raw_input_contents.append(b"")
    assert refused_field(message) == "raw_input_contents"


@pytest.mark.parametrize(
    ("spec", "elements", "raw"),
    [
        (SPECS["texts"], [b"ab", b""], b"\x02\0\0\0ab\0\0\0\0"),
        (SPECS["ids"], [1, 2], struct.pack("<2q", 1, 2)),
        (TensorSpec("x", "FP32", (ANY,)), [-0.5], struct.pack("<f", -0.5)),
        (TensorSpec("x", "UINT32", (ANY,)), [], b""),
    ],
)
def test_outputs_are_raw_and_say_their_shape(spec: TensorSpec, elements: list[Any], raw: bytes) -> None:
    message = pb.ModelInferResponse()
    add_output(message, spec, elements)
    assert list(message.raw_output_contents) == [raw]
    assert (message.outputs[0].datatype, list(message.outputs[0].shape)) == (spec.datatype, [len(elements)])
