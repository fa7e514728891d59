"""Every error a caller can meet, ordered by what its reader can do about it.

    SplitserveError
    ├── InvalidRequest      change the request: the field is named
    ├── ModelNotFound       ask for a model this router serves
    ├── Unauthenticated     show a key, or a valid one
    ├── PermissionDenied    the key is valid but not for this: use one with that scope
    ├── Overloaded          come back after retry_after_s
    ├── DeadlineExceeded    the request's time, or a token's, ran out
    ├── Cancelled           the caller went away
    ├── Unavailable         no worker can serve, or the request can't be resumed: send it again
    ├── EngineError         our fault: a worker's engine broke on this request
    ├── JoinRefused         a worker doesn't fit this fleet: the field is named
    ├── UnknownWorker       an operator named a worker that isn't there
    └── ConfigError         a file or option at start-up: the path is named

`rpc/status.py` maps each to a gRPC status; a test asserts that none is missing.
"""

from enum import StrEnum


class SplitserveError(Exception):
    """Base of every error that splitserve raises on purpose."""


class InvalidRequest(SplitserveError):
    """The request's own fault. `field` is its proto path, such as `sampling.top_p`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class ModelNotFound(SplitserveError):
    """The request names a model that is not served here."""


class Unauthenticated(SplitserveError):
    """The caller showed no API key, or one that this router does not know."""


class PermissionDenied(SplitserveError):
    """The caller's API key lacks the scope that the call needs."""


class Limit(StrEnum):
    """What was at its limit, as programs are told (`docs/api.md`). Names that were given out stay."""

    STREAMS = "STREAMS"  # requests of this router: limits.streams
    CALL_STREAMS = "CALL_STREAMS"  # of one KServe call
    QUEUE = "QUEUE"  # max_waiting_requests
    SLO_CLASS = "SLO_CLASS"  # its class is one of `late: refuse`, and its first token would come late
    KEY_CONCURRENT_REQUESTS = "KEY_CONCURRENT_REQUESTS"  # of the caller's API key
    KEY_REQUESTS_PER_MINUTE = "KEY_REQUESTS_PER_MINUTE"
    KEY_TOKENS_PER_MINUTE = "KEY_TOKENS_PER_MINUTE"
    SLOW_CLIENT = "SLOW_CLIENT"  # limits.client_stall_s, limits.client_buffer_tokens
    UNSAID = "OVERLOADED"  # whoever refused did not say


class Overloaded(SplitserveError):
    """The router's queue is full, or the caller's API key is over a limit: `limit` says which it is."""

    def __init__(self, message: str, retry_after_s: float, limit: Limit = Limit.UNSAID) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.limit = limit


class DeadlineExceeded(SplitserveError):
    """The request's deadline or inter-token deadline passed."""


class Cancelled(SplitserveError):
    """The caller went away or cancelled."""


class Unavailable(SplitserveError):
    """Nothing can serve this now; the same request may be sent again."""


class EngineError(SplitserveError):
    """A worker's engine failed on this request."""


class JoinRefused(SplitserveError):
    """A worker does not fit the fleet. `field` is the WorkerInfo field that disagrees."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class UnknownWorker(SplitserveError):
    """No live worker has this name or uuid."""


class ConfigError(SplitserveError):
    """A configuration file, model directory or option is wrong. `path` says which."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


def first_of(group: BaseExceptionGroup[Exception]) -> Exception:
    """What a TaskGroup's failure began with. Groups nest; this is the first leaf."""
    first = group.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
