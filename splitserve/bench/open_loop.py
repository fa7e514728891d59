"""Sends requests when they are due, whether earlier ones are answered or not, and writes down when tokens came back.

A closed loop waits for answers before it sends more, so a slow server is asked less and looks fast. Here the schedule
is fixed in advance, and TTFT counts from when a request was due: a sender that is late does not hide what it did. If
the sender itself can't keep up, the run says so (`Run.overloaded`), as its figures are then the sender's.

One event loop's: `run` returns when every request has ended, and leaves no task behind, however it ends. Whom it sends
to is not its business (see `targets`), nor are objectives (see `core/slo`).
"""

import asyncio
import math
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from splitserve.bench.run import Chunks, Ending, Run
from splitserve.core.errors import SplitserveError
from splitserve.workload.requests import Requests

Send = Callable[[int], AsyncGenerator[int, None]]
"""Sends the workload's request of that index, and yields the number of tokens of each chunk as it comes. Raises
SplitserveError or OSError if the request fails; anything else ends the run, as it is a defect. Closed early, it cancels
the request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`deadline_s`: from the start; what has not ended by then is cancelled. `in_flight`: while as many requests run,
    one that falls due is not sent but counts as failed: memory is finite, and a server that far behind has failed
    anyway. `chunks`: how many are logged; what comes later counts only in its request's row."""

    deadline_s: float = math.inf
    in_flight: int = 50_000
    chunks: int = 5_000_000


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds that don't go back, and how to wait for some. `sleep(0)` must let other tasks run."""

    now: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


async def run(requests: Requests, send: Send, limits: Limits | None = None, clock: Clock | None = None) -> Run:
    """Sends each request at its arrival, counted from now. Cancelled, it cancels what is in flight first. Raises an
    ExceptionGroup if `send` raises what it must not."""
    limits = limits or Limits()
    clock = clock or Clock(asyncio.get_running_loop().time)
    book = _Book(requests, limits.chunks, clock)
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(_send_all(requests, send, limits.in_flight, book))
        expiry = group.create_task(_expire(limits.deadline_s, sending, clock))
        await asyncio.wait({sending})
        expiry.cancel()
    return book.run()


async def _expire(deadline_s: float, sending: asyncio.Task[None], clock: Clock) -> None:
    if deadline_s < math.inf:
        await clock.sleep(deadline_s)
        sending.cancel()


async def _send_all(requests: Requests, send: Send, most: int, book: "_Book") -> None:
    async with asyncio.TaskGroup() as group:
        for index, due_s in enumerate(requests.arrival_s.tolist()):
            await book.clock.sleep(max(0.0, due_s - book.now_s()))
            if book.in_flight >= most:
                book.refuse(index, f"not sent: {most} requests were in flight")
            else:
                book.in_flight += 1
                group.create_task(_one(index, send, book)).add_done_callback(book.leave)


async def _one(index: int, send: Send, book: "_Book") -> None:
    book.sent(index)
    try:
        async with aclosing(send(index)) as chunks:
            async for tokens in chunks:
                book.chunk(index, tokens)
    except asyncio.CancelledError:
        book.end(index, Ending.CUT_OFF)
        raise
    except (SplitserveError, OSError) as error:
        book.end(index, Ending.FAILED, f"{type(error).__name__}: {error}")
    else:
        book.end(index, Ending.DONE)


class _Book:
    """Written row by row while a run goes on. Its memory is set by the number of requests and of logged chunks."""

    def __init__(self, requests: Requests, most_chunks: int, clock: Clock) -> None:
        count = len(requests)
        self.clock, self._start, self._requests = clock, clock.now(), requests
        self.in_flight = 0
        # Plain arrays: writing one number into a numpy array costs several times as much.
        self._sent, self._ended = (array("d", [math.nan]) * count for _ in range(2))
        self._first, self._last = (array("d", [math.inf]) * count for _ in range(2))
        self._tokens = array("q", [0]) * count
        self._ending = array("b", [Ending.NOT_SENT]) * count
        self._error = array("i", [-1]) * count
        self._errors: dict[str, int] = {}
        self._most_chunks, self._dropped = most_chunks, 0
        self._chunk_times, self._chunk_requests, self._chunk_tokens = array("d"), array("q"), array("q")

    def now_s(self) -> float:
        return self.clock.now() - self._start

    def sent(self, index: int) -> None:
        self._sent[index] = self.now_s()

    def chunk(self, index: int, tokens: int) -> None:
        """One without tokens, such as a last one that only says why it is the last, is not a chunk."""
        if not tokens:
            return
        now_s = self.now_s()
        if not self._tokens[index]:
            self._first[index] = now_s
        self._last[index] = now_s
        self._tokens[index] += tokens
        if len(self._chunk_times) >= self._most_chunks:
            self._dropped += 1
            return
        self._chunk_times.append(now_s)
        self._chunk_requests.append(index)
        self._chunk_tokens.append(tokens)

    def end(self, index: int, ending: Ending, error: str = "") -> None:
        if ending is Ending.DONE and not self._tokens[index]:
            ending, error = Ending.FAILED, "ended without a token"
        self._ended[index] = self.now_s()
        self._ending[index] = ending
        self._blame(index, error)

    def refuse(self, index: int, error: str) -> None:
        self._blame(index, error)

    def leave(self, _: asyncio.Task[None]) -> None:
        self.in_flight -= 1

    def run(self) -> Run:
        return Run(
            scheduled_s=self._requests.arrival_s,
            sent_s=np.array(self._sent),
            first_token_s=np.array(self._first),
            last_token_s=np.array(self._last),
            ended_s=np.array(self._ended),
            prompt_tokens=self._requests.prompt_tokens,
            tokens=np.array(self._tokens),
            asked_tokens=self._requests.output_tokens,
            ending=np.array(self._ending),
            error=np.array(self._error),
            errors=tuple(self._errors),
            chunks=Chunks(
                np.array(self._chunk_times),
                np.array(self._chunk_requests),
                np.array(self._chunk_tokens),
                self._dropped,
            ),
        )

    def _blame(self, index: int, error: str) -> None:
        """Errors with an id in them differ each time: past some number of different ones they are not told apart."""
        if not error:
            return
        if error not in self._errors and len(self._errors) >= _MOST_ERRORS:
            error = "one of many other errors"
        self._error[index] = self._errors.setdefault(error, len(self._errors))


_MOST_ERRORS = 1000
