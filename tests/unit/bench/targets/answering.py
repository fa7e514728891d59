"""A worker on the wire that answers each job with the tokens asked for, in chunks of two."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from splitserve.core.request import FinishReason
from splitserve.core.worker import DecodeJob, Outcome, Pool
from tests.unit.router.wired import WiredWorker


@asynccontextmanager
async def answering(address: str, name: str = "d0") -> AsyncIterator[WiredWorker]:
    async with WiredWorker(address, name, Pool.DECODE) as worker, asyncio.TaskGroup() as tasks:
        task = tasks.create_task(_answer(worker))
        yield worker
        task.cancel()


async def _answer(worker: WiredWorker) -> None:
    while True:
        answer(worker, await _next(worker))


async def _next(worker: WiredWorker) -> DecodeJob:
    """However long it takes until there is one: the test has the deadline."""
    while True:
        try:
            return await worker.job()
        except TimeoutError:
            continue


def answer(worker: WiredWorker, job: DecodeJob) -> None:
    tokens = job.sampling.max_tokens
    assert tokens is not None
    for index in range(0, tokens, 2):
        ended = Outcome(FinishReason.LENGTH) if index + 2 >= tokens else None
        worker.say(job, *range(min(2, tokens - index)), index=index, outcome=ended)
