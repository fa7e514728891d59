"""What a target is called on a command line, and from there to one that is ready to be sent to.

grpc://host:port[,host:port]    a router, or several that share the requests; the scheme may be left out
http[s]://host:port[/path]      an OpenAI-compatible server; the path is /v1 unless it is said
worker://host:port              where to listen for one worker, which is then asked directly; port 0: any free one
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from splitserve.bench.targets.openai import open_server
from splitserve.bench.targets.opened import Opened
from splitserve.bench.targets.options import Form, Options
from splitserve.bench.targets.router import open_router
from splitserve.bench.targets.worker import open_worker
from splitserve.core.errors import (
    ConfigError,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
)

__all__ = ["Form", "Kind", "Opened", "Options", "Target", "opened", "parse"]

_PROBE_PROMPT, _PROBE_OUTPUT = 16, 2  # tokens


class Kind(StrEnum):
    ROUTER = "router"
    OPENAI = "openai"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Target:
    """`name` is the whole of it, scheme included; `address` what its kind takes: host:port, or a URL."""

    kind: Kind
    name: str
    address: str


def parse(text: str) -> Target:
    """Raises ConfigError naming the text."""
    scheme, found, rest = text.strip().rpartition("://")
    scheme = scheme.lower() if found else "grpc"
    if scheme == "grpc":
        routers = [_host_and_port(text, one.strip()) for one in rest.split(",")]
        return _target(Kind.ROUTER, scheme, ",".join(routers))
    if scheme == "worker":
        return _target(Kind.WORKER, scheme, _host_and_port(text, rest, lowest=0))
    if scheme in ("http", "https"):
        return _server(text, scheme, rest)
    raise ConfigError(text, f"{scheme}:// is unknown; there are grpc://, http://, https:// and worker://")


@asynccontextmanager
async def opened(target: Target, options: Options | None = None) -> AsyncIterator[Opened]:
    """A target that has answered one short request, so that a run does not find out what is wrong with it a thousand
    times. Raises ConfigError for an option that is missing or that the target refuses, else Unavailable: it is not
    there, or can't serve. Both begin with the target's name."""
    options = options or Options()
    async with AsyncExitStack() as stack:
        with _named(target.name):
            opening = _OPEN[target.kind](target.name, target.address, options)
            ready = await stack.enter_async_context(opening)
            await _probe(ready, options)
        yield ready


_Open = Callable[[str, str, Options], AbstractAsyncContextManager[Opened]]
_OPEN: Mapping[Kind, _Open] = {Kind.ROUTER: open_router, Kind.OPENAI: open_server, Kind.WORKER: open_worker}
_WRONGLY_CALLED = (ConfigError, InvalidRequest, ModelNotFound, PermissionDenied, Unauthenticated)


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except _WRONGLY_CALLED as error:
        raise ConfigError(name, str(error)) from error
    except (SplitserveError, OSError) as error:
        raise Unavailable(f"{name}: {error}") from error


async def _probe(ready: Opened, options: Options) -> None:
    """With the highest token of the vocabulary, which a model with fewer refuses."""
    prompt, tokens = [ready.vocabulary - 1] * _PROBE_PROMPT, 0
    try:
        async with asyncio.timeout(options.first_token_within_s), aclosing(ready.ask(prompt, _PROBE_OUTPUT)) as chunks:
            async for count in chunks:
                tokens += count
    except TimeoutError as error:
        raise Unavailable(f"one short request had no answer within {options.first_token_within_s:g} s") from error
    if tokens != _PROBE_OUTPUT:
        options.say(
            f"{ready.name} answered {tokens} tokens where {_PROBE_OUTPUT} were asked for: it knows no ignore_eos and "
            "min_tokens, or does not say how many tokens it sends; outputs will not have the lengths of the workload"
        )


def _server(text: str, scheme: str, rest: str) -> Target:
    host, _, path = rest.partition("/")
    if not host or _port(text, host) == 0 or any(sign in rest for sign in "?#@"):
        raise ConfigError(text, "a server is http://host:port, with a path at most; an API key is an option")
    return _target(Kind.OPENAI, scheme, f"{scheme}://{host}/{path.strip('/') or 'v1'}")


def _host_and_port(text: str, said: str, lowest: int = 1) -> str:
    port = _port(text, said)
    if port is None or port < lowest or not said.rpartition(":")[0] or "/" in said:
        raise ConfigError(text, f"{said or 'nothing'} is not host:port; say for example 127.0.0.1:50051")
    return said


def _port(text: str, said: str) -> int | None:
    try:
        return urlsplit(f"//{said}").port
    except ValueError as error:
        raise ConfigError(text, f"{said}: {error}; say for example 127.0.0.1:50051") from error


def _target(kind: Kind, scheme: str, address: str) -> Target:
    return Target(kind, address if "://" in address else f"{scheme}://{address}", address)
