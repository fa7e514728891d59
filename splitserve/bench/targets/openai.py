"""Any server of OpenAI's completions API: ours, vLLM's, and those in front of several (llm-d's, Dynamo's).

One session for all requests, with as many connections as there are requests; on one event loop. How a stream's tokens
are counted is in `events`, what a refusal means in `refused`.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from splitserve.bench.open_loop import Answer
from splitserve.bench.targets.events import EventStream
from splitserve.bench.targets.opened import Heard, Opened
from splitserve.bench.targets.options import Form, Options, vocabulary_of
from splitserve.bench.targets.refused import broken_off, refused
from splitserve.bench.targets.words import VOCABULARY, text_of
from splitserve.core.config import ClientTls
from splitserve.core.errors import ConfigError, ModelNotFound, Unavailable
from splitserve.rpc.tls import read_client

_CONNECT_S = 30.0
_KEEP_ALIVE_S = 2.0  # below any server's own: a connection that it closes while we take it up fails the request
_JSON = {"Content-Type": "application/json"}


@asynccontextmanager
async def open_server(name: str, url: str, options: Options) -> AsyncIterator[Opened]:
    """`url` is where `/completions` and `/models` are, without a slash at its end. Raises ConfigError for options that
    can't be used, ModelNotFound if it does not list the model, Unavailable if no server answers, and what else the
    server's status means."""
    vocabulary = vocabulary_of(options) if options.form is Form.IDS else VOCABULARY
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S, ssl=_tls(url, options.tls))
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        model = await _model(session, url, options)
        server = _Server(session, url, model, options.form, options.body)
        yield Opened(name, vocabulary, server.ask, {"kind": "openai", "server": url, "model": model})


@dataclass(frozen=True, slots=True)
class _Server:
    session: aiohttp.ClientSession
    url: str
    model: str
    form: Form
    body: Mapping[str, Any]

    async def ask(self, prompt_ids: Sequence[int], output_tokens: int, heard: Heard | None = None) -> Answer:
        """See `opened.Ask`. Of text no ids are heard: the next prompt is made of words, not of the model's tokens."""
        path = "/chat/completions" if self.form is Form.CHAT else "/completions"
        heard = heard if self.form is Form.IDS else None
        said = self._body(prompt_ids, output_tokens, ids=heard is not None)
        stream, body = EventStream(heard), msgspec.json.encode(said)
        try:
            async with self.session.post(self.url + path, data=body, headers=_JSON) as response:
                await _check(response)
                async for data in response.content.iter_any():
                    if tokens := stream.feed(data):
                        yield tokens
                    if stream.error is not None:
                        raise broken_off(stream.error)
        except aiohttp.ClientError as error:
            raise Unavailable(f"the connection broke: {error or type(error).__name__}") from error
        if not stream.ended:
            raise Unavailable("the server ended its stream without saying that it was the end")

    def _body(self, prompt_ids: Sequence[int], output_tokens: int, ids: bool) -> dict[str, Any]:
        body = {
            "model": self.model,
            **_prompt(self.form, prompt_ids),
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "return_token_ids": True if ids else None,
            **self.body,
        }
        return {name: value for name, value in body.items() if value is not None}


def _prompt(form: Form, ids: Sequence[int]) -> dict[str, Any]:
    if form is Form.IDS:
        return {"prompt": ids}
    if form is Form.TEXT:
        return {"prompt": text_of(ids)}
    return {"messages": [{"role": "user", "content": text_of(ids)}]}


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise refused(response.status, await response.read(), response.headers.get("Retry-After"))


async def _model(session: aiohttp.ClientSession, url: str, options: Options) -> str:
    """The model to ask for, which the server lists."""
    try:
        async with asyncio.timeout(options.answer_within_s):
            models = await _models(session, url)
    except (TimeoutError, aiohttp.ClientError) as error:
        reason = str(error) or f"silent for {options.answer_within_s:g} s"
        raise Unavailable(f"no server answers at {url}/models ({reason}); look at the address") from error
    if options.model and options.model not in models:
        raise ModelNotFound(f"it has no model {options.model!r}; it has {', '.join(models) or 'none'}")
    if not models:
        raise Unavailable(f"it lists no model at {url}/models")
    return options.model or models[0]


async def _models(session: aiohttp.ClientSession, url: str) -> list[str]:
    async with session.get(f"{url}/models") as response:
        await _check(response)
        try:
            return [model.id for model in msgspec.json.decode(await response.read(), type=_Models).data]
        except msgspec.MsgspecError as error:
            raise Unavailable(f"{url}/models is no list of models as OpenAI's API has it ({error})") from error


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _tls(url: str, tls: ClientTls | None) -> ssl.SSLContext | bool:
    """True: the public CAs, where the URL asks for TLS."""
    if tls is None:
        return True
    if not url.startswith("https://"):
        raise ConfigError("tls", "a CA and a certificate are for https://, and this is not encrypted")
    read_client(tls)
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context
