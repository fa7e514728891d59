"""The services that clients and operators call: thin shells that convert, hand over and answer with a status."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc

from splitserve.core.errors import DeadlineExceeded, InvalidRequest, SplitserveError, Unavailable
from splitserve.core.fleet import FleetStatus
from splitserve.core.request import Chunk
from splitserve.core.sink import Awaited
from splitserve.router.endpoint import Endpoint
from splitserve.router.many import Many
from splitserve.router.membership import Membership
from splitserve.router.move import Move, Moved, MoveRefused
from splitserve.router.oversight import listed
from splitserve.router.running import Running
from splitserve.rpc import convert
from splitserve.rpc.gen import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from splitserve.rpc.guard import key_shown
from splitserve.rpc.status import abort
from splitserve.telemetry.metrics import RouterMetrics
from splitserve.telemetry.traces import carried


class InferenceService(inference_pb2_grpc.InferenceServicer):
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def Generate(self, message: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """While one chunk is being written the next tokens gather: they go out as one message."""

        async def send(chunk: Chunk) -> None:
            await context.write(convert.chunk_to_proto(chunk))

        try:
            request = carried(convert.request_from_proto(message), context.invocation_metadata())
            await self._endpoint.generate(request, Awaited(send), key_shown(context), context.time_remaining())
        except SplitserveError as error:
            await abort(context, error)

    async def GenerateMany(
        self, messages: AsyncIterator[inference_pb2.ManyRequest], context: grpc.aio.ServicerContext
    ) -> None:
        await Many(self._endpoint, key_shown(context), context.write).run(messages)

    async def Tokenize(
        self, message: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        try:
            prompt, key = convert.tokenize_from_proto(message), key_shown(context)
            token_ids = await self._endpoint.tokenize(prompt, message.model, key)
            served, *_ = await self._endpoint.models(key)
        except SplitserveError as error:
            await abort(context, error)
        return inference_pb2.TokenizeResponse(token_ids=token_ids, max_model_len=served.max_model_len)

    async def ListModels(
        self, message: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        try:
            models = await self._endpoint.models(key_shown(context))
        except SplitserveError as error:
            await abort(context, error)
        return inference_pb2.ListModelsResponse(models=map(convert.model_to_proto, models))

    async def GetModel(
        self, message: inference_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.Model:
        try:
            return convert.model_to_proto(await self._endpoint.model(message.name, key_shown(context)))
        except SplitserveError as error:
            await abort(context, error)


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

    async def ListRequests(
        self, message: admin_pb2.ListRequestsRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.RunningRequests:
        return convert.running_requests_to_proto(self._running.newest(listed(message.most)))

    async def Explain(
        self, message: admin_pb2.ExplainRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.Explanation:
        try:
            return convert.explanation_to_proto(self._running.get(message.request_id).explain())
        except SplitserveError as error:
            await abort(context, error)

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
