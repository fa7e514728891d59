"""The HTTP side of one process for whoever watches over it: /metrics, /livez and /readyz, on threads of its own.

A probe's caller shows no certificate (a kubelet has none), so where client certificates are asked for, /metrics alone
insists on one. A TLS handshake is its request's thread's work: nobody waits for a caller who stalls in his.
"""

import ssl
import threading
from collections.abc import Callable, Iterable
from http import HTTPStatus
from socket import AF_INET, AF_INET6, socket
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from splitserve.telemetry.health import Check, Probes

_REQUEST_S = 30.0
_VERIFIED = "splitserve.certificate"
_REFUSED = "show a client certificate: this listener asks for one everywhere but at /livez and /readyz"

Contexts = Callable[[], ssl.SSLContext]


class WatchServer:
    """Serves from construction until `close`. `contexts` is asked at each connection, so that a renewed certificate is
    taken up. Raises OSError if the address is taken."""

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, probes: Probes, contexts: Contexts | None = None
    ) -> None:
        self._server = _Server(host, port, contexts)
        asks = contexts is not None and contexts().verify_mode is not ssl.CERT_NONE
        self._server.set_app(_app(registry, probes, asks))
        self._thread = threading.Thread(target=self._server.serve_forever, name="watch", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _app(registry: CollectorRegistry, probes: Probes, asks_for_certificate: bool) -> Callable[..., Iterable[bytes]]:
    metrics = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/livez":
                return _probed(probes.live, start)
            case "/readyz":
                return _probed(probes.ready, start)
            case _ if asks_for_certificate and not environ[_VERIFIED]:
                return _say(HTTPStatus.FORBIDDEN, _REFUSED, start)
            case _:
                answer: Iterable[bytes] = metrics(environ, start)
                return answer

    return app


def _probed(check: Check, start: Callable[..., Any]) -> Iterable[bytes]:
    fault = check()
    return _say(HTTPStatus.SERVICE_UNAVAILABLE if fault else HTTPStatus.OK, fault or "ok", start)


def _say(status: HTTPStatus, sentence: str, start: Callable[..., Any]) -> Iterable[bytes]:
    start(f"{status.value} {status.phrase}", [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{sentence}\n".encode()]


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_S

    def setup(self) -> None:
        super().setup()
        if isinstance(self.connection, ssl.SSLSocket):
            self.connection.do_handshake()

    def get_environ(self) -> dict[str, Any]:
        shown = self.connection.getpeercert() if isinstance(self.connection, ssl.SSLSocket) else None
        return {**super().get_environ(), _VERIFIED: bool(shown)}

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes and probes come every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, contexts: Contexts | None) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self._contexts = contexts
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without asking DNS for a name that nobody needs."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket, Any]:
        connection, caller = super().get_request()
        if self._contexts is None:
            return connection, caller
        return self._contexts().wrap_socket(connection, server_side=True, do_handshake_on_connect=False), caller

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller who hung up, or whose TLS is not ours, is his own affair."""
