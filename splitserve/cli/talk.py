"""A client of the router that a command was told to talk to; unreachable, the user hears where and what to do.

`Talk` holds what all such commands take: where the router is, and how it is called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitserve.core.config import ClientTls, parse
from splitserve.core.errors import SplitserveError, Unavailable

if TYPE_CHECKING:
    from splitserve.client import Client

DEFAULT_ROUTER = "127.0.0.1:50051"
API_KEY_VARIABLE = "SPLITSERVE_API_KEY"
_ROUTER = "Router"
_WRONG_CREDENTIALS = ("Socket closed", "handshake", "erification", "Connection reset")
RouterAddress = Annotated[
    str,
    typer.Option(
        "--router",
        envvar="SPLITSERVE_ROUTER",
        rich_help_panel=_ROUTER,
        help="The router's gRPC address, host:port; several with commas between them, or behind one name, share the "
        "calls.",
    ),
]
CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        envvar="SPLITSERVE_CA",
        rich_help_panel=_ROUTER,
        help="PEM file of the CA that vouches for the router; with it (or --cert) the call is encrypted.",
    ),
]
CertificateFile = Annotated[
    Path | None,
    typer.Option(
        "--cert",
        envvar="SPLITSERVE_CERT",
        rich_help_panel=_ROUTER,
        help="PEM file of your own certificate, for a router that asks for one (mTLS).",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key", envvar="SPLITSERVE_KEY", rich_help_panel=_ROUTER, help="PEM file of --cert's private key."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar=API_KEY_VARIABLE,
        rich_help_panel=_ROUTER,
        help="Your API key; better in the environment, where no list of processes shows it.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]


@contextmanager
def router_at(
    address: str,
    ca: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    api_key: str | None = None,
) -> Iterator["Client"]:
    """A connected client. Raises Unavailable with advice if no router answers there, ConfigError for bad files."""
    from splitserve.client import Client

    with Client(address, tls=client_tls(ca, certificate, key), api_key=api_key or None) as client:
        try:
            yield client
        except Unavailable as error:
            if _answers(client):
                raise
            raise Unavailable(_advice(address, error)) from error


def client_tls(ca: Path | None, certificate: Path | None, key: Path | None) -> ClientTls | None:
    """None: not encrypted. Raises ConfigError naming the option."""
    files = {"ca": ca, "certificate": certificate, "key": key}
    said = {name: str(file) for name, file in files.items() if file is not None}
    return parse(ClientTls, said, "--ca, --cert, --key") if said else None


def _advice(address: str, error: Unavailable) -> str:
    """gRPC says the same of a router that is not there and of one that is spoken to wrongly, but for the reason."""
    reason = str(error).rpartition("last error: ")[2]
    if any(sign in reason for sign in _WRONG_CREDENTIALS):
        return f"{address} answers, but not to such a connection ({reason}); look at --ca, --cert and --key"
    return f"no router answers at {address}: start one with `splitserve up`, or name another with --router"


def _answers(client: "Client") -> bool:
    """Whether it was the router that said Unavailable."""
    try:
        client.fleet()
    except Unavailable:
        return False
    except SplitserveError:
        return True
    return True
