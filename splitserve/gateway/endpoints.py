"""The HTTP routes: read a body, ask the backend, write the answer. Thin: what is asked and how it looks is decided
elsewhere.

The task that aiohttp runs a request in runs the generation too, and is cancelled when the client goes away. No state
but what runs (`InFlight`).
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from splitserve import __version__
from splitserve.core.errors import (
    EngineError,
    InvalidRequest,
    ModelNotFound,
    SplitserveError,
    Unauthenticated,
    Unavailable,
    first_of,
)
from splitserve.core.request import Chat, Model
from splitserve.core.sink import Sink
from splitserve.gateway.answers import Gathering, chat_answer, completion_answer
from splitserve.gateway.asked import Asked, chat_asked, chat_of, completion_asked
from splitserve.gateway.backend import Backend, Vocabulary
from splitserve.gateway.bodies import (
    TOKENIZE_CHAT_HARMLESS,
    TOKENIZE_TEXT_HARMLESS,
    ChatBody,
    CompletionBody,
    TokenizeChat,
    TokenizeText,
    read_body,
    refuse_unless_harmless,
)
from splitserve.gateway.events import ChatEvents, CompletionEvents, Events
from splitserve.gateway.inflight import InFlight
from splitserve.gateway.refusals import Refusal, refusal
from splitserve.gateway.streaming import EventStream
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import HttpMetrics
from splitserve.telemetry.traces import TRACEPARENT, carried

REQUEST_ID = web.RequestKey("request_id", str)
TOLD_STATUS = web.RequestKey("told_status", int)  # of a stream that failed after its 200
LONGEST_ID = 256
_BEARER = "bearer "


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take of a gateway. `body_s` is for sending a whole body; `stall_s` for not reading."""

    body_mib: int = 32
    body_s: float = 60.0
    stall_s: float = 60.0


@dataclass(frozen=True, slots=True)
class _Kind:
    """What tells the two generating endpoints apart."""

    read: Callable[[bytes], Any]
    asked: Callable[[Any, str], Asked]
    events: type[Events]
    answer: Callable[..., bytes]


_COMPLETIONS = _Kind(
    lambda body: read_body(body, CompletionBody), completion_asked, CompletionEvents, completion_answer
)
_CHAT = _Kind(lambda body: read_body(body, ChatBody), chat_asked, ChatEvents, chat_answer)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The handlers of one gateway."""

    backend: Backend
    metrics: HttpMetrics
    registry: CollectorRegistry
    limits: Limits = field(default_factory=Limits)
    vocabulary: Vocabulary | None = None
    inflight: InFlight = field(default_factory=InFlight)
    logger: Logger = field(default_factory=lambda: Logger("gateway"))

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/completions", self.completions),
            web.post("/v1/chat/completions", self.chat),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{name:.+}", self.model),
            web.post("/tokenize", self.tokenize),
            web.get("/health", self.health),
            web.get("/ping", self.health),
            web.post("/ping", self.health),
            web.get("/version", self.version),
            web.get("/metrics", self.prometheus),
        ]

    async def completions(self, http: web.Request) -> web.StreamResponse:
        return await self._generate(http, _COMPLETIONS)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        return await self._generate(http, _CHAT)

    async def models(self, http: web.Request) -> web.StreamResponse:
        models = await self.backend.models(bearer_of(http))
        return await self._answer(http, _json({"object": "list", "data": [_model_said(model) for model in models]}))

    async def model(self, http: web.Request) -> web.StreamResponse:
        name = http.match_info["name"]
        return await self._answer(http, _json(_model_said(await self._model(name, bearer_of(http)))))

    async def tokenize(self, http: web.Request) -> web.StreamResponse:
        bearer = bearer_of(http)
        prompt, model, with_texts = _to_tokenize(await self._body(http))
        if with_texts and self.vocabulary is None:
            raise InvalidRequest("return_token_strs", "this gateway has no vocabulary; start it with --model")
        ids = await self.backend.tokenize(prompt, model, bearer)
        length = (await self._model(model, bearer)).max_model_len
        texts = [self.vocabulary.text_of(one) for one in ids] if with_texts and self.vocabulary is not None else None
        told = {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": texts}
        return await self._answer(http, _json(told))

    async def health(self, http: web.Request) -> web.StreamResponse:
        if self.inflight.draining:
            raise Unavailable("this gateway drains")
        if not await self.backend.can_serve():
            raise Unavailable("no worker takes requests")
        return await self._answer(http, b"{}")

    async def version(self, http: web.Request) -> web.StreamResponse:
        return await self._answer(http, _json({"version": __version__}))

    async def prometheus(self, http: web.Request) -> web.StreamResponse:
        text = await asyncio.to_thread(generate_latest, self.registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    # Generations ----------------------------------------------------------------------------------------------------
    async def _generate(self, http: web.Request, kind: _Kind) -> web.StreamResponse:
        bearer = bearer_of(http)
        asked = _asked(kind, await self._body(http), http)
        try:
            model = asked.model or (await self._model("", bearer)).name
            prompts = await self._token_ids(asked, bearer)
            if asked.look.stream:
                return await self._stream(
                    http, asked, kind.events(asked, model, _now(), self.vocabulary, prompts), bearer
                )
            gathered = Gathering(asked)
            await self._run(asked, gathered.to, bearer)
        except SplitserveError as error:
            raise Refused(refusal(error, asked.params)) from error
        return await self._answer(http, kind.answer(asked, model, _now(), gathered, self.vocabulary, prompts))

    async def _stream(self, http: web.Request, asked: Asked, events: Events, bearer: str) -> web.StreamResponse:
        stream = EventStream(http, events, asked.request_id, asked.look.usage, self.limits.stall_s)
        try:
            with self.metrics.stream():
                await self._run(asked, stream.to, bearer)
        except SplitserveError as error:
            if not stream.begun:
                raise
            refused = refusal(error, asked.params)
            http[TOLD_STATUS] = refused.status
            await stream.fail(refused.body)
        else:
            await stream.end()
        return stream.response

    async def _run(self, asked: Asked, to: Callable[[int], Sink], bearer: str) -> None:
        """Every prompt's generation, in this task if there is only one."""
        try:
            async with self.inflight.one():
                if len(asked.requests) == 1:
                    await self.backend.generate(asked.requests[0], to(0), bearer)
                    return
                async with asyncio.TaskGroup() as tasks:
                    for at, request in enumerate(asked.requests):
                        tasks.create_task(self.backend.generate(request, to(at), bearer))
        except ExceptionGroup as group:
            raise self._ours(first_of(group), asked.request_id) from group
        except Exception as error:
            raise self._ours(error, asked.request_id) from error

    def _ours(self, error: Exception, request_id: str) -> SplitserveError:
        """What nobody foresaw is logged, and told without its inside."""
        if isinstance(error, SplitserveError):
            return error
        self.logger.exception("request broke the gateway", error, request_id=request_id)
        return EngineError(f"the gateway failed on this request ({type(error).__name__}); its log has the cause")

    async def _token_ids(self, asked: Asked, bearer: str) -> tuple[tuple[int, ...], ...]:
        """The prompts' tokens, where the answer tells of them before its end."""
        if not (asked.look.token_ids or asked.look.usage_in_each):
            return ()
        prompts = [request.prompt for request in asked.requests]
        return tuple(
            [
                prompt if isinstance(prompt, tuple) else await self.backend.tokenize(prompt, asked.model, bearer)
                for prompt in prompts
            ]
        )

    # Around them ----------------------------------------------------------------------------------------------------
    async def _model(self, name: str, bearer: str) -> Model:
        """The one of that name; "" is the model that is served. Raises ModelNotFound."""
        models = await self.backend.models(bearer)
        for model in models:
            if name in ("", model.name):
                return model
        there = ", ".join(repr(model.name) for model in models) or "none"
        raise ModelNotFound(f"model: {name!r} is not served here; there are: {there}")

    async def _body(self, http: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self.limits.body_s):
                return await http.read()
        except TimeoutError as error:
            raise web.HTTPRequestTimeout(text=f"the body took more than {self.limits.body_s:g} s") from error
        except web.RequestPayloadError as error:
            raise InvalidRequest("body", f"can't be read: {error}") from error

    async def _answer(self, http: web.Request, body: bytes) -> web.StreamResponse:
        """Written here and not by aiohttp, whose wait for a client that doesn't read has no end."""
        response = web.Response(body=body, content_type="application/json")
        response.headers["x-request-id"] = http[REQUEST_ID]
        try:
            async with asyncio.timeout(self.limits.stall_s):
                await response.prepare(http)
                await response.write_eof()
        except (TimeoutError, ConnectionError):
            if http.transport is not None:
                http.transport.abort()
        return response


