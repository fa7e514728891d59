from collections.abc import Sequence

import pytest

from splitserve.bench.targets.refused import broken_off, refused
from splitserve.core import errors
from splitserve.gateway.refusals import refusal

ROUND: Sequence[errors.SplitserveError] = (
    errors.InvalidRequest("sampling.top_p", "7 is too much"),
    errors.ModelNotFound("no such model"),
    errors.Unauthenticated("show a key"),
    errors.PermissionDenied("not with this key"),
    errors.Overloaded("the queue is full", 2.0),
    errors.DeadlineExceeded("too late"),
    errors.Unavailable("no worker"),
    errors.EngineError("it broke"),
)


@pytest.mark.parametrize("error", ROUND)
def test_our_own_gateways_refusals_come_back_as_what_they_were(error: errors.SplitserveError) -> None:
    sent = refusal(error)
    came = refused(sent.status, sent.body)
    assert type(came) is type(error)
    assert (getattr(error, "message", None) or str(error)) in str(came)
    assert f"HTTP {sent.status}" in str(came)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"object": "error", "message": "too long", "code": 400}', "too long"),
        (b'{"detail": [{"msg": "Field required"}]}', "Field required"),
        (b'{"error": "nobody home"}', "nobody home"),
        (b"<html>Bad Gateway</html>", "<html>Bad Gateway</html>"),
        (b"[1, 2]", "[1, 2]"),
        (b"\xff" * 2000, "\ufffd" * 500),
        (b"", "without a word"),
    ],
)
def test_whatever_the_body_its_message_is_told(body: bytes, message: str) -> None:
    error = refused(400, body)
    assert isinstance(error, errors.InvalidRequest)
    assert message in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize(("header", "seconds"), [("3", 3.0), (None, 1.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0)])
def test_too_many_says_when_to_come_back(header: str | None, seconds: float) -> None:
    error = refused(429, b"{}", header)
    assert isinstance(error, errors.Overloaded)
    assert error.retry_after_s == seconds


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b'{"error": {"message": "m", "code": 503}}', errors.Unavailable),
        (b'{"error": {"message": "m", "code": 400, "param": "prompt"}}', errors.InvalidRequest),
        (b'{"error": {"message": "m", "code": "unavailable"}}', errors.Unavailable),
        (b'{"error": {"message": "m", "code": "deadline_exceeded"}}', errors.DeadlineExceeded),
        (b'{"error": {"message": "m"}}', errors.EngineError),
        (b'{"error": "m"}', errors.EngineError),
    ],
)
def test_a_stream_that_ends_in_an_error_says_which(event: bytes, kind: type[errors.SplitserveError]) -> None:
    error = broken_off(event)
    assert type(error) is kind
    assert "m" in str(error)
