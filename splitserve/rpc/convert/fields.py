"""What every conversion is made of: fields called alike on both sides, enums, values that may not fit. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.message import Message

from splitserve.core.errors import InvalidRequest

KeyT = TypeVar("KeyT")
MessageT = TypeVar("MessageT", bound=Message)
ValueT = TypeVar("ValueT")


def same_fields_to(kind: type[MessageT], value: object, **others: Any) -> MessageT:
    """The proto and the dataclass name their fields alike (a test asserts it); `others` are those of other types."""
    names = (field.name for field in kind.DESCRIPTOR.fields)
    return kind(**{name: getattr(value, name) for name in names if name not in others}, **others)


def same_fields_from(kind: type[ValueT], message: Message, **others: Any) -> ValueT:
    names = (field.name for field in message.DESCRIPTOR.fields)
    return kind(**{name: getattr(message, name) for name in names if name not in others}, **others)


def key_of(table: Mapping[KeyT, int], value: int) -> KeyT | None:
    return next((key for key, number in table.items() if number == value), None)


def assign(message: Message, name: str, value: object, field: str) -> None:
    """Raises InvalidRequest naming `field` if the wire type has no room for the value."""
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field, f"{value!r} can't be sent: {error}") from error


def fill(repeated: Any, values: Iterable[object], field: str) -> None:
    """Of a repeated field, or with pairs of a map. Raises InvalidRequest naming `field`."""
    try:
        if hasattr(repeated, "extend"):
            repeated.extend(values)
        else:
            repeated.update(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(field, f"can't be sent: {error}") from error
