"""The only place that constructs the big objects: a router process and a worker process, from their settings.

vLLM is imported here alone, and only for a worker that asks for it.
"""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from prometheus_client import CollectorRegistry, ProcessCollector

from splitserve.cli.nodes import all_joined, follow, leader_end
from splitserve.cli.process import end_with_parent, say_ready
from splitserve.cli.talk import API_KEY_VARIABLE
from splitserve.core.collecting import collect_rarely
from splitserve.core.config import LatencySource, RouterConfig, TlsSettings, WorkerConfig
from splitserve.core.errors import ConfigError
from splitserve.core.exposure import check_router, check_worker
from splitserve.core.files import Watched
from splitserve.core.model import ModelInfo
from splitserve.core.worker import WorkerInfo
from splitserve.engine.nodes.leader import LeaderEnd
from splitserve.engine.protocol import Engine
from splitserve.engine.vllm.ranks import check_spread
from splitserve.latency.catalog import costs
from splitserve.latency.gpus import gpu
from splitserve.latency.model import LatencyModel
from splitserve.latency.profile import read as read_profile
from splitserve.latency.shape import shape
from splitserve.router.serve import Router, serve_until_signal
from splitserve.router.traffic import Planned
from splitserve.rpc.channel import Access
from splitserve.rpc.tls import read_server
from splitserve.telemetry import logs
from splitserve.telemetry.health import Probes, loop_fault
from splitserve.telemetry.http import WatchServer
from splitserve.telemetry.metrics import RouterMetrics, WorkerMetrics
from splitserve.telemetry.traces import tracing
from splitserve.worker.serve import DRAINED, Worker, serve

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"


def read_model(name: str, served_name: str) -> ModelInfo:
    """`demo` is the model that ships with splitserve. Raises ConfigError."""
    if name == "demo":
        return ModelInfo.read(DEMO_MODEL, served_name or "demo")
    return ModelInfo.read(name, served_name)


async def run_router(config: RouterConfig, ready_fd: int | None, parent: int | None) -> None:
    """Until it is drained. Raises ConfigError."""
    _begin(parent, config.debug)
    check_router(config)
    model, registry = read_model(config.model, config.served_model_name), process_registry()
    probes = Probes()
    served = metrics_served(config.metrics, registry, config.tls, probes=probes)
    with served as metrics, tracing("splitserve-router") as tracer:
        router = Router(config, model, RouterMetrics(registry), _planned(config.plan), tracer)
        try:
            await router.start()
        except ConfigError as error:
            if error.path != config.listen:
                raise
            raise ConfigError("listen (--listen)", str(error)) from error
        async with http_served(config, router, model, registry) as http:
            probes.live, probes.ready = partial(loop_fault, asyncio.get_running_loop()), router.unready
            collect_rarely()
            say_ready(ready_fd, {"role": "router", "address": router.address, "http": http, "metrics": metrics})
            await serve_until_signal(router)


@asynccontextmanager
async def http_served(
    config: RouterConfig, router: Router, model: ModelInfo, registry: CollectorRegistry
) -> AsyncIterator[str]:
    """The gateway in a started router's process; yields host:port, "" for none. Raises ConfigError if it is taken."""
    if config.http is None:
        yield ""
        return
    from splitserve.gateway.endpoints import Limits
    from splitserve.gateway.serve import HttpServer
    from splitserve.gateway.tls import ssl_context
    from splitserve.gateway.vocabulary import TokenizerVocabulary

    server = HttpServer(
        router.endpoint,
        config.http,
        ssl_context(config.tls) if config.tls is not None else None,
        registry,
        Limits(body_mib=config.max_body_mib, stall_s=config.limits.client_stall_s),
        TokenizerVocabulary(model.path),
        {"this router": router.oversight} if config.console else None,
    )
    try:
        await server.start()
    except ConfigError as error:
        await router.stop()
        raise ConfigError("http (--http)", str(error)) from error
    try:
        yield server.address
    finally:
        await server.stop()


async def run_worker(config: WorkerConfig, ready_fd: int | None, parent: int | None) -> int:
    """Until it is drained; returns its exit code. Raises ConfigError."""
    _begin(parent)
    check_worker(config)
    model, registry = read_model(config.model, config.served_model_name), process_registry()
    probes, loop = Probes(), asyncio.get_running_loop()
    served = metrics_served(config.metrics, registry, config.metrics_tls, "metrics_tls", probes)
    with served as metrics, tracing("splitserve-worker") as tracer:
        bound = config.model_copy(update={"metrics": metrics or None})
        if config.nodes.count > 1:
            check_vllm()
            check_spread(config)
        if config.nodes.rank:
            probes.live = partial(loop_fault, loop)
            facts = {"role": "node", "node": config.nodes.rank, "pid": os.getpid(), "metrics": metrics}
            key = router_access(bound).api_key
            return await follow(bound, model, key, probes, lambda: say_ready(ready_fd, facts))

        def on_ready(info: WorkerInfo) -> None:
            collect_rarely()
            facts = {"role": str(info.pool), "name": info.name, "uuid": info.uuid}
            say_ready(ready_fd, {**facts, "address": info.kv_peers[0].endpoint, "metrics": metrics})

        uuid = uuid4().hex
        with leader_end(bound, model, uuid, router_access(bound).api_key) as nodes:
            engine = build_engine(bound, model, uuid, nodes)
            worker = Worker(bound, model, engine, WorkerMetrics(registry), partial(router_access, bound), tracer)
            probes.live, probes.ready = lambda: loop_fault(loop) or worker.engine_fault(), worker.unready
            if nodes is not None:
                probes.ready = lambda: nodes.waits or worker.unready()
                nodes.on_leaving(partial(loop.call_soon_threadsafe, worker.drain))
                if not await all_joined(nodes):
                    return DRAINED
            return await serve(worker, on_ready)


