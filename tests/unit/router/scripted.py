"""Workers that do what a test says, word for word, on a real membership: no network, no clock but the loop's."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from prometheus_client import CollectorRegistry

from splitserve.core.config import RouterConfig
from splitserve.core.deadline import Deadline
from splitserve.core.model import ModelInfo
from splitserve.core.request import Chunk, FinishReason, GenerateRequest, SamplingParams
from splitserve.core.sink import Awaited, Sink
from splitserve.core.worker import (
    DecodeJob,
    Delta,
    Failure,
    Job,
    KvFormat,
    KvMode,
    Load,
    Outcome,
    Pool,
    PrefillJob,
    TransferStats,
    WorkerInfo,
)
from splitserve.router import choices
from splitserve.router.classes import SloClasses
from splitserve.router.journey import Journey, Surroundings, Terms
from splitserve.router.membership import Attachment, Membership
from splitserve.router.move import Move
from splitserve.router.orders import Order, SendCancel, SendHandOver, SendJob
from splitserve.router.text import Text
from splitserve.router.waiting import WaitingRequests
from splitserve.routing.fleet import Fleet
from splitserve.telemetry.metrics import RouterMetrics
from tests.unit.peers import peer

WITHIN_S = 5.0  # a test that waits longer for anything has failed
DEMO_MODEL = Path(__file__).parents[3] / "splitserve" / "demo" / "model"
JobT = TypeVar("JobT", PrefillJob, DecodeJob)


async def holds(what: Callable[[], bool]) -> None:
    """Waits for what nothing tells of."""
    async with asyncio.timeout(WITHIN_S):
        while not what():  # noqa: ASYNC110 there is no event
            await asyncio.sleep(0.001)


def worker_info(name: str, pool: Pool, mode: KvMode = KvMode.PUSH, **changes: object) -> WorkerInfo:
    """A worker of 64 blocks of 16 tokens."""
    info = WorkerInfo(
        uuid=f"uuid-{name}",
        name=name,
        pool=pool,
        model="model",
        kv=KvFormat("print", "float32", 16, 4, 2, 64, 1024, mode, "shm"),
        kv_peers=(peer(f"uuid-{name}"),),
        total_blocks=64,
        max_sequences=8,
        max_model_len=256,
        engine="sim",
    )
    return replace(info, **changes)  # type: ignore[arg-type]


def load_of(info: WorkerInfo, **changes: object) -> Load:
    """What an idle worker grants."""
    load = Load(
        seen_jobs=0,
        free_blocks=info.total_blocks,
        free_sequences=info.max_sequences,
        prefill_tokens=0,
        prefill_token_limit=512,
        parked_limit_blocks=info.total_blocks // 2,
        running=0,
        quarantined_blocks=0,
        pinned_blocks=0,
        pool=info.pool,
        draining=False,
        produced_tokens=0,
    )
    return replace(load, **changes)  # type: ignore[arg-type]


class ScriptedWorker:
    """`grants` is the load it reports, whole, after each thing it says."""

    def __init__(self, membership: Membership, info: WorkerInfo) -> None:
        self.info = info
        self.grants = load_of(info)
        self.cancelled: list[str] = []
        self._jobs: list[Job] = []
        self._hand_overs: list[SendHandOver] = []
        self._arrived = asyncio.Condition()
        self._seen = 0
        self._membership = membership
        self.attachment: Attachment = membership.join(info)
        self._listening = asyncio.create_task(self._listen())
        self.report()

    def report(self, **changes: object) -> None:
        self.grants = replace(self.grants, seen_jobs=self._seen, **changes)  # type: ignore[arg-type]
        self._membership.heard(self.info.uuid, self.grants, [])

    def say(self, job: Job, *token_ids: int, index: int = 0, outcome: Outcome | None = None) -> None:
        text = "".join(f"<{token}>" for token in token_ids)
        delta = Delta(job.job_id, index, token_ids, text, outcome=outcome)
        self._membership.heard(self.info.uuid, replace(self.grants, seen_jobs=self._seen), [delta])

    def finish(self, job: Job, *token_ids: int, index: int = 0, stop: bool = False) -> None:
        reason = FinishReason.STOP if stop else FinishReason.LENGTH
        self.say(job, *token_ids, index=index, outcome=Outcome(reason))

    def fail(self, job: Job, failure: Failure, field: str = "") -> None:
        self.say(job, outcome=Outcome(failure=failure, message=f"scripted {failure.value}", field=field))

    def hand_over(self, job: Job, *token_ids: int, index: int = 0) -> None:
        """Stops a decode, as it was told to."""
        self.say(job, *token_ids, index=index, outcome=Outcome(failure=Failure.MIGRATED, message="handed over"))

    def sent_kv(self, job: PrefillJob, kv_bytes: int = 4096, uncovered_s: float = -0.01) -> None:
        transfer = TransferStats(kv_bytes, kv_bytes // 2, uncovered_s)
        outcome = Outcome(FinishReason.LENGTH, handover=b"from here", transfer=transfer)
        self.say(job, outcome=outcome)

    def obey(self) -> None:
        """Ends the jobs that the router has cancelled."""
        for job_id in self.cancelled:
            outcome = Outcome(failure=Failure.CANCELLED, message="cancelled")
            self._membership.heard(self.info.uuid, self.grants, [Delta(job_id, outcome=outcome)])

    def die(self) -> None:
        self._listening.cancel()
        self._membership.leave(self.info.uuid, "scripted death")

    async def decode_job(self) -> DecodeJob:
        return await self._next(DecodeJob)

    async def prefill_job(self) -> PrefillJob:
        return await self._next(PrefillJob)

    async def told_to_hand_over(self) -> SendHandOver:
        await self._until(lambda: bool(self._hand_overs))
        return self._hand_overs.pop(0)

    async def cancelled_job(self, job: Job) -> None:
        """Waits until the router has cancelled this job."""
        await self._until(lambda: job.job_id in self.cancelled)

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._hand_overs

    async def _next(self, kind: type[JobT]) -> JobT:
        await self._until(lambda: any(isinstance(job, kind) for job in self._jobs))
        job = next(job for job in self._jobs if isinstance(job, kind))
        self._jobs.remove(job)
        return job

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN_S), self._arrived:
            await self._arrived.wait_for(holds)

    async def _listen(self) -> None:
        while True:
            order: Order = await self.attachment.outbox.get()
            async with self._arrived:
                if isinstance(order, SendJob):
                    self._seen = order.number
                    self._jobs.append(order.job)
                if isinstance(order, SendHandOver):
                    self._hand_overs.append(order)
                if isinstance(order, SendCancel):
                    self.cancelled.append(order.job_id)
                self._arrived.notify_all()


class Stage:
    """A router's inside without its network, and the client that hears it."""

    def __init__(self, config: RouterConfig | None = None) -> None:
        self.config = config or RouterConfig()
        self.model = replace(ModelInfo.read(DEMO_MODEL), name="model", eos_token_ids=(1,))
        self.fleet = Fleet(silent_after_s=60.0)
        self.waiting = WaitingRequests(self.fleet, self.config.max_waiting_requests)
        self.membership = Membership("model", self.fleet, self.waiting.pump)
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry)
        self.classes = SloClasses(self.config.slo_classes)
        self.text = Text(self.model.path)
        self.workers: list[ScriptedWorker] = []
        self.chunks: list[Chunk] = []
        self.journey: Journey | None = None  # of the latest request
        self.sink: Sink | None = None  # in place of what waits until the client can be written to
        self.set_out: list[int] = []  # choices
        self.charged: list[int] = []  # tokens
        self.writable = asyncio.Event()
        self.writable.set()
        self._written = asyncio.Condition()

    def worker(self, name: str, pool: Pool, mode: KvMode = KvMode.PUSH, **changes: object) -> ScriptedWorker:
        worker = ScriptedWorker(self.membership, worker_info(name, pool, mode, **changes))
        self.workers.append(worker)
        return worker

    def pair(self, mode: KvMode = KvMode.PUSH) -> tuple[ScriptedWorker, ScriptedWorker]:
        """One prefill and one decode worker."""
        return self.worker("p0", Pool.PREFILL, mode), self.worker("d0", Pool.DECODE, mode)

    def request(
        self,
        prompt: Sequence[int] = (5, 6, 7, 8),
        max_tokens: int | None = 4,
        request_id: str = "r",
        deadline_s: float | None = None,
        inter_token_deadline_s: float | None = None,
        priority: int = 0,
        output: Sequence[int] = (),
        lora: str = "",
        cache_salt: str = "",
        slo_class: str = "standard",
        **sampling: object,
    ) -> "asyncio.Task[Chunk]":
        """Sends a request; the task is its call."""
        request = GenerateRequest(
            prompt=tuple(prompt),
            output=tuple(output),
            lora=lora,
            cache_salt=cache_salt,
            sampling=SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **sampling}),  # type: ignore[arg-type]
            request_id=request_id,
            deadline_s=deadline_s,
            inter_token_deadline_s=inter_token_deadline_s,
            priority=priority,
            slo_class=slo_class,
        )
        around = Surroundings(
            self.config, self.model, self.text, self.membership, self.waiting, self.metrics, self.classes
        )
        within_s = min(deadline_s or self.config.deadline_s, self.config.deadline_s)
        terms, sink = Terms(Deadline.after(within_s), self.charged.append), self.sink or Awaited(self._send)
        if request.sampling.n > 1:
            return asyncio.create_task(choices.travel(request, sink, around, terms, self._sets_out))
        self.journey = Journey(request, sink, around, terms)
        return asyncio.create_task(self.journey.travel())

    def move(self, to: ScriptedWorker | None = None) -> Move:
        """Orders the latest request elsewhere."""
        assert self.journey is not None
        move = Move(to.info.uuid if to is not None else None)
        self.journey.move(move)
        return move

    async def seen(self, count: int) -> None:
        """Waits until the client has so many tokens."""
        async with asyncio.timeout(WITHIN_S), self._written:
            await self._written.wait_for(lambda: len(self.token_ids) >= count)

    @property
    def token_ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def text_out(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    def promised(self) -> int:
        """Jobs that the router thinks some worker holds."""
        return sum(status.prefills + status.decodes for status in self.membership.statuses())

    def close(self) -> None:
        for worker in self.workers:
            worker.die()
        self.text.close()

    def tokens_of(self, choice: int) -> list[int]:
        return [token for chunk in self.chunks if chunk.choice == choice for token in chunk.token_ids]

    def _sets_out(self, choice: int, journey: Journey) -> None:
        self.set_out.append(choice)

    async def _send(self, chunk: Chunk) -> None:
        await self.writable.wait()
        async with self._written:
            self.chunks.append(chunk)
            self._written.notify_all()
