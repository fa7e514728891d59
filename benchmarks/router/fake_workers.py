"""A fake prefill and a fake decode worker of ours in one process, as cheap as the fakes of other routers.

    python -m benchmarks.router.fake_workers '{"router": "127.0.0.1:50051", "prefill_s": 0, "step_s": 0, ...}'

The simulated engine computes what it makes, and one core of it makes fewer tokens than a router can pass on: in a burst
it would measure itself. These attach to the router like any worker and grant it all it asks for; a step is one message
with a token for every running request, and the next follows once the router takes it. Says when both have joined.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import uvloop

from benchmarks.router.fake import CONTEXT_TOKENS, MODEL, Pace
from splitserve.cli.process import end_with_parent
from splitserve.core.request import FinishReason
from splitserve.core.worker import KvFormat, KvMode, KvPart, KvPeer, Load, Outcome, Pool, WorkerInfo
from splitserve.rpc import convert
from splitserve.rpc.channel import open_channel
from splitserve.rpc.gen import worker_pb2, worker_pb2_grpc

_TOKEN, _TEXT = 300, " token"
_PLENTY = 1 << 24  # blocks, tokens and sequences: nothing ever waits for room
_REPORT_S = 0.25
_LAYERS = _HEADS = 1
_KV = KvFormat("fake", "float32", 16, _LAYERS, _HEADS, 64, 8192, KvMode.PUSH, "shm")


@dataclass(slots=True)
class _Stream:
    job_id: str
    left: int
    made: int = 0

    def next_delta(self) -> worker_pb2.Delta:
        self.made += 1
        self.left -= 1
        delta = worker_pb2.Delta(job_id=self.job_id, index=self.made - 1, token_ids=(_TOKEN,), text=_TEXT)
        if not self.left:
            delta.outcome.CopyFrom(_FINISHED)
        return delta


_FINISHED = convert.outcome_to_proto(Outcome(finish_reason=FinishReason.LENGTH))


@dataclass(slots=True)
class Prefills:
    """What the prefill worker has read: the decode worker goes on from there."""

    _read: dict[str, asyncio.Event] = field(default_factory=dict)

    def event(self, transfer_id: str) -> asyncio.Event:
        return self._read.setdefault(transfer_id, asyncio.Event())

    def forget(self, transfer_id: str) -> None:
        del self._read[transfer_id]


class FakeWorker:
    """One of the two, on the event loop of both."""

    def __init__(self, pool: Pool, pace: Pace, prefills: Prefills) -> None:
        self._pool = pool
        self._pace = pace
        self._prefills = prefills
        self._streams: dict[str, _Stream] = {}
        self._outbox: list[worker_pb2.Delta] = []
        self._news = asyncio.Event()
        self._seen_jobs = 0

    async def run(self, router: str, joined: Callable[[], None]) -> None:
        """Until the router ends the stream."""
        async with open_channel(router) as channel:
            call = worker_pb2_grpc.FleetStub(channel).Attach()  # type: ignore[no-untyped-call]
            join = worker_pb2.Join(
                protocol_version=convert.PROTOCOL_VERSION, worker=convert.worker_info_to_proto(_info(self._pool))
            )
            await call.write(worker_pb2.WorkerMessage(join=join))
            await call.read()
            joined()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(call))
                tasks.create_task(self._report())
                await self._read(call, tasks)
                raise ConnectionError("the router ended the stream")

    async def _read(self, call: Any, tasks: asyncio.TaskGroup) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            kind = message.WhichOneof("message")
            if kind == "job":
                self._seen_jobs = message.job.number
                self._news.set()
                work = self._prefill if message.job.WhichOneof("kind") == "prefill" else self._decode
                tasks.create_task(work(message.job))
            elif kind == "cancel":
                self._streams.pop(message.cancel.job_id, None)

    async def _prefill(self, job: worker_pb2.Job) -> None:
        await asyncio.sleep(self._pace.prefill_s)
        self._prefills.event(job.ticket.transfer_id).set()
        self._outbox.append(worker_pb2.Delta(job_id=job.job_id, outcome=_FINISHED))
        self._news.set()

    async def _decode(self, job: worker_pb2.Job) -> None:
        if job.HasField("ticket"):
            await self._prefills.event(job.ticket.transfer_id).wait()
            self._prefills.forget(job.ticket.transfer_id)
        else:
            await asyncio.sleep(self._pace.prefill_s)
        self._streams[job.job_id] = _Stream(job.job_id, job.decode.sampling.max_tokens)
        self._news.set()

    async def _write(self, call: Any) -> None:
        while True:
            if not self._streams:
                await self._news.wait()
            elif self._pace.step_s:
                await asyncio.sleep(self._pace.step_s)
            self._news.clear()
            deltas, self._outbox = self._outbox, []
            deltas += [stream.next_delta() for stream in self._streams.values()]
            self._streams = {job_id: stream for job_id, stream in self._streams.items() if stream.left}
            await call.write(worker_pb2.WorkerMessage(deltas=deltas, load=self._load()))

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            self._news.set()

    def _load(self) -> worker_pb2.Load:
        load = Load(
            self._seen_jobs, _PLENTY, _PLENTY, 0, _PLENTY, _PLENTY, len(self._streams), 0, 0, self._pool, False, 0
        )
        return convert.load_to_proto(load)


def _info(pool: Pool) -> WorkerInfo:
    uuid = uuid4().hex
    peer = KvPeer(f"{uuid}/0", "tcp://127.0.0.1:1", KvPart(0, _LAYERS, 0, _HEADS))
    return WorkerInfo(uuid, f"{pool}-0", pool, MODEL, _KV, (peer,), _PLENTY, _PLENTY, CONTEXT_TOKENS, "sim")


async def serve(router: str, pace: Pace) -> None:
    prefills, missing = Prefills(), list(Pool)

    def joined() -> None:
        missing.pop()
        if not missing:
            print(json.dumps({"joined": len(Pool)}), flush=True)

    async with asyncio.TaskGroup() as tasks:
        for pool in Pool:
            tasks.create_task(FakeWorker(pool, pace, prefills).run(router, joined))


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    end_with_parent(int(said["parent"]))
    uvloop.run(serve(said["router"], Pace(said["prefill_s"], said["step_s"])))
