"""One router's stream: attached, kept, and attached again when it breaks.

Everything runs on the worker's event loop: a reader and a writer task per stream. Deltas are collected while a message
is being written and go out as one, so a slow router gets fewer, larger messages; a load goes along whenever what it
grants has changed, and by itself once per heartbeat interval, whether or not the engine is stepping. What messages mean
is the host's (`serve.py`) business.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import isinf
from typing import Any, Protocol

import grpc

from splitserve.core.cached import CacheNews
from splitserve.core.errors import (
    ConfigError,
    InvalidRequest,
    JoinRefused,
    PermissionDenied,
    SplitserveError,
    Unauthenticated,
    Unavailable,
    first_of,
)
from splitserve.core.versions import Versions
from splitserve.core.worker import Delta, Failure, Job, KvPeer, Load, Outcome, Pool, Ticket, WorkerInfo
from splitserve.rpc import convert
from splitserve.rpc.channel import Access, open_channel
from splitserve.rpc.gen import worker_pb2, worker_pb2_grpc
from splitserve.rpc.names import Place
from splitserve.rpc.protocol import FIELD, SPOKEN
from splitserve.rpc.status import from_rpc_error
from splitserve.telemetry.logs import Logger

FIRST_BACK_OFF_S = 0.1
LONGEST_BACK_OFF_S = 5.0
REFUSED_BACK_OFF_S = 30.0  # by a router that refused this worker while others take it
WELCOME_TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 5.0
PACE_S = 0.05  # decodes with objectives: how they stand is told no more often
MOST_CACHE_NEWS = 256  # that wait for a slow router; it notices that the oldest are missing
MOST_DELTAS = 2048  # in one message, which must stay below gRPC's limit when a router was slow
TAKEN = frozenset({"uuid", "name"})  # a former stream or process may still hold these, until its router misses it
TAKEN_FOR_S = 30.0


class Host(Protocol):
    """What a link needs of its worker. `router` is what the link's router is called: `Place` as text."""

    def attached(self, router: str) -> None: ...

    def lost(self, router: str) -> None:
        """Comes once after each `attached`."""

    def refused(self, router: str) -> None:
        """It does not want this worker, and is asked again later."""

    def load(self, router: str) -> Load: ...

    def job(self, router: str, number: int, job: Job) -> None: ...

    def bad_job(self, router: str, number: int) -> None:
        """A job that this version can't read."""

    def cancel(self, router: str, job_id: str) -> None: ...

    def hand_over(self, router: str, job_id: str, ticket: Ticket, at_end: bool) -> None: ...

    def peers(self, peers: Sequence[KvPeer]) -> None: ...

    def set_pool(self, pool: Pool) -> None: ...

    def drain(self) -> None: ...


