"""Sends requests when they are due, whether earlier ones are answered or not, and writes down when tokens came back.

A closed loop waits for answers before it sends more, so a slow server is asked less and looks fast. Here the schedule
is fixed in advance, and TTFT counts from when a request was due: a sender that is late does not hide what it did. If
the sender itself can't keep up, in sending or in reading, the run says so (`Run.overloaded`), as its figures are then
the sender's.

A session's later turn is due when the answer before it has ended, and its pause: its user can't reply to what has not
been written. It counts as late, and its TTFT, from then; and it fails, unsent, if the turn before it failed.

One event loop's: `run` returns when every request has ended, and leaves no task behind, however it ends. Whom it sends
to is not its business (see `targets`), nor are objectives (see `core/slo`).
"""

import asyncio
import math
import time
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from splitserve.bench.lag import LoopLag, now_of
from splitserve.bench.run import Chunks, Ending, Run, p99_of_sent
from splitserve.core.collecting import rarely_collecting
from splitserve.core.errors import SplitserveError
from splitserve.workload.requests import Requests

Answer = AsyncGenerator[int, None]
Send = Callable[[int], Answer]
"""Sends the workload's request of that index, and yields the number of tokens of each chunk as it comes. Raises
SplitserveError or OSError if the request fails; anything else ends the run, as it is a defect. Closed early, it cancels
the request. It is called before the request is due, and first asked for a chunk when it is: what it makes at the call,
such as the prompt, makes no request late. A later turn's call follows the answer of the turn before it."""


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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `failed` counts all that ended otherwise than done; `error` is the newest kind of error."""

    at_s: float
    requests: int
    sent: int
    in_flight: int
    done: int
    failed: int
    tokens: int
    late_p99_s: float
    error: str


Watch = Callable[[Progress], None]
"""Told every half second. What it raises ends the run, and it must be quick: nothing is sent meanwhile."""


async def run(
    requests: Requests,
    send: Send,
    limits: Limits | None = None,
    clock: Clock | None = None,
    watch: Watch | None = None,
) -> Run:
    """Sends each request at its arrival, counted from now. Cancelled, it cancels what is in flight first. Raises an
    ExceptionGroup if `send` or `watch` raises what it must not."""
    limits, loop = limits or Limits(), asyncio.get_running_loop()
    clock, cpu_s = clock or Clock(now_of(loop)), time.process_time()
    book = _Book(requests, limits, clock)
    with rarely_collecting(), LoopLag(loop) as lag:
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(_send_all(send, book))
            expiry = group.create_task(_expire(limits.deadline_s, sending, clock))
            telling = group.create_task(_tell(watch, book))
            await asyncio.wait({sending})
            expiry.cancel()
            telling.cancel()
    return book.run(lag.p99_s, time.process_time() - cpu_s)


async def _expire(deadline_s: float, sending: asyncio.Task[None], clock: Clock) -> None:
    if deadline_s < math.inf:
        await clock.sleep(deadline_s)
        sending.cancel()


async def _tell(watch: Watch | None, book: "_Book") -> None:
    while watch is not None:
        await book.clock.sleep(_TELL_S)
        watch(book.progress())


async def _send_all(send: Send, book: "_Book") -> None:
    each = _session if book.has_sessions else _one
    async with asyncio.TaskGroup() as group:
        for index in book.first_turns():
            answer = send(index)
            await book.due(index)
            if book.admit(index):
                group.create_task(each(index, answer, send, book))
                await book.clock.sleep(0.0)  # it is sent before the next one's prompt is made


async def _session(index: int, answer: Answer, send: Send, book: "_Book") -> None:
    """A turn that is due, and those that follow it."""
    await _one(index, answer, send, book)
    while (index := book.next_turn(index)) >= 0:
        answer = send(index)
        await book.due(index)
        if not book.admit(index):
            return
        await _one(index, answer, send, book)


async def _one(index: int, answer: Answer, _: Send, book: "_Book") -> None:
    book.sent(index)
    try:
        async with aclosing(answer) as chunks:
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

    def __init__(self, requests: Requests, limits: Limits, clock: Clock) -> None:
        count = len(requests)
        self.clock, self._start, self._requests = clock, clock.now(), requests
        self._in_flight, self._most = 0, limits.in_flight
        self.has_sessions = requests.follows is not None
        self._next_turn = requests.next_turn.tolist()
        self._pause_s = requests.pause_s.tolist() if requests.pause_s is not None else []
        self._scheduled = array("d", requests.arrival_s.tolist())
        # Plain arrays: writing one number into a numpy array costs several times as much.
        self._sent, self._ended = (array("d", [math.nan]) * count for _ in range(2))
        self._first, self._last = (array("d", [math.inf]) * count for _ in range(2))
        self._tokens = array("q", [0]) * count
        self._ending = array("b", [Ending.NOT_SENT]) * count
        self._error = array("i", [-1]) * count
        self._errors: dict[str, int] = {}
        self._most_chunks, self._dropped = limits.chunks, 0
        self._chunk_times, self._chunk_requests, self._chunk_tokens = array("d"), array("q"), array("q")

    def now_s(self) -> float:
        return self.clock.now() - self._start

    def first_turns(self) -> list[int]:
        follows = self._requests.follows
        return list(range(len(self._requests))) if follows is None else np.flatnonzero(follows < 0).tolist()

    async def due(self, index: int) -> None:
        """Returns when it is. Lets others run in any case. Timers go off up to a millisecond early (uvloop's) or late
        (asyncio's); for what is left, uvloop only lets others run."""
        due_s = self._scheduled[index]
        await self.clock.sleep(max(0.0, due_s - self.now_s() - _ROUGHLY_S))
        while (early_s := due_s - self.now_s()) > _EARLY_S:
            await self.clock.sleep(min(early_s, _NO_TIMER_S))

    def admit(self, index: int) -> bool:
        """Whether it may be sent now."""
        if self._in_flight < self._most:
            self._in_flight += 1
            return True
        self._refuse(index, f"not sent: {self._most} requests were in flight")
        return False

    def next_turn(self, index: int) -> int:
        """The turn that follows one that has ended, which is scheduled now; or -1."""
        following: int = self._next_turn[index]
        if following >= 0:
            self._scheduled[following] = self._ended[index] + self._pause_s[following]
            if self._ending[index] != Ending.DONE:
                self._refuse(following, "not sent: a turn before it failed")
                return -1
        return following

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
        self._in_flight -= 1
        self._blame(index, error)

    def _refuse(self, index: int, error: str) -> None:
        """And the rest of its session, as if each turn had been answered at once."""
        self._blame(index, error)
        while (following := self._next_turn[index]) >= 0:
            self._scheduled[following] = self._scheduled[index] + self._pause_s[following]
            self._blame(following, "not sent: a turn before it failed")
            index = following

    def progress(self) -> Progress:
        sent, ending = np.array(self._sent), np.array(self._ending)
        done, ended = int((ending == Ending.DONE).sum()), int((~np.isnan(self._ended)).sum())
        return Progress(
            at_s=self.now_s(),
            requests=len(self._requests),
            sent=int((~np.isnan(sent)).sum()),
            in_flight=self._in_flight,
            done=done,
            failed=ended - done + int(((ending == Ending.NOT_SENT) & (np.array(self._error) >= 0)).sum()),
            tokens=int(np.array(self._tokens).sum()),
            late_p99_s=p99_of_sent(sent - np.array(self._scheduled)),
            error=next(reversed(self._errors), ""),
        )

    def run(self, lag_p99_s: float, cpu_s: float) -> Run:
        return Run(
            scheduled_s=np.array(self._scheduled),
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
            lag_p99_s=lag_p99_s,
            cpu_s=cpu_s,
        )

    def _blame(self, index: int, error: str) -> None:
        """Errors with an id in them differ each time: past some number of different ones they are not told apart."""
        if not error:
            return
        if error not in self._errors and len(self._errors) >= _MOST_ERRORS:
            error = "one of many other errors"
        self._error[index] = self._errors.setdefault(error, len(self._errors))


_MOST_ERRORS = 1000
_TELL_S = 0.5
_ROUGHLY_S, _EARLY_S = 5e-4, 2e-5
_NO_TIMER_S = 4e-4  # uvloop rounds it to 0 ms
