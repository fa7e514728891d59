"""`splitserve gateway`: OpenAI-compatible HTTP in front of routers that run elsewhere."""

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitserve.cli.talk import DEFAULT_ROUTER, CaFile, CertificateFile, KeyFile, client_tls
from splitserve.core.config import parse, read
from splitserve.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client import CollectorRegistry

    from splitserve.client import AsyncClient
    from splitserve.gateway.backend import Oversight
    from splitserve.gateway.config import GatewayConfig
    from splitserve.gateway.serve import HttpServer

_SECURITY = "Security"


def gateway(
    config: Annotated[Path | None, typer.Option(help="Gateway YAML; options override it.")] = None,
    router: Annotated[
        str | None,
        typer.Option(
            envvar="SPLITSERVE_ROUTER",
            help="The router's gRPC address; several with commas between them, or behind one name, share the calls. "
            f"[{DEFAULT_ROUTER}]",
        ),
    ] = None,
    listen: Annotated[str | None, typer.Option(help="HTTP address, host:port. [127.0.0.1:8000]")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model directory, or `demo`: the texts of tokens in log probabilities.")
    ] = None,
    drain_timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds that requests get to end on SIGTERM. [30]")
    ] = None,
    max_body_mib: Annotated[int | None, typer.Option(min=1, help="Largest body of a request, MiB. [32]")] = None,
    console: Annotated[bool | None, typer.Option(help="Serve the operators' page at /console. [yes]")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Prometheus address, host:port; /livez and /readyz are there too.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(rich_help_panel=_SECURITY, help="PEM file: its certificate; makes it HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(rich_help_panel=_SECURITY, help="PEM file: --tls-cert's key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(rich_help_panel=_SECURITY, help="PEM file: let in only clients that it vouches for.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            rich_help_panel=_SECURITY,
            help="Listen beyond this machine without TLS, where the network itself keeps strangers out.",
        ),
    ] = False,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    ready_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run one OpenAI-compatible HTTP gateway. Its callers' API keys go on to the router, which checks them."""
    import uvloop

    from splitserve.cli.local import merged
    from splitserve.gateway.config import GatewayConfig

    files = {"certificate": tls_cert, "key": tls_key, "client_ca": tls_client_ca}
    router_tls = client_tls(ca, cert, key)
    said = {
        "router": router,
        "listen": listen,
        "model": model,
        "drain_timeout_s": drain_timeout,
        "max_body_mib": max_body_mib,
        "console": console,
        "metrics": metrics,
        "tls": {name: str(file) for name, file in files.items() if file is not None} or None,
        "router_tls": router_tls.model_dump() if router_tls is not None else None,
        "insecure": insecure or None,
    }
    over = {name: value for name, value in said.items() if value is not None}
    settings = parse(GatewayConfig, merged(read(config) if config else {}, over), str(config or "options"))
    uvloop.run(run_gateway(settings, ready_fd, parent))


async def run_gateway(config: "GatewayConfig", ready_fd: int | None, parent: int | None) -> None:
    """Until it is drained. Raises ConfigError."""

    from splitserve.cli.build import metrics_served, process_registry
    from splitserve.cli.process import end_with_parent, say_ready, stop_signals
    from splitserve.client import AsyncClient
    from splitserve.core.exposure import check_address
    from splitserve.gateway.remote import Overseen
    from splitserve.rpc.channel import addresses
    from splitserve.telemetry import logs
    from splitserve.telemetry.health import Probes, loop_fault

    if parent is not None:
        end_with_parent(parent)
    logs.configure()
    check_address("listen", config.listen, {"tls": config.tls is not None}, config.insecure)
    check_address("metrics", config.metrics, {"tls": config.tls is not None}, config.insecure)
    registry, probes = process_registry(), Probes()
    async with AsyncClient(config.router, tls=config.router_tls) as client, AsyncExitStack() as stack:
        bound = stack.enter_context(metrics_served(config.metrics, registry, config.tls, probes=probes))
        routers = Overseen(addresses(config.router), client, partial(AsyncClient, tls=config.router_tls))
        stack.push_async_callback(routers.close)
        server = _server(config, client, routers if config.console else {}, registry)
        try:
            await server.start()
        except ConfigError as error:
            raise ConfigError("listen (--listen)", str(error)) from error
        stop = stop_signals()
        probes.live = partial(loop_fault, asyncio.get_running_loop())
        probes.ready = lambda: "it drains" if stop.is_set() else ""
        facts = {"role": "gateway", "address": server.address, "router": config.router, "metrics": bound}
        say_ready(ready_fd, facts)
        await stop.wait()
        await server.drain(config.drain_timeout_s)
        await server.stop()


def _server(
    config: "GatewayConfig",
    client: "AsyncClient",
    overseen: "Mapping[str, Oversight]",
    registry: "CollectorRegistry",
) -> "HttpServer":
    """Not started yet. Raises ConfigError for files that can't be used."""
    from splitserve.cli.build import read_model
    from splitserve.gateway.endpoints import Limits
    from splitserve.gateway.remote import RemoteBackend
    from splitserve.gateway.serve import HttpServer
    from splitserve.gateway.tls import ssl_context
    from splitserve.gateway.vocabulary import TokenizerVocabulary

    return HttpServer(
        RemoteBackend(client),
        config.listen,
        ssl_context(config.tls) if config.tls is not None else None,
        registry,
        limits=Limits(config.max_body_mib, config.body_timeout_s, config.client_stall_s),
        vocabulary=TokenizerVocabulary(read_model(config.model, "").path) if config.model is not None else None,
        overseen=overseen,
    )
