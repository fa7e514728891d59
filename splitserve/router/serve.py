"""One router: everything it is made of, its start, its watch over the fleet, its end.

Runs on one event loop. `Router` is constructed by `cli` and by tests; port 0 takes a free port, `address` says which.
"""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self
from uuid import uuid4

from splitserve.core.config import RouterConfig
from splitserve.core.fleet import FleetStatus, Health, WorkerStatus
from splitserve.core.model import ModelInfo
from splitserve.core.worker import Pool
from splitserve.router.access import AccessControl, KeyFile
from splitserve.router.attach import FleetService
from splitserve.router.attention import Attention
from splitserve.router.classes import SloClasses
from splitserve.router.endpoint import Endpoint
from splitserve.router.evacuation import Evacuation
from splitserve.router.journey import Surroundings
from splitserve.router.kserve import KserveService
from splitserve.router.membership import Membership
from splitserve.router.oversight import Oversight
from splitserve.router.probing import Probing
from splitserve.router.running import Running
from splitserve.router.service import AdminService, InferenceService
from splitserve.router.text import Text
from splitserve.router.traffic import LiveTraffic, Planned
from splitserve.router.waiting import WaitingRequests
from splitserve.routing.fleet import Fleet
from splitserve.rpc.gen import (
    admin_pb2,
    admin_pb2_grpc,
    grpc_service_pb2,
    grpc_service_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from splitserve.rpc.server import Server
from splitserve.rpc.status import CODES
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import RouterMetrics
from splitserve.telemetry.traces import Tracer

_SILENT_SHARE = 0.5  # of the heartbeat timeout, after which a worker gets no new jobs
_LONGEST_WATCH_GAP_S = 0.25
_GRACE_S = 2.0
_SERVICES = tuple(
    f"{file.DESCRIPTOR.package}.{name}"
    for file, name in (
        (inference_pb2, "Inference"),
        (grpc_service_pb2, "GRPCInferenceService"),
        (admin_pb2, "Admin"),
        (worker_pb2, "Fleet"),
    )
)


class Router:
    """Raises ConfigError if the model has no tokenizer or the key file is broken, and from `start` if the address is
    taken or what `tls` names can't be used. `endpoint` is what it does for its callers, for whoever serves another
    protocol, `oversight` what it shows its operators; `access` is who may call it."""

    def __init__(
        self,
        config: RouterConfig,
        model: ModelInfo,
        metrics: RouterMetrics,
        planned: Planned | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.uuid = uuid4().hex
        self._config = config
        self._model = model
        self._logger = Logger("router")
        fleet = Fleet(silent_after_s=_SILENT_SHARE * config.heartbeat_timeout_s)
        self._waiting = WaitingRequests(fleet, config.max_waiting_requests)
        self._membership = Membership(model.name, fleet, self._waiting.pump)
        self._running = Running(config.limits.streams)
        self._key_file = KeyFile(config.api_keys) if config.api_keys is not None else None
        self.access = AccessControl(self._key_file.first if self._key_file is not None else None)
        self._text = Text(model.path)
        self._classes = SloClasses(config.slo_classes)
        self._around = Surroundings(
            config,
            model,
            self._text,
            self._membership,
            self._waiting,
            metrics,
            self._classes,
            tracer=tracer or Tracer(),
        )
        self._worker_counts: Mapping[tuple[Pool, Health], int] = {}
        self._server: Server | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._metrics = metrics
        self._traffic = LiveTraffic(planned) if planned is not None else None
        if self._traffic is not None:
            metrics.watch_drift(self._traffic.drift)
        metrics.expect(self._classes.names, CODES)
        self.endpoint = Endpoint(self._around, self._running, self.access, self._logger, self._traffic)
        self.oversight = Oversight(self.status, self._running, self.access)
        metrics.watch(lambda: len(self._waiting), lambda: len(self._running), lambda: self._worker_counts)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """host:port, once it has started."""
        assert self._server is not None
        return self._server.address

    async def start(self) -> None:
        """Returns when it listens. Health says NOT_SERVING until a worker can serve."""
        check = self.access.check if self.access.asks_for_keys else None
        self._server = Server(self._config.listen, self._config.max_message_mib, _SERVICES, self._config.tls, check)
        self._register(self._server)
        await self._server.start()
        self._watcher = asyncio.create_task(self._look_after(self._server), name="watch over the fleet")
        self._logger.info("router listens", address=self.address, model=self._model.name, uuid=self.uuid)

    async def drain(self) -> None:
        """New requests are refused with UNAVAILABLE; returns when the running ones have ended, or had their time."""
        self._running.drain()
        self._logger.info("router drains", running=len(self._running))
        await self._running.ended(self._config.drain_timeout_s)

    async def stop(self) -> None:
        """Ends what still runs, with UNAVAILABLE or CANCELLED, after a short grace."""
        if self._server is None or self._watcher is None:
            return
        self._running.drain()
        for status in self._membership.statuses():
            self._membership.leave(status.worker.uuid, "the router stops")
        self._watcher.cancel()
        await asyncio.wait({self._watcher}, timeout=_GRACE_S)
        await self._server.stop(_GRACE_S)
        self._text.close()

    async def failed(self) -> None:
        """Returns only by raising what broke the watch over the fleet: without it lost workers go unnoticed."""
        assert self._watcher is not None
        await asyncio.shield(self._watcher)  # Whoever stops waiting for it does not end it.

    def unready(self) -> str:
        """Why nobody should come here now. A router without workers is ready: it is by that that they find it."""
        return "it drains" if self._running.draining else ""

    def status(self) -> FleetStatus:
        waiting = len(self._waiting)
        return FleetStatus(
            model=self._model.name,
            workers=self._membership.statuses(),
            waiting_requests=waiting,
            running_requests=max(0, len(self._running) - waiting),
            router_uuid=self.uuid,
            classes=self._classes.status(),
            links=self._around.transfers.status(),
        )

    def _register(self, server: Server) -> None:
        attach = FleetService(self._membership, self.uuid, self._config.heartbeat_interval_s, self._logger)
        inference = InferenceService(self.endpoint)
        kserve = KserveService(self.endpoint, client_stall_s=self._config.limits.client_stall_s)
        admin = AdminService(self._membership, self._running, self.status, self._metrics, self._config.deadline_s)
        worker_pb2_grpc.add_FleetServicer_to_server(attach, server.grpc)  # type: ignore[no-untyped-call]
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, server.grpc)  # type: ignore[no-untyped-call]
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, server.grpc)  # type: ignore[no-untyped-call]
        admin_pb2_grpc.add_AdminServicer_to_server(admin, server.grpc)  # type: ignore[no-untyped-call]

    async def _look_after(self, server: Server) -> None:
        config = self._config
        probing = Probing(self._membership, config.probe_after_s, config.probe_timeout_s, self._metrics, time.monotonic)
        evacuation = Evacuation(self._running, lambda: self._membership.draining, self._metrics)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(server))
            tasks.create_task(evacuation.run())
            tasks.create_task(probing.run())
            if self._key_file is not None:
                tasks.create_task(self._key_file.watch(self.access))

    async def _watch(self, server: Server) -> None:
        """What no message tells: workers that have gone silent. Health and gauges follow."""
        gap_s = min(_LONGEST_WATCH_GAP_S, self._config.heartbeat_interval_s)
        attention = Attention(gap_s, self._config.heartbeat_timeout_s, time.monotonic())
        while True:
            if attention.looks_up(time.monotonic()):
                self._give_up_silent()
            self._waiting.pump()
            statuses = self._membership.statuses()
            self.access.routers = max((status.load.routers for status in statuses), default=1)
            self._worker_counts = Counter((status.pool, status.health) for status in statuses)
            await self._tell_health(server, statuses)
            await asyncio.sleep(gap_s)

    async def _tell_health(self, server: Server, statuses: Sequence[WorkerStatus]) -> None:
        """Of the whole, and of each pool by its name."""
        open_ = not self._running.draining
        await server.set_serving(self._membership.can_serve and open_)
        for pool in Pool:
            ready = any(status.pool is pool and status.health is Health.READY for status in statuses)
            await server.set_health(pool.value, ready and open_)

    def _give_up_silent(self) -> None:
        for worker in self._membership.expire(self._config.heartbeat_timeout_s):
            self._logger.warning("worker given up", worker=worker.name, uuid=worker.uuid)


async def serve_until_signal(router: Router) -> None:
    """For a started router: the first SIGTERM or SIGINT drains it, the second ends it. It is stopped either way."""
    first, second = asyncio.Event(), asyncio.Event()
    try:
        with _signals(first, second):
            await _first_of(first.wait(), router.failed())
            await _first_of(router.drain(), second.wait(), router.failed())
    finally:
        await router.stop()


async def _first_of(*waits: Coroutine[object, object, object]) -> None:
    """Until one of them ends; raises its error."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(wait) for wait in waits]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


@contextmanager
def _signals(first: asyncio.Event, second: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def note() -> None:
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
