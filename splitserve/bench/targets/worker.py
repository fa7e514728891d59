"""One worker, asked directly: the load generator listens as a router of one, which a worker attaches to.

The worker can't tell: it gets decode jobs without a ticket, so it computes prompts itself. What it grants and who waits
for it is in `seat`; this is the gRPC around it, on the load generator's event loop. When it closes, the worker loses
its router, gives up what it ran, and looks for that router again until it is ended.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from uuid import uuid4

import grpc

from splitserve.bench.targets.opened import Opened
from splitserve.bench.targets.options import Options, vocabulary_of
from splitserve.bench.targets.seat import Order, Seat, SendCancel, SendJob
from splitserve.core.config import RouterConfig
from splitserve.core.errors import SplitserveError, Unavailable, first_of
from splitserve.core.exposure import check_address
from splitserve.core.worker import WorkerInfo
from splitserve.rpc import convert
from splitserve.rpc.channel import DEFAULT_MAX_MESSAGE_MIB
from splitserve.rpc.gen import worker_pb2, worker_pb2_grpc
from splitserve.rpc.joining import joined
from splitserve.rpc.server import Server
from splitserve.rpc.status import abort

_HEARTBEAT_S: float = RouterConfig().heartbeat_interval_s
_SILENT_S: float = RouterConfig().heartbeat_timeout_s
_SERVICE = "splitserve.v1.Fleet"


@asynccontextmanager
async def open_worker(_name: str, listen: str, options: Options) -> AsyncIterator[Opened]:
    """Listens, and waits for a worker. Raises ConfigError if it can't listen there, Unavailable if no worker comes."""
    vocabulary = vocabulary_of(options)
    seat = Seat()
    check_address("listen", listen, {"tls": options.listen_tls is not None}, options.insecure)
    server = Server(listen, DEFAULT_MAX_MESSAGE_MIB, (_SERVICE,), options.listen_tls)
    worker_pb2_grpc.add_FleetServicer_to_server(_Fleet(seat, options.say), server.grpc)  # type: ignore[no-untyped-call]
    await server.start()
    try:
        info = await _attached(seat, server.address, options)
        facts = {
            "kind": "worker",
            "server": server.address,
            "model": info.model,
            "worker": info.name,
            "engine": info.engine,
        }
        yield Opened(f"worker://{server.address}", vocabulary, seat.ask, facts)
    finally:
        await server.stop(0)


async def _attached(seat: Seat, address: str, options: Options) -> WorkerInfo:
    options.say(f"waiting for a worker to attach: start one with `splitserve worker --pool decode --router {address}`")
    try:
        async with asyncio.timeout(options.attach_within_s):
            await seat.ready.wait()
    except TimeoutError as error:
        raise Unavailable(
            f"no worker has attached to {address} within {options.attach_within_s:g} s; start one with "
            f"`splitserve worker --pool decode --router {address}`, and look at its log"
        ) from error
    assert seat.info is not None
    if seat.routers > 1:
        others = seat.routers - 1
        options.say(f"{seat.info.name} serves {others} other routers too: what those send it is measured with this")
    return seat.info


class _Fleet(worker_pb2_grpc.FleetServicer):
    """The Fleet service for one worker; `say` hears who comes, goes and is refused."""

    def __init__(self, seat: Seat, say: Callable[[str], None]) -> None:
        self._seat = seat
        self._say = say
        self._refused: set[str] = set()

    async def Attach(
        self, messages: AsyncIterator[worker_pb2.WorkerMessage], context: grpc.aio.ServicerContext
    ) -> None:
        """Lives as long as the worker does."""
        try:
            join = await joined(messages)
            info = join.worker
            self._seat.sit(info)
        except SplitserveError as error:
            self._note_refused(str(error))
            await abort(context, error)
        self._say(f"{info.name} has attached: {info.model} on {info.engine}")
        reason = "its stream broke"
        try:
            await self._exchange(join.protocol_version, messages, context)
            reason = "it ended its stream"
        except SplitserveError as error:
            reason = str(error)
            await abort(context, error)
        finally:
            self._seat.leave(reason)
            self._say(f"{info.name} has left: {reason}")

    def _note_refused(self, reason: str) -> None:
        """Once: it tries again every few seconds."""
        if reason not in self._refused:
            self._refused.add(reason)
            self._say(f"worker refused: {reason}")

    async def _exchange(
        self, version: int, messages: AsyncIterator[worker_pb2.WorkerMessage], context: grpc.aio.ServicerContext
    ) -> None:
        """Until the worker ends its stream. Raises Unavailable if it has fallen silent."""
        welcome = worker_pb2.Welcome(
            protocol_version=version, router_uuid=uuid4().hex, heartbeat_interval_s=_HEARTBEAT_S
        )
        await context.write(
            worker_pb2.RouterMessage(welcome=welcome)
        )  # in no task that is cancelled: see router/attach
        try:
            async with asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(self._tell(context))
                await self._listen(messages)
                telling.cancel()
        except* SplitserveError as group:
            raise first_of(group) from group

    async def _listen(self, messages: AsyncIterator[worker_pb2.WorkerMessage]) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_SILENT_S) as silence:
                async for message in messages:
                    silence.reschedule(loop.time() + _SILENT_S)
                    load = convert.load_from_proto(message.load) if message.HasField("load") else None
                    self._seat.heard(load, [convert.delta_from_proto(delta) for delta in message.deltas])
        except TimeoutError as error:
            raise Unavailable(f"it was silent for {_SILENT_S:g} s") from error

    async def _tell(self, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(_to_proto(await self._seat.outbox.get()))


def _to_proto(order: Order) -> worker_pb2.RouterMessage:
    match order:
        case SendJob(number, job):
            return worker_pb2.RouterMessage(job=convert.job_to_proto(job, number))
        case SendCancel(job_id):
            return worker_pb2.RouterMessage(cancel=worker_pb2.Cancel(job_id=job_id))
