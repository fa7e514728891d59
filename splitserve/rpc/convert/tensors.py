"""Tensors of the Open Inference Protocol: from the wire to Python values and back. Pure.

A tensor's elements come raw (little-endian, texts each behind their length in four bytes) or typed. Whatever a peer
sends is either that, exactly, or an InvalidRequest that names the input.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitserve.core.errors import InvalidRequest
from splitserve.rpc.gen import grpc_service_pb2 as pb

ANY = -1  # a dimension of any length
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `also` are datatypes that are taken besides."""

    name: str
    datatype: str
    shape: tuple[int, ...] = (1,)
    also: tuple[str, ...] = ()

    def to_proto(self) -> pb.ModelMetadataResponse.TensorMetadata:
        return pb.ModelMetadataResponse.TensorMetadata(name=self.name, datatype=self.datatype, shape=self.shape)


@dataclass(frozen=True, slots=True)
class _Datatype:
    """`code` is struct's, "" of texts."""

    field: str
    code: str = ""


_DATATYPES: Mapping[str, _Datatype] = {
    "BYTES": _Datatype("bytes_contents"),
    "BOOL": _Datatype("bool_contents", "B"),
    "INT32": _Datatype("int_contents", "i"),
    "INT64": _Datatype("int64_contents", "q"),
    "UINT32": _Datatype("uint_contents", "I"),
    "FP32": _Datatype("fp32_contents", "f"),
}


def inputs_of(message: pb.ModelInferRequest, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[Any, ...]]:
    """Each input's elements by its name. Raises InvalidRequest for one that is unknown, comes twice or is not as its
    spec says."""
    tensors, raw = message.inputs, message.raw_input_contents
    if raw and len(raw) != len(tensors):
        raise InvalidRequest("raw_input_contents", f"{len(raw)} for {len(tensors)} inputs; send one for each, or none")
    said: dict[str, tuple[Any, ...]] = {}
    for at, tensor in enumerate(tensors):
        if tensor.name not in specs:
            raise InvalidRequest(f"inputs[{at}].name", f"{tensor.name!r} is unknown; there are {', '.join(specs)}")
        if tensor.name in said:
            raise InvalidRequest(tensor.name, "comes twice; send it once")
        _check(tensor, specs[tensor.name])
        elements = _of_raw(tensor, raw[at]) if raw else _of_contents(tensor)
        _check_count(tensor, len(elements))
        said[tensor.name] = elements
    return said


def add_output(message: pb.ModelInferResponse, spec: TensorSpec, elements: Sequence[Any]) -> None:
    """Raw, as Triton does."""
    message.outputs.add(name=spec.name, datatype=spec.datatype, shape=(len(elements),))
    code = _DATATYPES[spec.datatype].code
    raw = struct.pack(f"<{len(elements)}{code}", *elements) if code else raw_of_texts(elements)
    message.raw_output_contents.append(raw)


def raw_of_texts(texts: Iterable[bytes]) -> bytes:
    return b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))


def texts_of_raw(raw: bytes, field: str) -> tuple[bytes, ...]:
    """Raises InvalidRequest unless the lengths add up."""
    texts, at = [], 0
    while at < len(raw):
        begin = at + _LENGTH.size
        if begin > len(raw):
            raise InvalidRequest(field, f"raw contents end within a length, at byte {at}")
        (length,) = _LENGTH.unpack_from(raw, at)
        at = begin + length
        if at > len(raw):
            raise InvalidRequest(field, f"raw contents say {length} bytes at byte {begin}; {len(raw) - begin} are left")
        texts.append(raw[begin:at])
    return tuple(texts)


def _check(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec) -> None:
    name, shape = spec.name, tuple(tensor.shape)
    datatypes = (spec.datatype, *spec.also)
    if tensor.datatype not in datatypes:
        raise InvalidRequest(name, f"datatype {tensor.datatype!r}; it must be {' or '.join(datatypes)}")
    fits = len(shape) == len(spec.shape) and all(
        size >= 0 if wanted == ANY else size == wanted for size, wanted in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(name, f"shape {list(shape)}; it must be {list(spec.shape)}")
    if tensor.parameters:
        raise InvalidRequest(f"{name}.parameters", f"{', '.join(sorted(tensor.parameters))}: not supported; leave out")


def _of_raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes) -> tuple[Any, ...]:
    if tensor.HasField("contents"):
        raise InvalidRequest(f"{tensor.name}.contents", "can't be said with raw_input_contents; send one of them")
    code = _DATATYPES[tensor.datatype].code
    if not code:
        return texts_of_raw(raw, tensor.name)
    size = struct.calcsize(f"<{code}")
    if len(raw) % size:
        raise InvalidRequest(tensor.name, f"{len(raw)} raw bytes are no whole number of {tensor.datatype}")
    elements = struct.unpack(f"<{len(raw) // size}{code}", raw)
    return tuple(map(bool, elements)) if tensor.datatype == "BOOL" else elements


def _of_contents(tensor: pb.ModelInferRequest.InferInputTensor) -> tuple[Any, ...]:
    wanted = _DATATYPES[tensor.datatype].field
    others = [field.name for field, _ in tensor.contents.ListFields() if field.name != wanted]
    if others:
        raise InvalidRequest(f"{tensor.name}.contents.{others[0]}", f"{tensor.datatype} goes into {wanted}")
    return tuple(getattr(tensor.contents, wanted))


def _check_count(tensor: pb.ModelInferRequest.InferInputTensor, count: int) -> None:
    """Shapes have one dimension here."""
    if count != tensor.shape[0]:
        raise InvalidRequest(tensor.name, f"{count} elements, but its shape says {tensor.shape[0]}")
