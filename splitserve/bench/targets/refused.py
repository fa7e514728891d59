"""What an OpenAI-compatible server's refusal means: its status and body as one of our errors. Pure.

The way back of the gateway's table (`gateway/refusals`), and lenient: vLLM, FastAPI and proxies word bodies otherwise.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from splitserve.core.errors import (
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
)

_MOST_CHARACTERS = 500
_RETRY_UNSAID_S = 1.0
_OF_STATUS: Mapping[int, Callable[[str], SplitserveError]] = {
    401: Unauthenticated,
    403: PermissionDenied,
    404: ModelNotFound,
    408: DeadlineExceeded,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}


def refused(status: int, body: bytes, retry_after: str | None = None) -> SplitserveError:
    """`retry_after`: the header of that name."""
    said = _said(body)
    message = f"HTTP {status}: {_message(said) or _text(body) or 'without a word'}"
    if status == 429:
        return Overloaded(message, _seconds(retry_after))
    if status in _OF_STATUS:
        return _OF_STATUS[status](message)
    if 400 <= status < 500:
        return InvalidRequest(str(said.get("param") or "request"), message)
    return EngineError(message)


def broken_off(event: bytes) -> SplitserveError:
    """What a stream said instead of its end. Its HTTP status was 200; a number in `code` is the one it would have had
    otherwise."""
    said = _said(event)
    code = said.get("code")
    if isinstance(code, int) and 400 <= code < 600:
        return refused(code, event)
    return _OF_CODE.get(str(code), EngineError)(_message(said) or _text(event))


_OF_CODE: Mapping[str, Callable[[str], SplitserveError]] = {
    "unavailable": Unavailable,
    "deadline_exceeded": DeadlineExceeded,
}


def _said(body: bytes) -> dict[str, Any]:
    """The object that tells of the error, wherever this server puts it; empty if there is none."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return {}
    inner = said.get("error", said) if isinstance(said, dict) else {}
    return inner if isinstance(inner, dict) else {"message": inner}


def _message(said: dict[str, Any]) -> str:
    message = said.get("message") or said.get("detail") or ""
    return message if isinstance(message, str) else msgspec.json.encode(message).decode()[:_MOST_CHARACTERS]


def _text(body: bytes) -> str:
    return body[:_MOST_CHARACTERS].decode(errors="replace").strip()


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after)) if retry_after is not None else _RETRY_UNSAID_S
    except ValueError:  # a date
        return _RETRY_UNSAID_S