class Refused(Exception):
    """A refusal whose words are settled."""

    def __init__(self, refused: Refusal) -> None:
        super().__init__(refused.status)
        self.refused = refused


def bearer_of(http: web.Request) -> str:
    """The API key, "" without one. Raises Unauthenticated for another way to show one."""
    said = http.headers.get("Authorization", "")
    if not said:
        return ""
    key = said[len(_BEARER) :].strip()
    if said[: len(_BEARER)].lower() != _BEARER or not (key.isascii() and key.isprintable()):
        raise Unauthenticated("show the API key as `Authorization: Bearer KEY`")
    return key


def request_id_of(said: str | None) -> str:
    """What the client calls its request, if that can be an id; else one of ours."""
    return said if said is not None and _may_be_id(said) else uuid4().hex


def _may_be_id(said: str) -> bool:
    return 0 < len(said) <= LONGEST_ID and said.isascii() and said.isprintable()


def _asked(kind: _Kind, body: bytes, http: web.Request) -> Asked:
    """A header's request id goes before the body's. All of its generations are children of its trace."""
    read = kind.read(body)
    if read.request_id is not None and "x-request-id" not in http.headers:
        if not _may_be_id(read.request_id):
            raise InvalidRequest("request_id", f"at most {LONGEST_ID} printable characters of ASCII")
        http[REQUEST_ID] = read.request_id
    try:
        asked = kind.asked(read, http[REQUEST_ID])
    except RecursionError as error:
        raise InvalidRequest("body", "is nested too deeply") from error
    if TRACEPARENT not in http.headers:
        return asked
    headers = [(name.lower(), value) for name, value in http.headers.items()]
    return replace(asked, requests=tuple(carried(request, headers) for request in asked.requests))


def _to_tokenize(body: bytes) -> tuple[str | Chat, str, bool]:
    """What to tokenize, for which model, and whether the tokens' texts are asked for."""
    if b'"messages"' in body:
        chat = read_body(body, TokenizeChat)
        refuse_unless_harmless(chat, TOKENIZE_CHAT_HARMLESS)
        return chat_of(chat), chat.model or "", bool(chat.return_token_strs)
    text = read_body(body, TokenizeText)
    refuse_unless_harmless(text, TOKENIZE_TEXT_HARMLESS)
    return text.prompt, text.model or "", bool(text.return_token_strs)


def _model_said(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "splitserve",
        "root": model.parent or model.name,
        "parent": model.parent or None,
        "max_model_len": model.max_model_len,
    }


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)


def _now() -> int:
    return int(time.time())
