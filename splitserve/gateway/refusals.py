"""Errors as OpenAI's clients know them: status, body and headers, one table.

Pure. A field is called what the client called it: the router names proto fields, and one table here has OpenAI's name
for each of those that differ.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from splitserve.core import errors

UNAVAILABLE_RETRY_S = 1.0
CLIENT_GONE = 499  # nobody is told; metrics are


@dataclass(frozen=True, slots=True)
class Row:
    """How one error class is told."""

    status: int
    type: str
    code: str | None = None


TABLE: Mapping[type[errors.SplitserveError], Row] = {
    errors.SplitserveError: Row(500, "server_error"),
    errors.InvalidRequest: Row(400, "invalid_request_error", "invalid_value"),
    errors.Unauthenticated: Row(401, "authentication_error", "invalid_api_key"),
    errors.PermissionDenied: Row(403, "permission_error", "permission_denied"),
    errors.ModelNotFound: Row(404, "invalid_request_error", "model_not_found"),
    errors.Overloaded: Row(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.DeadlineExceeded: Row(504, "timeout_error", "deadline_exceeded"),
    errors.Cancelled: Row(CLIENT_GONE, "server_error", "cancelled"),
    errors.Unavailable: Row(503, "server_error", "unavailable"),
    errors.EngineError: Row(500, "server_error", "engine_error"),
    errors.JoinRefused: Row(500, "server_error"),
    errors.UnknownWorker: Row(500, "server_error"),
    errors.ConfigError: Row(500, "server_error"),
}
_OF_STATUS: Mapping[int, Row] = {
    404: Row(404, "invalid_request_error", "unknown_url"),
    405: Row(405, "invalid_request_error", "method_not_allowed"),
    408: Row(408, "timeout_error", "request_timeout"),
    413: Row(413, "invalid_request_error", "request_too_large"),
}

# By how a proto field begins, longest first where one begins another.
_PARAMS: tuple[tuple[str, str], ...] = (
    ("text", "prompt"),
    ("token_ids.ids", "prompt"),
    ("token_ids", "prompt"),
    ("messages.tools", "tools"),
    ("messages.tool_choice", "tool_choice"),
    ("messages.template_args", "chat_template_kwargs"),
    ("messages.continue_final_message", "continue_final_message"),
    ("lora", "model"),
    ("sampling.include_stop", "include_stop_str_in_output"),
    ("sampling.structured_output", "response_format"),
    ("sampling.", ""),
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What goes out instead of an answer."""

    status: int
    body: bytes
    retry_after_s: float | None = None


def refusal(error: errors.SplitserveError, params: Iterable[tuple[str, str]] = ()) -> Refusal:
    """`params` are a request's own names for proto fields, before the table's."""
    row, message, param = TABLE[type(error)], str(error), None
    if isinstance(error, errors.InvalidRequest):
        param = param_of(error.field, params)
        message = f"{param}: {error.message}"
    retry_after_s = error.retry_after_s if isinstance(error, errors.Overloaded) else None
    if isinstance(error, errors.Unavailable):
        retry_after_s = UNAVAILABLE_RETRY_S
    return Refusal(row.status, _body(row, message, param), retry_after_s)


def refusal_of_status(status: int, message: str) -> Refusal:
    """Of what HTTP itself refuses: no such route or method, too large."""
    return Refusal(status, _body(_OF_STATUS.get(status, Row(status, "invalid_request_error")), message, None))


def headers_of(refused: Refusal) -> dict[str, str]:
    """OpenAI's clients wait for so long before they try again; HTTP's own header knows whole seconds only."""
    if refused.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if refused.retry_after_s is None:
        return {}
    return {
        "Retry-After": str(max(1, math.ceil(refused.retry_after_s))),
        "Retry-After-Ms": str(math.ceil(refused.retry_after_s * 1000)),
    }


def param_of(field: str, params: Iterable[tuple[str, str]] = ()) -> str:
    """OpenAI's name of a proto field; a name that is OpenAI's already stays."""
    for begins, name in (*params, *_PARAMS):
        if field.startswith(begins):
            return name + field[len(begins) :] if name != "prompt" else name
    return field


def _body(row: Row, message: str, param: str | None) -> bytes:
    told = {"message": message, "type": row.type, "param": param, "code": row.code}
    return msgspec.json.encode({"error": told})
