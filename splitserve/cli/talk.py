"""A client of the router that a command was told to talk to; unreachable, the user hears where and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from splitserve.core.errors import Unavailable

if TYPE_CHECKING:
    from splitserve.client import Client

DEFAULT_ROUTER = "127.0.0.1:50051"
RouterAddress = Annotated[
    str, typer.Option("--router", envvar="SPLITSERVE_ROUTER", help="The router's gRPC address, host:port.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]


@contextmanager
def router_at(address: str) -> Iterator["Client"]:
    """A connected client. Raises Unavailable with advice if no router answers there."""
    from splitserve.client import Client

    with Client(address) as client:
        try:
            yield client
        except Unavailable as error:
            if _answers(client):
                raise
            raise Unavailable(
                f"no router answers at {address}: start one with `splitserve up`, or name another with --router"
            ) from error


def _answers(client: "Client") -> bool:
    """Whether it was the router that said Unavailable."""
    try:
        client.fleet()
    except Unavailable:
        return False
    return True
