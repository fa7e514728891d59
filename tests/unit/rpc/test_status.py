"""Every error has a status, and comes back from it."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from splitserve.core import errors
from splitserve.rpc.status import DETAILS_KEY, TABLE, code_of, from_rpc_error, from_status, to_status

SAMPLES: list[errors.SplitserveError] = [
    errors.SplitserveError("broken"),
    errors.InvalidRequest("sampling.top_p", "2.0 must be at most 1"),
    errors.ModelNotFound("no such model"),
    errors.Unauthenticated("no key"),
    errors.PermissionDenied("not an admin's key"),
    errors.Overloaded("full", 2.5),
    errors.Overloaded("too many", 2.5, errors.Limit.STREAMS),
    errors.DeadlineExceeded("late"),
    errors.Cancelled("gone"),
    errors.Unavailable("nobody"),
    errors.EngineError("our fault"),
    errors.JoinRefused("kv.dtype", "float16, but the fleet's is float32"),
    errors.UnknownWorker("no d7"),
    errors.ConfigError("a.yaml: pools", "unknown key"),
]


class Failed(grpc.RpcError):  # type: ignore[misc]
    """A failed call as both kinds of stub report it."""

    def __init__(self, code: grpc.StatusCode, sentence: str, details: bytes | None) -> None:
        self._answer = code, sentence, details

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return ((DETAILS_KEY, self._answer[2]),) if self._answer[2] is not None else ()


def failed(error: errors.SplitserveError) -> Failed:
    return Failed(code_of(error), str(error), to_status(error).SerializeToString())


def every_error(kind: type[errors.SplitserveError] = errors.SplitserveError) -> set[type[errors.SplitserveError]]:
    return {kind}.union(*(every_error(below) for below in kind.__subclasses__()))


def test_every_error_class_has_a_row() -> None:
    assert set(TABLE) == every_error() == {type(sample) for sample in SAMPLES}


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_a_client_meets_the_error_that_the_router_raised(error: errors.SplitserveError) -> None:
    met = from_rpc_error(failed(error))
    assert type(met) is type(error)
    assert str(met) == str(error)
    assert vars(met) == vars(error)


@pytest.mark.parametrize("limit", errors.Limit)
def test_the_limit_that_was_reached_is_the_reason(limit: errors.Limit) -> None:
    """Names that were given out stay: programs compare them."""
    info = error_details_pb2.ErrorInfo()
    assert to_status(errors.Overloaded("full", 1.0, limit)).details[0].Unpack(info)
    assert (info.reason, info.domain) == (
        limit.name if limit is not errors.Limit.UNSAID else "OVERLOADED",
        "splitserve",
    )
    met = from_rpc_error(failed(errors.Overloaded("full", 1.0, limit)))
    assert isinstance(met, errors.Overloaded)
    assert met.limit is limit


def test_the_reason_of_every_other_error_is_its_class() -> None:
    reasons = []
    for sample in SAMPLES:
        info = error_details_pb2.ErrorInfo()
        assert to_status(sample).details[0].Unpack(info)
        reasons.append(info.reason)
    assert "INVALID_REQUEST" in reasons
    assert "JOIN_REFUSED" in reasons
    assert len(set(reasons)) == len(SAMPLES), "a limit and a class have the same name"


def test_a_limit_that_a_later_release_knows_keeps_its_delay() -> None:
    status = to_status(errors.Overloaded("full", 7.5, errors.Limit.QUEUE))
    later = error_details_pb2.ErrorInfo(reason="PATIENCE", domain="splitserve")
    status.details[0].Pack(later)
    met = from_status(status)
    assert isinstance(met, errors.Overloaded)
    assert (met.retry_after_s, met.limit) == (7.5, errors.Limit.UNSAID)


@pytest.mark.parametrize("quoted", ["x", "é", "😀"])
def test_a_sentence_that_quotes_too_much_is_cut_so_that_grpc_carries_it(quoted: str) -> None:
    error = errors.InvalidRequest("model", quoted * 100_000)
    met = from_rpc_error(failed(error))
    assert isinstance(met, errors.InvalidRequest)
    assert met.field == "model"
    assert met.message.startswith(quoted * 100)
    details = to_status(error).SerializeToString()
    assert len(b64encode(details)) + 3 * len(to_status(error).message.encode()) < 8192  # percent-encoded at worst


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_the_status_carries_the_same_code_as_the_call(error: errors.SplitserveError) -> None:
    assert code_pb2.Code.Name(to_status(error).code) == code_of(error).name


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.UNKNOWN, errors.EngineError),
    ],
)
@pytest.mark.parametrize("details", [None, b"", b"not a status", status_pb2.Status().SerializeToString()])
def test_an_answer_without_our_details_is_judged_by_its_code(
    code: grpc.StatusCode, kind: type[errors.SplitserveError], details: bytes | None
) -> None:
    assert type(from_rpc_error(Failed(code, "said a proxy", details))) is kind


def test_a_message_too_large_is_the_requests_own_fault() -> None:
    sentence = "Received message larger than max (20 vs. 10)"
    met = from_rpc_error(Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, sentence, None))
    assert isinstance(met, errors.InvalidRequest)


async def test_a_call_that_ends_while_we_send_is_one_to_make_again() -> None:
    """grpc.aio loses its status half of the time, and says INTERNAL."""
    server = grpc.aio.server()
    endless = grpc.stream_stream_rpc_method_handler(_hangs_up)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Talk": endless}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            talk, said = channel.stream_stream("/test/Talk"), set[grpc.StatusCode]()
            while grpc.StatusCode.INTERNAL not in said:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    _ = [response async for response in talk(_words())]
                said.add(caught.value.code())
                assert isinstance(from_rpc_error(caught.value), errors.Unavailable)
    finally:
        await server.stop(None)


async def _hangs_up(words: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    yield await anext(words)
    await context.abort(grpc.StatusCode.UNAVAILABLE, "the server stops")


async def _words() -> AsyncIterator[bytes]:
    for _ in range(50):
        yield b"a word of some length" * 50
        await asyncio.sleep(0)
