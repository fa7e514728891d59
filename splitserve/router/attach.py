"""The Fleet service: one call per worker, a thin shell that moves messages between the wire and `membership`."""

import asyncio
from collections.abc import AsyncIterator

import grpc

from splitserve.core.errors import SplitserveError, Unavailable, first_of
from splitserve.core.versions import Versions
from splitserve.router.membership import Attachment, Membership
from splitserve.router.orders import Order, SendCancel, SendDrain, SendHandOver, SendJob, SendPeers, SendPool
from splitserve.rpc import convert
from splitserve.rpc.gen import worker_pb2, worker_pb2_grpc
from splitserve.rpc.joining import joined
from splitserve.rpc.protocol import SPOKEN
from splitserve.rpc.status import abort
from splitserve.telemetry.logs import Logger


class FleetService(worker_pb2_grpc.FleetServicer):
    def __init__(
        self,
        membership: Membership,
        router_uuid: str,
        heartbeat_interval_s: float,
        logger: Logger,
        spoken: Versions = SPOKEN,
    ) -> None:
        self._membership = membership
        self._welcome = worker_pb2.Welcome(router_uuid=router_uuid, heartbeat_interval_s=heartbeat_interval_s)
        self._logger = logger
        self._spoken = spoken

    async def Attach(
        self, messages: AsyncIterator[worker_pb2.WorkerMessage], context: grpc.aio.ServicerContext
    ) -> None:
        """Lives as long as the worker does."""
        try:
            join = await joined(messages, self._spoken)
            attachment = self._membership.join(join.worker)
        except SplitserveError as error:
            self._logger.warning("worker refused", reason=str(error), peer=context.peer())
            await abort(context, error)
        await self._attached(attachment, join.protocol_version, messages, context)

    async def _attached(
        self,
        attachment: Attachment,
        version: int,
        messages: AsyncIterator[worker_pb2.WorkerMessage],
        context: grpc.aio.ServicerContext,
    ) -> None:
        info = attachment.info
        self._logger.info("worker joined", worker=info.name, uuid=info.uuid, pool=info.pool.value, protocol=version)
        reason = "its stream broke"
        try:
            await self._exchange(attachment, version, messages, context)
            reason = "it ended its stream"
        except SplitserveError as error:
            reason = str(error)
            await abort(context, error)
        finally:
            self._membership.leave(info.uuid, reason)
            self._logger.info("worker left", worker=info.name, uuid=info.uuid, reason=reason)

    async def _exchange(
        self,
        attachment: Attachment,
        version: int,
        messages: AsyncIterator[worker_pb2.WorkerMessage],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Until the worker ends its stream. Raises Unavailable if the router gave it up."""
        # Not in a task that may be cancelled: a call whose first write is cut off is never ended by grpc.aio.
        await context.write(worker_pb2.RouterMessage(welcome=self._welcome_in(version)))
        try:
            async with asyncio.TaskGroup() as tasks:
                others = (
                    tasks.create_task(_tell(attachment, context)),
                    tasks.create_task(_given_up(attachment)),
                )
                await self._listen(attachment.info.uuid, messages)
                for task in others:
                    task.cancel()
        except* SplitserveError as group:
            raise first_of(group) from group

    async def _listen(self, uuid: str, messages: AsyncIterator[worker_pb2.WorkerMessage]) -> None:
        async for message in messages:
            load = convert.load_from_proto(message.load) if message.HasField("load") else None
            self._membership.heard(uuid, load, [convert.delta_from_proto(delta) for delta in message.deltas])
            for news in message.cache_news:
                self._membership.cached(uuid, convert.cache_news_from_proto(news))

    def _welcome_in(self, version: int) -> worker_pb2.Welcome:
        welcome = worker_pb2.Welcome(protocol_version=version)
        welcome.MergeFrom(self._welcome)
        return welcome


async def _tell(attachment: Attachment, context: grpc.aio.ServicerContext) -> None:
    while True:
        await context.write(_to_proto(await attachment.outbox.get()))


async def _given_up(attachment: Attachment) -> None:
    """A stopped worker reads nothing: its stream is ended beside whatever waits to be written to it."""
    await attachment.gone.wait()
    raise Unavailable(f"this router gave the worker up: {attachment.gone_reason}; attach again")


def _to_proto(order: Order) -> worker_pb2.RouterMessage:
    match order:
        case SendJob(number, job):
            return worker_pb2.RouterMessage(job=convert.job_to_proto(job, number))
        case SendCancel(job_id):
            return worker_pb2.RouterMessage(cancel=worker_pb2.Cancel(job_id=job_id))
        case SendHandOver(job_id, ticket, at_end):
            hand_over = worker_pb2.HandOver(job_id=job_id, ticket=convert.ticket_to_proto(ticket), at_end=at_end)
            return worker_pb2.RouterMessage(hand_over=hand_over)
        case SendPeers(peers):
            return worker_pb2.RouterMessage(
                peers=worker_pb2.Peers(peers=[convert.kv_peer_to_proto(peer) for peer in peers])
            )
        case SendPool(pool):
            return worker_pb2.RouterMessage(set_pool=worker_pb2.SetPool(pool=convert.pool_to_proto(pool)))
        case SendDrain():
            return worker_pb2.RouterMessage(drain=worker_pb2.Drain())
