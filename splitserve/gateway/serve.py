"""The HTTP server around the endpoints: its start, what every request goes through, its end.

On one event loop; in a router's process or in one of its own. It does not say who may call: the backend is shown the
caller's key.
"""

import socket
import ssl
import time
from collections.abc import Mapping
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CollectorRegistry

from splitserve.core.errors import ConfigError, EngineError, SplitserveError
from splitserve.gateway.backend import Backend, Oversight, Vocabulary
from splitserve.gateway.console import Console
from splitserve.gateway.endpoints import REQUEST_ID, TOLD_STATUS, Endpoints, Limits, Refused, request_id_of
from splitserve.gateway.inflight import InFlight
from splitserve.gateway.refusals import CLIENT_GONE, Refusal, headers_of, refusal, refusal_of_status
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import HttpMetrics

_BACKLOG = 4096  # connections that wait to be taken up: a burst of clients comes at once
_GRACE_S = 2.0
_KEEP_ALIVE_S = 75.0


class HttpServer:
    """Port 0 takes a free port, `address` says which. Once per registry. `start` raises ConfigError if the address is
    taken."""

    def __init__(
        self,
        backend: Backend,
        listen: str,
        ssl_context: ssl.SSLContext | None = None,
        registry: CollectorRegistry | None = None,
        limits: Limits | None = None,
        vocabulary: Vocabulary | None = None,
        overseen: Mapping[str, Oversight] | None = None,
    ) -> None:
        """`vocabulary` gives tokens their texts in log probabilities; without one they are called `token_id:7`.
        `overseen` are the routers that the console looks at, by name; without any there is no console."""
        registry = registry if registry is not None else CollectorRegistry()
        limits = limits or Limits()
        self._listen = listen
        self._ssl_context = ssl_context
        self._inflight = InFlight()
        self._metrics = HttpMetrics(registry)
        self._logger = Logger("gateway")
        self._bound = ""
        app = web.Application(middlewares=[self._around], client_max_size=limits.body_mib * 2**20)
        app.add_routes(Endpoints(backend, self._metrics, registry, limits, vocabulary, self._inflight).routes())
        if overseen:
            app.add_routes(Console(overseen).routes())
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=_GRACE_S,
            keepalive_timeout=_KEEP_ALIVE_S,
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """host:port, once it has started."""
        assert self._bound
        return self._bound

    async def start(self) -> None:
        """Returns when it listens."""
        host, _, port = self._listen.rpartition(":")
        await self._runner.setup()
        site = web.TCPSite(self._runner, host.strip("[]"), int(port), ssl_context=self._ssl_context, backlog=_BACKLOG)
        try:
            await site.start()
        except (OSError, socket.gaierror) as error:
            await self._runner.cleanup()
            raise ConfigError(self._listen, f"can't listen here ({error.strerror}); choose another address") from error
        self._bound = f"{host}:{self._runner.addresses[0][1]}"
        self._logger.info("gateway listens", address=self._bound, tls=self._ssl_context is not None)

    async def drain(self, within_s: float) -> bool:
        """Takes no connections and no requests any more, and waits for those that run, so long at most. Returns whether
        all have ended."""
        self._inflight.drain()
        for site in tuple(self._runner.sites):
            await site.stop()
        self._logger.info("gateway drains", running=len(self._inflight))
        return await self._inflight.ended(within_s)

    async def stop(self) -> None:
        """What still runs ends at once; its client is told so."""
        self._inflight.end()
        await self._inflight.ended(_GRACE_S)
        await self._runner.cleanup()

    @web.middleware
    async def _around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every request's id, its refusal in OpenAI's words, and how it ended."""
        began, status = time.monotonic(), CLIENT_GONE
        request[REQUEST_ID] = request_id_of(request.headers.get("x-request-id"))
        try:
            response = await self._refused_or(request, handler)
            status = request.get(TOLD_STATUS, response.status)
        finally:
            self._metrics.ended(_route_of(request), status, time.monotonic() - began)
        if not response.prepared:
            response.headers["x-request-id"] = request[REQUEST_ID]
        if self._inflight.draining:
            response.force_close()
        return response

    async def _refused_or(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(http)
        except Refused as error:
            return _response(error.refused)
        except SplitserveError as error:
            return _response(refusal(error))
        except web.HTTPException as error:
            refused = refusal_of_status(error.status, _sentence(error, http))
            return _response(refused, {name: error.headers[name] for name in ("Allow",) if name in error.headers})
        except Exception as error:
            self._logger.exception("request broke the gateway", error, request_id=http[REQUEST_ID])
            sentence = f"the gateway failed on this request ({type(error).__name__}); its log has the cause"
            return _response(refusal(EngineError(sentence)))


def _response(refused: Refusal, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=refused.status,
        body=refused.body,
        content_type="application/json",
        headers={**headers_of(refused), **(headers or {})},
    )


def _route_of(http: web.Request) -> str:
    """As it was registered: names of models don't become labels."""
    resource = http.match_info.route.resource
    return resource.canonical if resource is not None else "other"


def _sentence(error: web.HTTPException, http: web.Request) -> str:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return f"the body is larger than the {http.client_max_size // 2**20} MiB that are taken here"
    if isinstance(error, web.HTTPNotFound):
        return f"unknown URL: {http.method} {http.path}"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"{http.path} does not take {http.method}"
    return error.text or error.reason
