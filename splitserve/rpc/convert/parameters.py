"""What a request of the Open Inference Protocol says of sampling and routing, by name: in its `parameters`, and in the
JSON object of its input `sampling_parameters`. Pure.

Names are vLLM's, as Triton's vLLM backend takes them, and Triton's own (`priority`, `timeout`). Every name is honoured
or refused. In the JSON numbers may be written as text, as Triton's sample client does.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splitserve.core.errors import InvalidRequest
from splitserve.core.request import StructuredOutput
from splitserve.rpc.gen import grpc_service_pb2 as pb

JSON_INPUT = "sampling_parameters"
_LONGEST_JSON_KIB = 256
_LONGEST_SHOWN = 80  # characters of a value that is refused
_INT64 = range(-(2**63), 2**63)
_MICROSECONDS = 1e6

Read = Callable[[object], Any]  # raises ValueError with what it must be


@dataclass(slots=True)
class Said:
    """Values by their names in SamplingParams and GenerateRequest; `places` says where each one was said."""

    sampling: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


def said_in(parameters: Mapping[str, pb.InferParameter], text: bytes | None) -> Said:
    """`text` is the JSON. Raises InvalidRequest naming the parameter: unknown, of another type, or said twice."""
    said = Said()
    for name in sorted(parameters):
        place, kind = f"parameters.{name}", parameters[name].WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(place, "has no value; set one of its fields")
        _take(said, name, getattr(parameters[name], kind), place)
    for name, value in _object(text).items() if text is not None else ():
        _take(said, name, _written_out(value), f"{JSON_INPUT}.{name}")
    return said


def _take(said: Said, name: str, value: object, place: str) -> None:
    if name not in _NAMES:
        raise InvalidRequest(place, f"is unknown; there are {', '.join(_NAMES)}")
    if value is None:
        return
    target, read = _NAMES[name]
    if target in said.places:
        raise InvalidRequest(place, f"{said.places[target]} says it already; say it once")
    try:
        taken = read(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest(place, f"{_short(value)} {error}") from error
    said.places[target] = place
    if taken is not None:
        (said.sampling if name in _SAMPLING else said.routing)[target] = taken


def _object(text: bytes) -> dict[str, object]:
    if len(text) > _LONGEST_JSON_KIB * 1024:
        raise InvalidRequest(JSON_INPUT, f"{len(text)} bytes; at most {_LONGEST_JSON_KIB} KiB")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(JSON_INPUT, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(JSON_INPUT, "must be a JSON object of parameters")
    return value


class _Written(str):
    """A text of the JSON: where no text is wanted it may stand for a number or a truth."""

    __slots__ = ()


def _written_out(value: object) -> object:
    return _Written(value) if isinstance(value, str) else value


def _short(value: object) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    shown = ascii(str(value) if isinstance(value, str) else value)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}..."


# Types --------------------------------------------------------------------------------------------------------------
def _integer(value: object) -> int:
    if isinstance(value, _Written):
        try:
            value = int(value)
        except ValueError:
            raise ValueError("must be a whole number") from None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be a whole number")
    if value not in _INT64:
        raise ValueError("must fit 64 bits")
    return value


def _number(value: object) -> float:
    if isinstance(value, _Written):
        try:
            return float(value)
        except ValueError:
            raise ValueError("must be a number") from None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("must be a number")
    return float(value)


def _truth(value: object) -> bool:
    if isinstance(value, _Written) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return _sendable(str(value))


def _sendable(text: str) -> str:
    """JSON can say half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has a half of a surrogate pair, which no text may") from None
    return text


def _texts(value: object) -> tuple[str, ...]:
    """One alone needs no list."""
    if isinstance(value, str):
        return (_text(value),)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"must be text or, in {JSON_INPUT}, a list of texts")
    return tuple(map(_text, value))


def _integers(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"must be a list of token ids; say it in {JSON_INPUT}")
    return tuple(map(_integer, value))


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError(f"must be an object of token ids and numbers; say it in {JSON_INPUT}")
    return {_integer(_Written(token)): _number(bias) for token, bias in value.items()}


def _microseconds(value: object) -> float | None:
    """Triton's `timeout`: 0 is none."""
    timeout = _integer(value)
    return timeout / _MICROSECONDS if timeout else None


def _seconds(value: object) -> float:
    seconds = _number(value)
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError("must be a number of seconds above 0")
    return seconds


def _structured(value: object) -> StructuredOutput | None:
    """vLLM's object, one of whose members says what to keep to."""
    if not isinstance(value, dict):
        raise ValueError(f"must be an object; say it in {JSON_INPUT}")
    said = {name: member for name, member in value.items() if member not in (None, False)}
    unknown = sorted(said.keys() - _STRUCTURED.keys())
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not supported; there are {', '.join(_STRUCTURED)}")
    if len(said) != 1:
        raise ValueError(f"says {' and '.join(sorted(said)) or 'nothing'}; say one kind")
    ((name, member),) = said.items()
    target, read = _STRUCTURED[name]
    return StructuredOutput(**{target: _something(read(member))})


def _schema(value: object) -> str:
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _something(value: Any) -> Any:
    if not value:
        raise ValueError("is empty; say what to keep to")
    return value


_STRUCTURED: Mapping[str, tuple[str, Read]] = {
    "json": ("json_schema", _schema),
    "json_object": ("json_object", _truth),
    "regex": ("regex", _text),
    "choice": ("choice", _texts),
    "grammar": ("grammar", _text),
}


def _each(names: Iterable[str], read: Read) -> dict[str, tuple[str, Read]]:
    return {name: (name, read) for name in names}


_SAMPLING: Mapping[str, tuple[str, Read]] = {
    **_each(("max_tokens", "min_tokens"), _integer),
    **_each(("temperature", "top_p"), _number),
    **_each(("top_k",), _integer),
    **_each(("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"), _number),
    **_each(("seed", "n", "logprobs"), _integer),
    "stop": ("stop", _texts),
    "stop_token_ids": ("stop_token_ids", _integers),
    **_each(("ignore_eos", "skip_special_tokens"), _truth),
    "include_stop_str_in_output": ("include_stop", _truth),
    "logit_bias": ("logit_bias", _biases),
    "structured_outputs": ("structured_output", _structured),
    "guided_decoding": ("structured_output", _structured),
}
_ROUTING: Mapping[str, tuple[str, Read]] = {
    "priority": ("priority", _integer),
    "timeout": ("deadline_s", _microseconds),
    **_each(("deadline_s", "inter_token_deadline_s"), _seconds),
    **_each(("slo_class", "session_id", "cache_salt"), _text),
    "lora_name": ("lora", _text),
}
_NAMES: Mapping[str, tuple[str, Read]] = {**_SAMPLING, **_ROUTING}
