"""A request that decodes on one scripted worker and is to move to another: brought to wherever a test wants it."""

import asyncio
from enum import Enum, auto

import pytest

from splitserve.core.request import Chunk
from splitserve.core.worker import DecodeJob, Pool
from splitserve.router.move import Move, Moved, MoveRefused
from tests.unit.router.scripted import WITHIN_S, ScriptedWorker, Stage

PROMPT = tuple(range(5, 45))  # with the first token 41: the KV of 40 may move, two full blocks of 16 in advance
COPIED = 32
DROPPED = 99  # what a copy makes


class Phase(Enum):
    COPY = auto()  # the target loads what is there
    STOP = auto()  # the source was told to stop
    ARRIVAL = auto()  # the target has the job and makes no token yet


class Journeying:
    """A request of four tokens that decodes on d0, its first token made; d1 is idle."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.source, self.target = stage.worker("d0", Pool.DECODE), stage.worker("d1", Pool.DECODE)

    async def begin(self, **request: object) -> None:
        self.call = self.stage.request(**{"prompt": PROMPT, **request})  # type: ignore[arg-type]
        self.job = await self.source.decode_job()
        self.source.say(self.job, 10)
        await self.stage.seen(1)

    async def reach(self, phase: Phase) -> Move:
        """Orders it to move, and goes on until it is there."""
        move = self.stage.move()
        self.copy = await self.target.decode_job()
        assert not (await self.source.told_to_hand_over()).at_end
        if phase is not Phase.COPY:
            self.target.finish(self.copy, DROPPED)
            assert (await self.source.told_to_hand_over()).at_end
        if phase is Phase.ARRIVAL:
            self.source.hand_over(self.job, 11, index=1)
            self.arrived = await self.target.decode_job()
        return move

    async def finish_here(self, index: int = 1) -> None:
        await finish(self.stage, self.call, self.source, self.job, index)


async def finish(
    stage: Stage, call: "asyncio.Task[Chunk]", worker: ScriptedWorker, job: DecodeJob, index: int
) -> Chunk:
    """The worker makes the rest; the client then has every token once, and nothing is promised any more."""
    assert len(job.output) <= index
    worker.finish(job, *range(10 + index, 14), index=index)
    last = await ending(call)
    assert stage.token_ids == [10, 11, 12, 13]
    assert stage.text_out == "<10><11><12><13>"
    end_cancelled(stage)
    assert stage.promised() == 0
    return last


def end_cancelled(stage: Stage) -> None:
    """Every worker obeys the cancellations that it was sent."""
    for worker in stage.workers:
        worker.obey()


async def ending(call: "asyncio.Task[Chunk]") -> Chunk:
    async with asyncio.timeout(WITHIN_S):
        return await call


async def moved(move: Move) -> Moved:
    async with asyncio.timeout(WITHIN_S):
        return await move.result()


async def refusal(move: Move) -> str:
    with pytest.raises(MoveRefused) as refused:
        await moved(move)
    return str(refused.value)
