"""What goes to the one worker and when, without a wire."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace

import pytest

from splitserve.bench.targets.seat import DEADLINE_S, Seat, SendCancel, SendJob
from splitserve.core.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    SplitserveError,
    Unavailable,
)
from splitserve.core.request import FinishReason
from splitserve.core.worker import DecodeJob, Delta, Failure, Load, Outcome, Pool
from tests.unit.bench.virtual import run_virtually
from tests.unit.router.scripted import load_of, worker_info

INFO = worker_info("d0", Pool.PREFILL)  # whatever the pool: 64 blocks of 16 tokens, at most 256 tokens
IDLE = load_of(INFO)
WITHIN_S = 5.0


def seated() -> Seat:
    seat = Seat()
    seat.sit(INFO)
    seat.heard(IDLE, [])
    return seat


def sent(seat: Seat) -> list[SendJob]:
    """What the worker has been told to do since."""
    orders = [seat.outbox.get_nowait() for _ in range(seat.outbox.qsize())]
    return [order for order in orders if isinstance(order, SendJob)]


def told(seat: Seat, job: DecodeJob, *tokens: int, load: Load | None = None, outcome: Outcome | None = None) -> None:
    seat.heard(load, [Delta(job.job_id, 0, tokens, outcome=outcome)])


def failed(failure: Failure, field: str = "") -> Outcome:
    return Outcome(failure=failure, message="scripted", field=field)


DONE = Outcome(FinishReason.LENGTH)


class Asking:
    """A request on its way: what it has brought, and how it ended."""

    def __init__(self, seat: Seat, prompt: Sequence[int] = (1, 2, 3), output_tokens: int = 4) -> None:
        self.counts: list[int] = []
        self.ids: list[int] = []
        self.task = asyncio.ensure_future(self._read(seat, prompt, output_tokens))

    async def _read(self, seat: Seat, prompt: Sequence[int], output_tokens: int) -> None:
        async with aclosing(seat.ask(prompt, output_tokens, self.ids.extend)) as chunks:
            async for tokens in chunks:
                self.counts.append(tokens)

    async def error(self) -> BaseException | None:
        async with asyncio.timeout(WITHIN_S):
            await asyncio.wait({self.task})
        return self.task.exception()


@asynccontextmanager
async def asking(seat: Seat, count: int = 1, prompt: Sequence[int] = (1, 2, 3)) -> AsyncIterator[list[Asking]]:
    """So many requests that have reached the seat; ended at the latest when the block is left."""
    requests = [Asking(seat, prompt) for _ in range(count)]
    await turn()
    try:
        yield requests
    finally:
        for request in requests:
            request.task.cancel()
            with suppress(asyncio.CancelledError, SplitserveError):
                await request.task


async def turn() -> None:
    """Lets every other task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_request_is_one_decode_job_that_computes_its_own_prompt() -> None:
    seat = seated()
    async with asking(seat) as (request,):
        (order,) = sent(seat)
        job = order.job
        assert (order.number, job.prompt, job.ticket, job.output) == (1, (1, 2, 3), None, ())
        assert (job.sampling.max_tokens, job.sampling.min_tokens, job.sampling.ignore_eos) == (4, 4, True)
        assert DEADLINE_S - 5 < job.deadline_s <= DEADLINE_S
        told(seat, job, 7)
        await turn()
        told(seat, job, 8, 9)
        told(seat, job, 10, outcome=DONE)
        assert await request.error() is None
    assert request.counts == [1, 3]  # those that came together are one chunk
    assert request.ids == [7, 8, 9, 10]
    assert seat.outbox.empty()


async def test_what_the_worker_does_not_grant_waits_in_the_order_of_its_coming() -> None:
    seat = seated()
    seat.heard(replace(IDLE, free_sequences=2), [])
    async with asking(seat, 5) as requests:
        first, second = sent(seat)
        seat.heard(replace(IDLE, free_sequences=0, seen_jobs=2), [])
        assert not sent(seat)
        told(seat, second.job, 1, outcome=DONE, load=replace(IDLE, free_sequences=1, seen_jobs=2))
        (third,) = sent(seat)
        assert await requests[1].error() is None
        seat.heard(replace(IDLE, free_sequences=8, seen_jobs=3), [])
        fourth, fifth = sent(seat)
        assert [order.number for order in (first, second, third, fourth, fifth)] == [1, 2, 3, 4, 5]
        for request, order in zip((requests[0], *requests[2:]), (first, third, fourth, fifth), strict=True):
            told(seat, order.job, 1, outcome=DONE)
            assert await request.error() is None


async def test_a_prompt_waits_for_those_before_it_to_be_read() -> None:
    """As the worker's own rule has it: so many prompt tokens ahead and no more."""
    seat = seated()
    seat.heard(replace(IDLE, prefill_token_limit=100), [])
    async with asking(seat, 3, prompt=range(60)):
        assert len(sent(seat)) == 2
        seat.heard(replace(IDLE, prefill_token_limit=100, prefill_tokens=60, seen_jobs=2), [])
        assert len(sent(seat)) == 1


