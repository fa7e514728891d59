"""Finds workers that are there and serve nobody: their heartbeats come, their engine makes no token.

One task of the router. A worker that has done nothing for anyone for a while, or has just failed a request, is asked
for one token. If none comes it is failing: it gets no jobs, and is asked again until it makes one. A worker too full
for the question is left as it is.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from uuid import uuid4

from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, Delta, Failure, WorkerInfo
from splitserve.router.mailbox import Lost, Mailbox
from splitserve.router.membership import Membership
from splitserve.telemetry.logs import Logger
from splitserve.telemetry.metrics import RouterMetrics

LOOK_S = 0.5
_PROMPT = (0,)
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


class Probing:
    """`after_s`: without a sign of work; `within_s`: what a worker gets to answer."""

    def __init__(
        self,
        membership: Membership,
        after_s: float,
        within_s: float,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._membership = membership
        self._after_s = after_s
        self._within_s = within_s
        self._metrics = metrics
        self._clock = clock
        self._logger = Logger("router")
        self._asked_at: dict[str, float] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            asking: dict[str, asyncio.Task[None]] = {}
            while True:
                asking = {uuid: task for uuid, task in asking.items() if not task.done()}
                for worker in self._due():
                    if worker.uuid not in asking:
                        asking[worker.uuid] = tasks.create_task(self._ask(worker))
                await asyncio.sleep(LOOK_S)

    def _due(self) -> list[WorkerInfo]:
        now = self._clock()
        there = self._membership.probed()
        self._asked_at = {uuid: at for uuid, at in self._asked_at.items() if uuid in {worker.uuid for worker in there}}
        return [worker for worker in there if self._is_due(worker.uuid, now)]

    def _is_due(self, uuid: str, now: float) -> bool:
        asked_at, suspected_at = self._asked_at.get(uuid, float("-inf")), self._membership.suspected_at(uuid)
        idle = now - max(asked_at, self._membership.active_at(uuid)) > self._after_s
        return (
            idle or suspected_at > asked_at or (self._membership.is_failing(uuid) and now - asked_at > self._within_s)
        )

    async def _ask(self, worker: WorkerInfo) -> None:
        self._asked_at[worker.uuid] = self._clock()
        answer = await self._answer(worker)
        if answer is None:
            return
        if self._membership.set_failing(worker.uuid, failing=not answer):
            say = self._logger.info if answer else self._logger.warning
            say(
                "worker makes tokens again" if answer else "worker makes no token", worker=worker.name, uuid=worker.uuid
            )
        self._metrics.probed("token" if answer else "none")

    async def _answer(self, worker: WorkerInfo) -> bool | None:
        """Whether a token came; None if that says nothing: the worker is full, or gone."""
        mailbox = Mailbox()
        name = f"probe/{uuid4().hex}"
        job = DecodeJob(f"{name}/decode", name, _PROMPT, _ONE_TOKEN, self._within_s)
        with self._membership.asked(worker.uuid, job, mailbox), suppress(TimeoutError):
            async with asyncio.timeout(self._within_s):
                while True:
                    for event in await mailbox.take():
                        if isinstance(event, Lost) or _is_full(event):
                            return None
                        if isinstance(event, Delta) and (event.token_ids or event.outcome is not None):
                            return bool(event.token_ids)
        return False


def _is_full(event: object) -> bool:
    return isinstance(event, Delta) and event.outcome is not None and event.outcome.failure is Failure.NOT_NOW
