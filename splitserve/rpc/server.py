"""A grpc.aio server with health, reflection, message limit and keepalive; what it serves is registered by the caller.

Used from one event loop.
"""

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from splitserve.core.config import TlsSettings
from splitserve.core.errors import ConfigError
from splitserve.rpc.channel import message_limits
from splitserve.rpc.guard import Check, Guard
from splitserve.rpc.tls import server_credentials

_SHORTEST_CLIENT_PING_MS = 5_000
_MOST_PENDING_CALLS = 1_000_000
_LONGEST_PENDING_S = 600


class Server:
    """Register servicers on `grpc`, then `start`. `address` is what was bound, its port never 0."""

    def __init__(
        self,
        listen: str,
        max_message_mib: int,
        services: Sequence[str],
        tls: TlsSettings | None = None,
        check: Check | None = None,
    ) -> None:
        """`services` are full names, such as `splitserve.v1.Inference`, for reflection and health. `check` is asked
        about every call but those to these two. Raises ConfigError: nothing can listen there, or what `tls` names
        can't be used."""
        guards = () if check is None else (Guard(check),)
        self.grpc = grpc.aio.server(options=_options(max_message_mib), interceptors=guards)
        self._services = tuple(services)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            (*services, health.SERVICE_NAME, reflection.SERVICE_NAME),
            self.grpc,
        )
        self.address = _bind(self.grpc, listen, tls)

    async def start(self) -> None:
        await self.set_serving(False)
        await self.grpc.start()

    async def set_serving(self, serving: bool) -> None:
        """What health checks of every service, and of the whole, are told."""
        for service in (health.OVERALL_HEALTH, *self._services):
            await self.set_health(service, serving)

    async def set_health(self, service: str, serving: bool) -> None:
        """What health checks of this one are told; it may be any name that they can ask for."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls at once, cancels running ones after `grace_s`."""
        await self.grpc.stop(grace_s)


def _bind(server: grpc.aio.Server, listen: str, tls: TlsSettings | None) -> str:
    host, _, _ = listen.rpartition(":")
    credentials = server_credentials(tls) if tls is not None else None
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ConfigError(listen, _why_unbound(error)) from error
    if port == 0:
        raise ConfigError(listen, _why_unbound(None))
    return f"{host}:{port}"


def _why_unbound(error: RuntimeError | None) -> str:
    cause = f" ({error})" if error is not None else ""
    return f"can't listen here: the port is in use, or the address is not this machine's; choose another{cause}"


def _options(max_message_mib: int) -> list[tuple[str, int]]:
    return [
        *message_limits(max_message_mib),
        # gRPC cancels part of a burst of more than 1,000 calls; how many may wait is the router's own decision.
        ("grpc.server.max_pending_requests", _MOST_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING_CALLS),
        # A call is taken up once per turn of the event loop; gRPC cancels what a busy loop has not got to in 30 s.
        ("grpc.server_max_unrequested_time_in_server", _LONGEST_PENDING_S),
        ("grpc.so_reuseport", 0),  # with it a second router would bind the same port without a word
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _SHORTEST_CLIENT_PING_MS),
    ]