class RouterLink:
    """`run` lasts until `leave`. `access` is asked at every attachment, so that a renewed certificate or key is used;
    what it raises then is tried again. `refusal` is why the router does not want this worker, while that is its last
    word; it is asked again from time to time, for it may be another one by then."""

    def __init__(
        self,
        router: Place,
        info: WorkerInfo,
        host: Host,
        access: Callable[[], Access] = Access,
        spoken: Versions = SPOKEN,
    ) -> None:
        self._place = router
        self._router = str(router)
        self._access = access
        self._info = info
        self._host = host
        self._logger = Logger("worker")
        self._outbox: list[Delta] = []
        self._cache_news: deque[CacheNews] = deque(maxlen=MOST_CACHE_NEWS)
        self._wake = asyncio.Event()
        self._leaving = asyncio.Event()
        self._spoken = spoken
        self.protocol_version = 0  # what the two sides use, once attached
        self.refusal = ""
        self._refused_since: float | None = None
        self._let_in = False
        self.is_attached = False
        self._back_off_s = FIRST_BACK_OFF_S

    def send(self, deltas: Sequence[Delta]) -> None:
        """One engine step's deltas for this router."""
        self._outbox.extend(deltas)
        self._wake.set()

    def cached(self, news: CacheNews) -> None:
        """What became of the engine's prefix cache."""
        if self.is_attached:
            self._cache_news.append(news)
            self._wake.set()

    def nudge(self) -> None:
        """The load may have changed."""
        self._wake.set()

    def leave(self) -> None:
        """Sends what is left, ends the stream, then `run` returns."""
        self._leaving.set()
        self._wake.set()

    async def run(self) -> None:
        while not self._leaving.is_set():
            try:
                await self._attach()
            except JoinRefused as error:
                self._check_refusal(error)
            except (Unauthenticated, PermissionDenied) as error:
                self._check_right(error)
            except (Unavailable, ConfigError) as error:
                self.refusal = ""
                self._logger.info("router not attached", router=self._router, reason=str(error))
            _pass_on_cancellation()
            await self._pause()

    def _check_refusal(self, error: JoinRefused) -> None:
        now = time.monotonic()
        self._refused_since = now if self._refused_since is None else self._refused_since
        if error.field not in TAKEN or now - self._refused_since > TAKEN_FOR_S:
            self._refused(error)
        else:
            self._logger.warning("router refused the join; trying again", router=self._router, reason=str(error))

    def _check_right(self, error: SplitserveError) -> None:
        """A worker that was let in once waits for its renewed key, which may reach it after the router."""
        if self._let_in:
            self._logger.warning("router refused the key; trying again", router=self._router, reason=str(error))
        else:
            self._refused(error)

    def _refused(self, error: SplitserveError) -> None:
        if self.refusal != str(error):
            self._logger.warning("router refused this worker", router=self._router, reason=str(error))
        self.refusal = str(error)
        self._host.refused(self._router)

    async def _pause(self) -> None:
        longest_s = REFUSED_BACK_OFF_S if self.refusal else self._back_off_s
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s * random.uniform(0.5, 1.0)):
                await self._leaving.wait()
        self._back_off_s = min(2 * self._back_off_s, LONGEST_BACK_OFF_S)

    # One stream ------------------------------------------------------------------------------------------------------
    async def _attach(self) -> None:
        """From join to the stream's end. Raises JoinRefused or Unavailable."""
        async with open_channel(self._place, access=self._access()) as channel:
            stub = worker_pb2_grpc.FleetStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Attach()
            try:
                await self._serve(call, await self._join(call))
            except grpc.RpcError as error:
                raise _meaning(error) from error
            except asyncio.InvalidStateError as error:  # of a call that was over before it was written to
                raise _meaning(await _status_of(call)) from error
            finally:
                call.cancel()

    async def _join(self, call: Any) -> worker_pb2.Welcome:
        join = worker_pb2.Join(
            protocol_version=self._spoken.lowest,
            max_protocol_version=self._spoken.highest,
            worker=convert.worker_info_to_proto(self._info),
        )
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await call.write(worker_pb2.WorkerMessage(join=join))
                first = await call.read()
        except TimeoutError as error:
            raise Unavailable(f"no welcome within {WELCOME_TIMEOUT_S:.0f} s") from error
        if first is grpc.aio.EOF or first.WhichOneof("message") != "welcome":
            raise Unavailable("the router did not begin with a welcome")
        welcome: worker_pb2.Welcome = first.welcome
        self._check_version(welcome.protocol_version)
        return welcome

    def _check_version(self, said: int) -> None:
        """A router of before versions were agreed on took the worker's lowest for the only one."""
        self.protocol_version = said or self._spoken.lowest
        if self.protocol_version not in self._spoken:
            raise JoinRefused(FIELD, f"the router chose {said}, but this worker speaks {self._spoken}")

    async def _serve(self, call: Any, welcome: worker_pb2.Welcome) -> None:
        self._back_off_s, self._refused_since, self._let_in, self.refusal = FIRST_BACK_OFF_S, None, True, ""
        self._outbox.clear()
        self._cache_news.clear()
        self.is_attached = True
        self._host.attached(self._router)
        try:
            await self._exchange(call, welcome.heartbeat_interval_s)
        except ExceptionGroup as group:
            raise first_of(group) from group
        finally:
            self.is_attached = False
            self._host.lost(self._router)

    async def _exchange(self, call: Any, heartbeat_interval_s: float) -> None:
        """Until the router ends the stream, or has had time to after the worker ended its side."""
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read(call))
            writer = tasks.create_task(self._write(call, heartbeat_interval_s))
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                await asyncio.wait({reader}, timeout=LEAVE_TIMEOUT_S)
            reader.cancel()
            writer.cancel()

    async def _read(self, call: Any) -> None:
        """Until the router ends the stream."""
        while (message := await call.read()) is not grpc.aio.EOF:
            self._hear(message)

    def _hear(self, message: worker_pb2.RouterMessage) -> None:
        match message.WhichOneof("message"):
            case "job":
                self._take(message.job)
            case "cancel":
                self._host.cancel(self._router, message.cancel.job_id)
            case "hand_over":
                order = message.hand_over
                self._host.hand_over(self._router, order.job_id, convert.ticket_from_proto(order.ticket), order.at_end)
            case "peers":
                self._host.peers([convert.kv_peer_from_proto(peer) for peer in message.peers.peers])
            case "set_pool":
                self._host.set_pool(convert.pool_from_proto(message.set_pool.pool))
            case "drain":
                self._host.drain()
            case unknown:
                self._logger.warning("message of an unknown kind ignored", router=self._router, kind=str(unknown))

    def _take(self, message: worker_pb2.Job) -> None:
        try:
            job = convert.job_from_proto(message)
        except InvalidRequest as error:
            self._host.bad_job(self._router, message.number)
            outcome = Outcome(failure=Failure.INVALID, field=error.field, message=error.message)
            self.send([Delta(message.job_id, outcome=outcome)])
            return
        self._host.job(self._router, message.number, job)

    async def _write(self, call: Any, interval_s: float) -> None:
        told: Load | None = None
        told_at = time.monotonic() - interval_s
        while not (self._leaving.is_set() and not self._outbox):
            if not self._outbox and not self._cache_news:
                await self._news(told_at + interval_s - time.monotonic())
            load, now = self._host.load(self._router), time.monotonic()
            due = told is None or now - told_at >= interval_s or is_news(load, told, now - told_at)
            if due or self._outbox or self._cache_news:
                deltas, self._outbox = self._outbox[:MOST_DELTAS], self._outbox[MOST_DELTAS:]
                told, told_at = (load, now) if due else (told, told_at)
                news = self._cache_news.popleft() if self._cache_news else None
                await call.write(_message(deltas, load if due else None, news))
        await call.done_writing()

    async def _news(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._wake.wait()
        self._wake.clear()


def is_news(load: Load, told: Load, since_s: float) -> bool:
    """Whether a router that was told the one so long ago is told the other before its next heartbeat. Tokens made since
    are no news: the deltas that bring them are. Nor is how decodes stand, which each step changes; where they have
    objectives that is told every so often."""
    as_it_was = replace(load, produced_tokens=told.produced_tokens, slack_s=told.slack_s, slowdown=told.slowdown)
    if as_it_was != told:
        return True
    stands_otherwise = (load.slack_s, load.slowdown) != (told.slack_s, told.slowdown)
    return stands_otherwise and not isinf(load.tpot_s) and since_s >= PACE_S


def _pass_on_cancellation() -> None:
    """A TaskGroup whose child fails at the moment it is cancelled raises the failure alone."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _message(deltas: Sequence[Delta], load: Load | None, news: CacheNews | None) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(
        deltas=[convert.delta_to_proto(delta) for delta in deltas],
        load=convert.load_to_proto(load) if load is not None else None,
        cache_news=[convert.cache_news_to_proto(news)] if news is not None else (),
    )


async def _status_of(call: Any) -> grpc.RpcError:
    """Of a call that is over."""
    code, details = await call.code(), await call.details()
    return grpc.aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), details)


def _meaning(error: grpc.RpcError) -> Exception:
    """What a broken stream means for the worker."""
    meant = from_rpc_error(error)
    return (
        meant
        if isinstance(meant, JoinRefused | Unauthenticated | PermissionDenied)
        else Unavailable(f"{error.code().name}: {meant}")
    )
