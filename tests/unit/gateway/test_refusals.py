"""How errors are told: OpenAI's body, status and headers, and what OpenAI's package makes of them."""

import io
import string
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.core import errors
from splitserve.core.errors import SplitserveError
from splitserve.gateway.endpoints import Limits
from splitserve.gateway.refusals import TABLE, param_of, refusal
from tests.unit.gateway.serving import Told, gateway, says, url
from tests.unit.gateway.test_completions import client_of

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize")


def every_error() -> set[type[SplitserveError]]:
    kinds = {SplitserveError}
    while more := {sub for kind in kinds for sub in kind.__subclasses__()} - kinds:
        kinds |= more
    return {kind for kind in kinds if kind.__module__ == errors.__name__}


def test_every_error_has_a_row() -> None:
    assert set(TABLE) == every_error()


@pytest.mark.parametrize(
    ("error", "kind", "status", "code"),
    [
        (errors.InvalidRequest("sampling.top_p", "no"), openai.BadRequestError, 400, "invalid_value"),
        (errors.Unauthenticated("no key"), openai.AuthenticationError, 401, "invalid_api_key"),
        (errors.PermissionDenied("wrong key"), openai.PermissionDeniedError, 403, "permission_denied"),
        (errors.ModelNotFound("no such model"), openai.NotFoundError, 404, "model_not_found"),
        (errors.Overloaded("full", 2.5), openai.RateLimitError, 429, "rate_limit_exceeded"),
        (errors.EngineError("broke"), openai.InternalServerError, 500, "engine_error"),
        (errors.Unavailable("nobody"), openai.InternalServerError, 503, "unavailable"),
        (errors.DeadlineExceeded("late"), openai.InternalServerError, 504, "deadline_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_openais_package_raises_the_error_that_fits(
    error: SplitserveError, kind: type[openai.APIStatusError], status: int, code: str, stream: bool
) -> None:
    async with gateway(Told(says("A"), error=error)) as server, client_of(server) as client:
        with pytest.raises(kind) as raised:
            await client.completions.create(
                model="demo", prompt="x", stream=stream, extra_headers={"x-request-id": "r1"}
            )
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert raised.value.request_id == "r1"
    retry_after = raised.value.response.headers.get("Retry-After")
    assert retry_after == {429: "3", 503: "1"}.get(status)
    assert set(raised.value.body) == {"message", "type", "param", "code"}  # type: ignore[call-overload]


async def test_a_refused_field_has_the_name_that_the_client_gave_it() -> None:
    error = errors.InvalidRequest("sampling.max_tokens", "0 must be 1 or more")
    async with gateway(Told(says("A"), error=error)) as server, client_of(server) as client:
        messages: Any = [{"role": "user", "content": "x"}]
        with pytest.raises(openai.BadRequestError, match=r"max_tokens: 0 must") as old:
            await client.chat.completions.create(model="demo", messages=messages, max_tokens=0)
        with pytest.raises(openai.BadRequestError) as new:
            await client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=0)
    assert (old.value.param, new.value.param) == ("max_tokens", "max_completion_tokens")


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("text", "prompt"),
        ("token_ids.ids", "prompt"),
        ("messages", "messages"),
        ("messages.tools[3].name", "tools[3].name"),
        ("messages.template_args", "chat_template_kwargs"),
        ("sampling.include_stop", "include_stop_str_in_output"),
        ("sampling.structured_output.json_schema", "response_format.json_schema"),
        ("sampling.logit_bias[7]", "logit_bias[7]"),
        ("cache_salt", "cache_salt"),
        ("logprobs", "logprobs"),
    ],
)
def test_a_proto_field_has_a_name_in_openais_words(field: str, param: str) -> None:
    assert param_of(field) == param


def test_a_request_may_call_a_field_by_another_name() -> None:
    refused = refusal(errors.InvalidRequest("sampling.logprobs", "no"), [("sampling.logprobs", "top_logprobs")])
    assert msgspec.json.decode(refused.body)["error"]["param"] == "top_logprobs"