async def test_nothing_goes_before_the_worker_has_said_what_it_grants() -> None:
    seat = Seat()
    seat.sit(INFO)
    assert not seat.ready.is_set()
    async with asking(seat):
        assert not sent(seat)
        seat.heard(IDLE, [])
        assert seat.ready.is_set()
        assert len(sent(seat)) == 1


async def test_a_job_that_was_refused_for_now_goes_again_before_the_others() -> None:
    seat = seated()
    seat.heard(replace(IDLE, free_sequences=1), [])
    async with asking(seat, 2) as (request, _):
        (order,) = sent(seat)
        told(seat, order.job, outcome=failed(Failure.NOT_NOW))
        assert not sent(seat)  # before it has said anew what it grants
        seat.heard(replace(IDLE, free_sequences=1, seen_jobs=1), [])
        (again,) = sent(seat)
        assert (again.number, again.job.job_id) == (2, order.job.job_id)
        told(seat, again.job, 1, 2, 3, 4, outcome=DONE)
        assert await request.error() is None
        assert request.counts == [4]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (Failure.INVALID, InvalidRequest),
        (Failure.ENGINE, EngineError),
        (Failure.CANCELLED, Cancelled),
        (Failure.TRANSFER, EngineError),
    ],
)
async def test_a_failure_comes_after_the_tokens_before_it(failure: Failure, kind: type[SplitserveError]) -> None:
    seat = seated()
    async with asking(seat) as (request,):
        (order,) = sent(seat)
        told(seat, order.job, 1, outcome=failed(failure, "prompt"))
        error = await request.error()
    assert type(error) is kind
    assert "scripted" in str(error)
    assert request.counts == [1]


async def test_a_stream_left_early_cancels_its_job_and_what_waits_is_forgotten() -> None:
    seat = seated()
    seat.heard(replace(IDLE, free_sequences=1), [])
    async with asking(seat, 2):
        (order,) = sent(seat)
    assert seat.outbox.get_nowait() == SendCancel(order.job.job_id)
    seat.heard(IDLE, [])
    assert seat.outbox.empty()
    told(seat, order.job, outcome=failed(Failure.CANCELLED))  # nobody waits for it


async def test_what_one_leaves_lets_the_next_in() -> None:
    seat = seated()
    seat.heard(replace(IDLE, free_blocks=10), [])
    large = Asking(seat, range(200))  # 13 blocks
    small = Asking(seat)
    await turn()
    assert not sent(seat)
    large.task.cancel()
    await turn()
    (order,) = sent(seat)
    assert order.job.prompt == (1, 2, 3)
    told(seat, order.job, 1, outcome=DONE)
    assert await small.error() is None


async def test_what_no_grant_can_hold_is_refused_at_once() -> None:
    seat = seated()
    error = await Asking(seat, range(250), 7).error()
    assert isinstance(error, InvalidRequest)
    assert "d0 holds 256 tokens" in str(error)
    async with asking(seat):
        assert len(sent(seat)) == 1  # it holds up nobody


async def test_a_worker_that_leaves_takes_its_requests_with_it() -> None:
    seat = seated()
    seat.heard(replace(IDLE, free_sequences=1), [])
    async with asking(seat, 2) as requests:
        seat.leave("its stream broke")
        errors = [await request.error() for request in requests]
        errors.append(await Asking(seat).error())
    assert all(isinstance(error, Unavailable) and "d0 is gone" in str(error) for error in errors)


async def test_the_same_worker_may_come_back_and_its_jobs_count_from_one() -> None:
    seat = seated()
    async with asking(seat):
        assert [order.number for order in sent(seat)] == [1]
        seat.leave("its stream broke")
    seat.sit(INFO)
    seat.heard(IDLE, [])
    async with asking(seat):
        assert [order.number for order in sent(seat)] == [1]


def test_another_worker_is_refused_also_when_the_first_has_left() -> None:
    seat = seated()
    with pytest.raises(Unavailable, match="d0 is attached already"):
        seat.sit(INFO)
    for _ in range(2):
        with pytest.raises(Unavailable, match="that is d0: d1 can't attach"):
            seat.sit(worker_info("d1", Pool.DECODE))
        with suppress(KeyError):
            seat.leave("its stream broke")


def test_a_request_fails_at_its_deadline_running_or_not() -> None:
    async def both() -> None:
        seat = seated()
        seat.heard(replace(IDLE, free_sequences=1), [])
        requests = [Asking(seat) for _ in range(2)]
        await turn()
        (order,) = sent(seat)
        await asyncio.sleep(DEADLINE_S + 1)
        assert all(isinstance(request.task.exception(), DeadlineExceeded) for request in requests)
        assert seat.outbox.get_nowait() == SendCancel(order.job.job_id)

    run_virtually(both())
