"""Errors to gRPC statuses with google.rpc details, and back: one table, used by every servicer and by the client.

Pure, but for `abort`. Each error travels as its code, its sentence and an ErrorInfo whose reason is its class, or of
Overloaded the limit; a field goes into BadRequest, a delay into RetryInfo.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from splitserve.core import errors

DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "splitserve"
_RETRY_UNSAID_S = 1.0
_MOST_SENTENCE_BYTES = 1024  # gRPC drops a status of more than 8 KiB, and a sentence goes into it up to three times


@dataclass(frozen=True, slots=True)
class Row:
    """How one error class travels. `rebuild` takes the sentence, the field and the delay that came with it."""

    code: grpc.StatusCode
    rebuild: Callable[[str, str, float], errors.SplitserveError]


def _sentence(kind: type[errors.SplitserveError]) -> Callable[[str, str, float], errors.SplitserveError]:
    return lambda message, field, retry_after_s: kind(message)


TABLE: Mapping[type[errors.SplitserveError], Row] = {
    errors.SplitserveError: Row(grpc.StatusCode.INTERNAL, _sentence(errors.SplitserveError)),
    errors.InvalidRequest: Row(grpc.StatusCode.INVALID_ARGUMENT, lambda m, f, _: errors.InvalidRequest(f, m)),
    errors.ModelNotFound: Row(grpc.StatusCode.NOT_FOUND, _sentence(errors.ModelNotFound)),
    errors.Unauthenticated: Row(grpc.StatusCode.UNAUTHENTICATED, _sentence(errors.Unauthenticated)),
    errors.PermissionDenied: Row(grpc.StatusCode.PERMISSION_DENIED, _sentence(errors.PermissionDenied)),
    errors.Overloaded: Row(grpc.StatusCode.RESOURCE_EXHAUSTED, lambda m, _, s: errors.Overloaded(m, s)),
    errors.DeadlineExceeded: Row(grpc.StatusCode.DEADLINE_EXCEEDED, _sentence(errors.DeadlineExceeded)),
    errors.Cancelled: Row(grpc.StatusCode.CANCELLED, _sentence(errors.Cancelled)),
    errors.Unavailable: Row(grpc.StatusCode.UNAVAILABLE, _sentence(errors.Unavailable)),
    errors.EngineError: Row(grpc.StatusCode.INTERNAL, _sentence(errors.EngineError)),
    errors.JoinRefused: Row(grpc.StatusCode.FAILED_PRECONDITION, lambda m, f, _: errors.JoinRefused(f, m)),
    errors.UnknownWorker: Row(grpc.StatusCode.NOT_FOUND, _sentence(errors.UnknownWorker)),
    errors.ConfigError: Row(grpc.StatusCode.FAILED_PRECONDITION, lambda m, f, _: errors.ConfigError(f, m)),
}

CODES = tuple(dict.fromkeys(["OK", *(row.code.name for row in TABLE.values())]))  # what a call may end with

# A peer or a proxy may answer without details.
_BY_CODE: Mapping[grpc.StatusCode, type[errors.SplitserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: errors.JoinRefused,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFound,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
}

# What grpc.aio says, as INTERNAL, of a call that ended while this side was sending: the status it ended with is lost.
_ENDED_WHILE_SENDING = "Internal error from Core"

_LIMITS: Mapping[str, errors.Limit] = {limit.value: limit for limit in errors.Limit}
_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: errors.SplitserveError) -> grpc.StatusCode:
    return TABLE[type(error)].code


def to_status(error: errors.SplitserveError) -> status_pb2.Status:
    """The google.rpc.Status of an error."""
    status = status_pb2.Status(code=code_of(error).value[0], message=_sentence_of(str(error)))
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def from_rpc_error(error: grpc.RpcError) -> errors.SplitserveError:
    """What a failed call of a sync or an async stub means."""
    code, sentence = error.code(), error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            return from_status(_parse(value), code)
    if code is grpc.StatusCode.INTERNAL and sentence == _ENDED_WHILE_SENDING:
        return errors.Unavailable("the other side ended the call while this one was sending; try again")
    return _by_code(code, sentence)


def from_status(status: status_pb2.Status, code: grpc.StatusCode | None = None) -> errors.SplitserveError:
    """The error that `to_status` was given; the nearest class, by `code` or the status's own, if the details are not
    ours."""
    reason, field, message, retry_after_s = "", "", status.message, _RETRY_UNSAID_S
    for packed in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if packed.Unpack(info) and info.domain == _DOMAIN:
            reason = info.reason
        elif packed.Unpack(bad) and bad.field_violations:
            field, message = bad.field_violations[0].field, bad.field_violations[0].description
        elif packed.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    if reason in _LIMITS:
        return errors.Overloaded(message, retry_after_s, _LIMITS[reason])
    for kind, row in TABLE.items():
        if _reason(kind) == reason:
            return row.rebuild(message, field, retry_after_s)
    return _by_code(code or _CODES.get(status.code, grpc.StatusCode.UNKNOWN), message, field, retry_after_s)


async def abort(context: grpc.aio.ServicerContext, error: errors.SplitserveError) -> NoReturn:
    """Ends the call with the error's status."""
    metadata = ((DETAILS_KEY, to_status(error).SerializeToString()),)
    await context.abort(code_of(error), _sentence_of(str(error)), metadata)
    raise AssertionError("abort returned")


def _details(error: errors.SplitserveError) -> Iterable[Message]:
    reason = error.limit.value if isinstance(error, errors.Overloaded) else _reason(type(error))
    yield error_details_pb2.ErrorInfo(reason=reason, domain=_DOMAIN)
    if isinstance(error, errors.InvalidRequest | errors.JoinRefused):
        yield _violation(error.field, error.message)
    if isinstance(error, errors.ConfigError):
        yield _violation(error.path, error.message)
    if isinstance(error, errors.Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        yield retry


def _sentence_of(message: str) -> str:
    """Sentences quote what a client sent, however long that is."""
    encoded = message.encode(errors="replace")
    if len(encoded) <= _MOST_SENTENCE_BYTES:
        return message
    return encoded[:_MOST_SENTENCE_BYTES].decode(errors="ignore") + " ..."


def _violation(field: str, message: str) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=_sentence_of(message))
    return error_details_pb2.BadRequest(field_violations=[violation])


def _reason(kind: type[errors.SplitserveError]) -> str:
    """InvalidRequest → INVALID_REQUEST, as ErrorInfo wants it."""
    return "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in kind.__name__).lstrip("_")


def _parse(details: bytes) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(details)
    except DecodeError:
        return status_pb2.Status()


def _by_code(
    code: grpc.StatusCode, sentence: str, field: str = "", retry_after_s: float = _RETRY_UNSAID_S
) -> errors.SplitserveError:
    if "message larger than max" in sentence:  # gRPC says RESOURCE_EXHAUSTED, but waiting won't make it smaller
        return errors.InvalidRequest("request", sentence)
    kind = _BY_CODE.get(code, errors.EngineError)
    return TABLE[kind].rebuild(sentence or code.name, field or "request", retry_after_s)