def router_access(config: WorkerConfig) -> Access:
    """How a worker calls its routers, read anew at each call. Raises ConfigError."""
    if config.api_key_file is None:
        return Access(config.router_tls, os.environ.get(API_KEY_VARIABLE) or None)
    try:
        key = Path(config.api_key_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("api_key_file", f"{config.api_key_file} can't be read: {error}") from error
    if not key:
        raise ConfigError("api_key_file", f"{config.api_key_file} is empty; it must hold the key alone")
    return Access(config.router_tls, key)


def build_engine(config: WorkerConfig, model: ModelInfo, worker_uuid: str, nodes: LeaderEnd | None = None) -> Engine:
    """Not started yet. Raises ConfigError for vLLM without its extra installed."""
    if config.engine.kind == "sim":
        from splitserve.engine.sim import SimEngine

        return SimEngine(model, config.engine, config.kv_transfer, worker_uuid, _latency(config.engine.latency))
    check_vllm()
    from splitserve.engine.vllm import VllmEngine

    profile = config.engine.profile
    latency = read_profile(profile).latency() if profile is not None else None
    return VllmEngine(model, config.engine, config.kv_transfer, worker_uuid, config.cpu_core, latency, nodes)


def check_vllm() -> None:
    """Raises ConfigError where it is not installed."""
    if find_spec("vllm") is None or find_spec("torch") is None:
        raise ConfigError(
            "engine",
            "vLLM is not installed: pip install 'splitserve[vllm]', or simulate it with kind: sim (--engine sim)",
        )


def _planned(file: str | None) -> Planned | None:
    """Raises ConfigError for a plan that can't be read."""
    if file is None:
        return None
    from splitserve.planner.plan import read_plan
    from splitserve.planner.watch import planned_rate_rps, planned_summary

    plan = read_plan(Path(file))
    return Planned(planned_summary(plan), planned_rate_rps(plan))


def _latency(source: LatencySource | None) -> LatencyModel | None:
    """Raises ConfigError for a profile, model or GPU that is not there."""
    if source is None:
        return None
    if source.profile is not None:
        return read_profile(source.profile).latency()
    known = costs(shape(str(source.model)), gpu(str(source.gpu)), source.tp, source.pp)
    if isinstance(known, str):
        raise ConfigError("engine.latency", known)
    return known.latency


def process_registry() -> CollectorRegistry:
    """Of this process's metrics; its CPU time, memory and open files are there from the start."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


@contextmanager
def metrics_served(
    address: str | None,
    registry: CollectorRegistry,
    tls: TlsSettings | None = None,
    setting: str = "tls",
    probes: Probes | None = None,
) -> Iterator[str]:
    """Prometheus and probes over HTTP, or HTTPS, on threads of their own; yields host:port, "" for none. Raises
    ConfigError if it is taken or what `tls` names can't be used."""
    if address is None:
        yield ""
        return
    host, _, port = address.rpartition(":")
    contexts = _contexts(tls, setting) if tls is not None else None
    try:
        server = WatchServer(host.strip("[]"), int(port), registry, probes or Probes(), contexts)
    except OSError as error:
        raise ConfigError(
            "metrics (--metrics)", f"can't listen on {address} ({error.strerror}); choose another"
        ) from error
    try:
        yield f"{host}:{server.port}"
    finally:
        server.close()


def _contexts(tls: TlsSettings, setting: str) -> Callable[[], ssl.SSLContext]:
    """The files' context as they are now; the former one while they can't be used. Raises ConfigError."""
    files = [file for file in (tls.certificate, tls.key, tls.client_ca) if file is not None]
    watched, logger = Watched(files, lambda: _context(tls, setting)), logs.Logger("tls")
    current = watched.first

    def now() -> ssl.SSLContext:
        nonlocal current
        try:
            current = watched.look() or current
        except ConfigError as error:
            logger.warning("renewed certificate not usable; the former one stays", reason=str(error))
        return current

    return now


def _context(tls: TlsSettings, setting: str) -> ssl.SSLContext:
    """Certificates are asked for, and insisted on where they are needed: a probe shows none. Raises ConfigError."""
    read_server(tls, setting)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.client_ca is not None:
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _begin(parent: int | None, debug: bool = False) -> None:
    if parent is not None:
        end_with_parent(parent)
    logs.configure(debug=debug)
