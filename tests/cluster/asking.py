"""Sending requests and waiting for conditions."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Unpack

from splitserve.client import AsyncClient, Options
from splitserve.core.fleet import FleetStatus, Health, WorkerStatus
from splitserve.core.request import Chunk, SamplingParams, Timings

WAIT_S = 30.0
POLL_S = 0.02
GREEDY_32 = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    last: Chunk

    @property
    def timings(self) -> Timings:
        assert self.last.timings is not None
        return self.last.timings

    def same_as(self, other: "Answer") -> bool:
        mine, theirs = self.last.finish_reason, other.last.finish_reason
        return (self.token_ids, self.text, mine) == (other.token_ids, other.text, theirs)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def prompt_of(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Random ordinary tokens of the shipped model's vocabulary."""
    return tuple(random.Random(f"{seed}/{tokens}").choices(range(300, 2000), k=tokens))


async def ask(
    client: AsyncClient,
    prompt: str | tuple[int, ...],
    sampling: SamplingParams = GREEDY_32,
    on_chunk: Callable[[int], None] = lambda tokens: None,
    **options: Unpack[Options],
) -> Answer:
    """The whole answer; every token must come exactly once and in order. `on_chunk` hears how many there are."""
    token_ids: list[int] = []
    texts: list[str] = []
    async for chunk in client.generate(prompt, sampling, **options):
        assert chunk.index == len(token_ids), "a token came twice or was left out"
        token_ids.extend(chunk.token_ids)
        texts.append(chunk.text)
        on_chunk(len(token_ids))
    assert chunk.finish_reason is not None
    assert chunk.usage is not None
    assert chunk.usage.output_tokens == len(token_ids)
    return Answer(tuple(token_ids), "".join(texts), chunk)


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Returns once the condition holds; fails if it doesn't in time."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not await condition():  # noqa: ASYNC110 - another process's state has no event to wait for
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {WAIT_S:g} s: {what}") from None


async def worker_status(client: AsyncClient, name: str) -> WorkerStatus | None:
    workers = (await client.fleet()).workers
    return next((status for status in workers if status.worker.name == name), None)


async def holds(client: AsyncClient, name: str, what: Callable[[WorkerStatus], bool]) -> None:
    """Waits until a worker's status is so."""

    async def check() -> bool:
        status = await worker_status(client, name)
        return status is not None and what(status)

    await eventually(check, f"the state of {name}")


async def settled(client: AsyncClient, workers: int) -> None:
    """Waits until nothing waits or runs and all memory of that many ready workers is free again."""
    fleet = FleetStatus("", (), 0, 0, "")

    async def check() -> bool:
        nonlocal fleet
        fleet = await client.fleet()
        idle = fleet.waiting_requests == fleet.running_requests == 0
        return idle and len(fleet.workers) == workers and all(map(_at_rest, fleet.workers))

    try:
        await eventually(check, "an idle fleet with all blocks free")
    except AssertionError as error:
        raise AssertionError(f"{error}; it is {fleet}") from None


def _at_rest(status: WorkerStatus) -> bool:
    load = status.load
    held = (load.running, load.pinned_blocks, load.quarantined_blocks, status.prefills, status.decodes)
    return status.health is Health.READY and load.free_blocks == status.worker.total_blocks and not any(held)