async def test_http_itself_refuses_in_the_same_words() -> None:
    small = Limits(body_mib=1)
    async with gateway(Told(says("A")), small) as server, aiohttp.ClientSession() as session:

        async def refused(method: str, path: str, **what: Any) -> tuple[int, dict[str, Any]]:
            async with session.request(method, url(server, path), **what) as answer:
                assert answer.headers["x-request-id"]
                return answer.status, (await answer.json())["error"]

        status, error = await refused("POST", "/v1/nothing")
        assert (status, error["code"]) == (404, "unknown_url")
        status, error = await refused("GET", "/v1/completions")
        assert (status, error["code"]) == (405, "method_not_allowed")
        status, error = await refused("POST", "/v1/completions", data=io.BytesIO(b"x" * (2**20 + 1)))
        assert (status, error["code"]) == (413, "request_too_large")
        assert "1 MiB" in error["message"]
        status, error = await refused("POST", "/v1/completions", data=b"{")
        assert (status, error["param"]) == (400, "body")
        status, error = await refused("GET", "/v1/models/other")
        assert (status, error["code"]) == (404, "model_not_found")
        status, error = await refused("GET", "/v1/models", headers={"Authorization": "Basic abc"})
        assert (status, error["code"]) == (401, "invalid_api_key")
        broken = {"Content-Encoding": "gzip"}
        status, error = await refused("POST", "/v1/completions", data=b"no gzip", headers=broken)
        assert status == 400


async def test_what_breaks_the_gateway_is_logged_and_told_without_its_inside(caplog: pytest.LogCaptureFixture) -> None:
    async def script(request: object, send: object) -> None:
        raise ZeroDivisionError("secret")

    async with gateway(Told(script)) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.completions.create(model="demo", prompt="x", extra_headers={"x-request-id": "r1"})
    assert "secret" not in str(raised.value)
    assert "ZeroDivisionError" in str(raised.value)
    assert any("request broke the gateway" in record.message for record in caplog.records)


FIELDS = [
    *("prompt", "messages", "model", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias"),
    *("tools", "tool_choice", "response_format", "structured_outputs", "guided_json", "max_tokens", "seed", "echo"),
    *("chat_template_kwargs", "stop_token_ids", "prompt_logprobs", "temperature", "request_id", "best_of", "documents"),
]
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "text", "function", "name", "role", "content", "json_schema", "schema", "7", "id"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6).map(msgspec.json.encode)
RIGHT = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
ALMOST_RIGHT = st.dictionaries(st.sampled_from(FIELDS[2:]), VALUES, max_size=3).map(
    lambda d: msgspec.json.encode(RIGHT | d)
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bodies=st.lists(BODIES | ALMOST_RIGHT | st.binary(max_size=30), min_size=8, max_size=8))
async def test_no_body_breaks_the_gateway(bodies: list[bytes]) -> None:
    async with gateway(Told(says("A"))) as server, aiohttp.ClientSession() as session:
        for body in bodies:
            for path in PATHS:
                async with session.post(url(server, path), data=body) as answer:
                    assert answer.status in (200, 400, 404), (path, body, await answer.text())


@pytest.mark.parametrize("path", PATHS)
async def test_deep_and_endless_bodies_are_refused(path: str) -> None:
    deep = "[" * 100_000
    bodies = [
        deep,
        f'{{"messages": {deep}',
        '{"prompt": "x", "guided_json": ' + deep + "]" * 100_000 + "}",
        '{"prompt": "x", "messages": [], "seed": ' + "9" * 10_000 + "}",
        '{"prompt": "\\ud800", "messages": [{"role": "\\udc00"}]}',
    ]
    nested: Any = {}
    for letter in string.ascii_letters * 8:
        nested = {letter: nested}
    chat = {"messages": [{"role": "user"}], "prompt": 1, "chat_template_kwargs": nested}
    async with gateway(Told(says("A"))) as server, aiohttp.ClientSession() as session:
        for body in (*(one.encode() for one in bodies), msgspec.json.encode(chat)):
            async with session.post(url(server, path), data=body) as answer:
                assert answer.status in (200, 400), await answer.text()
