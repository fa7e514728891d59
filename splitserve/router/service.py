"""The services that clients and operators call: thin shells that convert, hand over and answer with a status."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import uuid4

import grpc

from splitserve.core.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    SplitserveError,
    Unavailable,
)
from splitserve.core.fleet import FleetStatus
from splitserve.core.request import Chunk, GenerateRequest
from splitserve.router.journey import Journey, Surroundings
from splitserve.router.membership import Membership
from splitserve.router.move import Move, Moved, MoveRefused
from splitserve.router.running import Running
from splitserve.router.traffic import LiveTraffic
from splitserve.rpc import convert
from splitserve.rpc.gen import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from splitserve.rpc.status import abort, code_of
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import RouterMetrics


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(
        self, around: Surroundings, running: Running, logger: Logger, traffic: LiveTraffic | None = None
    ) -> None:
        self._around = around
        self._traffic = traffic
        self._running = running
        self._logger = logger

    async def Generate(self, message: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """While one chunk is being written the next tokens gather: they go out as one message."""

        async def send(chunk: Chunk) -> None:
            await context.write(convert.chunk_to_proto(chunk))

        request_id = message.request_id or uuid4().hex
        try:
            with _recorded(request_id, self._around.metrics, self._logger):
                request = replace(convert.request_from_proto(message), request_id=request_id)
                with self._running.admitted(request_id):
                    journey = Journey(request, send, self._around, context.time_remaining())
                    self._running.travels(request_id, journey)
                    await self._travel(journey, request)
        except SplitserveError as error:
            await abort(context, error)

    async def _travel(self, journey: Journey, request: GenerateRequest) -> None:
        last = await journey.travel()
        assert last.usage is not None
        assert last.timings is not None
        self._around.metrics.finished(last.usage, last.timings)
        if self._traffic is not None:
            self._traffic.add(last.usage)
        self._logger.info(
            "request finished",
            request_id=request.request_id,
            prompt_tokens=last.usage.prompt_tokens,
            output_tokens=last.usage.output_tokens,
            ttft_s=last.timings.ttft_s,
            tpot_s=last.timings.tpot_s,
            prefill_worker=last.timings.prefill_worker,
            decode_worker=last.timings.decode_worker,
            attempts=last.timings.attempts,
        )


@contextmanager
def _recorded(request_id: str, metrics: RouterMetrics, logger: Logger) -> Iterator[None]:
    """Counts and logs how a request ended, and names what nobody foresaw."""
    code = grpc.StatusCode.OK
    try:
        yield
    except SplitserveError as error:
        code = code_of(error)
        logger.info("request failed", request_id=request_id, code=code.name, reason=str(error))
        raise
    except asyncio.CancelledError:
        code = code_of(Cancelled())
        logger.info("request cancelled", request_id=request_id)
        raise
    except Exception as error:
        code = code_of(EngineError())
        logger.exception("request broke the router", error, request_id=request_id)
        raise EngineError(
            f"the router failed on this request ({type(error).__name__}); its log has the cause"
        ) from error
    finally:
        metrics.ended(code.name)


class AdminService(admin_pb2_grpc.AdminServicer):
    def __init__(
        self,
        membership: Membership,
        running: Running,
        status: Callable[[], FleetStatus],
        metrics: RouterMetrics,
        drain_within_s: float,
    ) -> None:
        self._membership = membership
        self._running = running
        self._metrics = metrics
        self._status = status
        self._drain_within_s = drain_within_s

    async def GetFleet(
        self, message: admin_pb2.GetFleetRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.FleetStatus:
        return convert.fleet_status_to_proto(self._status())

    async def Drain(
        self, message: admin_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.DrainResponse:
        within_s = message.timeout_s if message.HasField("timeout_s") else self._drain_within_s
        try:
            finished, migrated = await self._drain(message.worker, within_s)
            return admin_pb2.DrainResponse(finished_requests=finished, migrated_requests=migrated)
        except SplitserveError as error:
            await abort(context, error)

    async def Migrate(
        self, message: admin_pb2.MigrateRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.MigrateResponse:
        within_s = message.timeout_s if message.HasField("timeout_s") else self._drain_within_s
        try:
            moved = await self._migrate(message.request_id, message.worker, within_s)
        except SplitserveError as error:
            await abort(context, error)
        return admin_pb2.MigrateResponse(
            from_worker=moved.from_worker, to_worker=moved.to_worker, stall_s=moved.stall_s
        )

    async def SetWorkerPool(
        self, message: admin_pb2.SetWorkerPoolRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.WorkerStatus:
        try:
            status = self._membership.set_pool(message.worker, convert.pool_from_proto(message.pool))
        except SplitserveError as error:
            await abort(context, error)
        return convert.worker_status_to_proto(status)

    async def _migrate(self, request_id: str, worker: str, within_s: float) -> Moved:
        _check_timeout(within_s)
        traveller = self._running.get(request_id)
        if traveller is None:
            raise InvalidRequest("request_id", f"no request {request_id!r} runs in this router")
        move = Move(self._membership.find(worker).uuid if worker else None)
        traveller.move(move)
        try:
            async with asyncio.timeout(within_s):
                moved = await move.result()
        except MoveRefused as refusal:
            self._metrics.move_refused()
            raise Unavailable(f"{request_id} has not moved: {refusal}") from refusal
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"timeout_s: {request_id} has not moved within {within_s:g} s; it may still"
            ) from error
        self._metrics.moved(moved.stall_s)
        return moved

    async def _drain(self, worker: str, within_s: float) -> tuple[int, int]:
        """How many jobs it finished meanwhile, and how many moved elsewhere."""
        _check_timeout(within_s)
        attachment = self._membership.drain(worker)
        before, moved_before = attachment.finished_jobs, attachment.migrated_jobs
        try:
            async with asyncio.timeout(within_s):
                await attachment.gone.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"timeout_s: {worker} still runs requests after {within_s:g} s; it goes on "
                "draining and takes no new ones: call again to wait longer"
            ) from error
        return attachment.finished_jobs - before, attachment.migrated_jobs - moved_before


def _check_timeout(within_s: float) -> None:
    if not within_s > 0:
        raise InvalidRequest("timeout_s", f"{within_s} must be a number of seconds above 0")
