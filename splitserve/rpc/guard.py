"""Asks, before any handler runs, whether a call may be made; a service that nobody thought of is not let through.

Health and reflection need no key: a probe of Kubernetes has none. Used on the server's event loop; what is allowed is
the caller's to say (`router/access`).
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from splitserve.core.errors import SplitserveError
from splitserve.rpc.channel import AUTHORIZATION, BEARER
from splitserve.rpc.status import abort

Check = Callable[[str, str | None], None]  # service and shown key; raises Unauthenticated or PermissionDenied

_FREE = frozenset({health.SERVICE_NAME, reflection.SERVICE_NAME})

_ASK_THEMSELVES = frozenset({"/splitserve.v1.Inference/GenerateMany"})  # for each request on the call


def bearer(metadata: Any) -> str | None:
    """The key that a call shows, as `authorization: Bearer KEY`; None if it shows none."""
    for name, value in metadata or ():
        if name == AUTHORIZATION and value[: len(BEARER)].lower() == BEARER.lower():
            return str(value[len(BEARER) :])
    return None


def key_shown(context: grpc.aio.ServicerContext) -> str:
    """The key of a call under way; "" if it shows none."""
    return bearer(context.invocation_metadata()) or ""


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    def __init__(self, check: Check) -> None:
        self._check = check

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        """The call's own handler, or one that says why not."""
        service = details.method.rpartition("/")[0].lstrip("/")
        if service not in _FREE and details.method not in _ASK_THEMSELVES:
            try:
                self._check(service, bearer(details.invocation_metadata))
            except SplitserveError as error:
                return _refusal(error)
        return await continuation(details)


def _refusal(error: SplitserveError) -> grpc.RpcMethodHandler:
    """Of a stream on both sides, so that it ends before the caller has said anything."""

    async def refuse(messages: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
