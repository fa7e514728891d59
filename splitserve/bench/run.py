"""What a run of the load generator brought back, as columns: a row per request, and a log of chunks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from splitserve.core.slo import Timelines, rank_of_p99

Seconds = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class Ending(IntEnum):
    """How a request ended. All but the first count as failed."""

    DONE = 0
    FAILED = 1  # by an error, or without a token
    CUT_OFF = 2  # by the run's deadline
    NOT_SENT = 3  # the deadline came first, too many were in flight, or a turn before it failed


@dataclass(frozen=True, slots=True)
class Record:
    """One request's row. NaN or inf where something never happened."""

    scheduled_s: float
    sent_s: float
    first_token_s: float
    ended_s: float
    prompt_tokens: int
    tokens: int
    ending: Ending
    error: str


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """In the order they came: when, of which request, and how many tokens. `dropped` more came, that were not kept."""

    time_s: Seconds
    request: Counts
    tokens: Counts
    dropped: int = 0

    def gaps_s(self) -> Seconds:
        """Between each chunk and the one before it of the same request. What ITL can be seen from outside: tokens of
        one chunk come at once."""
        return self._gaps()[1]

    def longest_gaps_s(self, ranks: Counts) -> Seconds:
        """Of each request, its gap of that rank, the longest being 1; 0 where it has not so many: the gaps that are
        not there are between tokens of one chunk."""
        owner, gaps = self._gaps()
        owner, gaps = (column[np.lexsort((-gaps, owner))] for column in (owner, gaps))
        starts = np.searchsorted(owner, np.arange(len(ranks)))
        found = starts + ranks - 1
        has = (ranks > 0) & (found < np.searchsorted(owner, np.arange(len(ranks)), side="right"))
        longest = np.zeros(len(ranks))
        longest[has] = gaps[found[has]]
        return longest

    def _gaps(self) -> tuple[Counts, Seconds]:
        """Of which request each gap is, and how long, request by request."""
        order = np.argsort(self.request, kind="stable")
        same = np.diff(self.request[order]) == 0
        return self.request[order][1:][same], np.asarray(np.diff(self.time_s[order])[same])

    def only(self, requests: Counts) -> "Chunks":
        """Those of the given requests, which are numbered anew in that order."""
        number = np.full(max(int(self.request.max(initial=-1)), int(requests.max(initial=-1))) + 1, -1)
        number[requests] = np.arange(len(requests))
        request = number[self.request]
        kept = request >= 0
        return Chunks(self.time_s[kept], request[kept], self.tokens[kept], self.dropped)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Times are seconds from the run's start. `sent_s` is NaN for a request that was not sent; `first_token_s` and
    `last_token_s` are inf without a token, `ended_s` is NaN for a request that was not sent. `scheduled_s` is when each
    was due; of a session's turn that never was, when it would have been if answers took no time."""

    scheduled_s: Seconds
    sent_s: Seconds
    first_token_s: Seconds
    last_token_s: Seconds
    ended_s: Seconds
    prompt_tokens: Counts
    tokens: Counts
    asked_tokens: Counts
    ending: npt.NDArray[np.int8]
    error: npt.NDArray[np.int32]  # index into `errors`, or -1
    errors: tuple[str, ...]
    chunks: Chunks
    late_s: float = 0.002  # a request sent later than that after it was due was sent late
    late_share: float = 0.01  # of requests that may be late before the sender counts as overloaded
    lag_p99_s: float = 0.0  # what 99% of all moments waited at most until the sender's event loop saw what came
    cpu_s: float = 0.0  # the sender's process used, all its threads

    def __len__(self) -> int:
        return len(self.scheduled_s)

    def __iter__(self) -> Iterator[Record]:
        return (self.record(index) for index in range(len(self)))

    def record(self, index: int) -> Record:
        error = int(self.error[index])
        return Record(
            scheduled_s=float(self.scheduled_s[index]),
            sent_s=float(self.sent_s[index]),
            first_token_s=float(self.first_token_s[index]),
            ended_s=float(self.ended_s[index]),
            prompt_tokens=int(self.prompt_tokens[index]),
            tokens=int(self.tokens[index]),
            ending=Ending(int(self.ending[index])),
            error=self.errors[error] if error >= 0 else "",
        )

    @property
    def timelines(self) -> Timelines:
        """What `core.slo` judges: TTFT counts from when a request was due, and one that did not end well has no last
        token."""
        done = self.ending == Ending.DONE
        return Timelines(
            self.scheduled_s,
            self.first_token_s,
            np.where(done, self.last_token_s, np.inf),
            self.tokens,
            self.prompt_tokens,
            None if self.chunks.dropped else np.where(done, self._itl_p99_s(), np.inf),
        )

    def _itl_p99_s(self) -> Seconds:
        gaps = np.maximum(self.tokens - 1, 0)
        return self.chunks.longest_gaps_s(gaps - rank_of_p99(gaps) + 1)

    def only(self, requests: Counts) -> "Run":
        """Those requests' rows and chunks, in that order; times stay as they are."""
        columns = {name: getattr(self, name)[requests] for name in _COLUMNS}
        return replace(self, **columns, chunks=self.chunks.only(requests))

    def after(self, warm_up_s: float) -> "Run":
        """Without the requests that were due in the first seconds, when caches and queues were still empty."""
        return self.only(np.flatnonzero(self.scheduled_s >= warm_up_s))

    @property
    def lateness_s(self) -> Seconds:
        """How long after it was due each request was sent; NaN for those that were not."""
        return self.sent_s - self.scheduled_s

    @property
    def late_p99_s(self) -> float:
        """Of the requests that were sent; 0 if none was."""
        return p99_of_sent(self.lateness_s)

    @property
    def share_late(self) -> float:
        """Of the requests that were sent."""
        sent = self.lateness_s[~np.isnan(self.sent_s)]
        return float((sent > self.late_s).mean()) if len(sent) else 0.0

    @property
    def overloaded(self) -> bool:
        """The sender itself could not keep up: the run measures this machine, not the cluster, and is invalid."""
        return bool(self.overload)

    @property
    def overload(self) -> str:
        """What the sender could not keep up with, as a sentence; empty if it could."""
        if self.share_late > self.late_share:
            late_ms, share = f"{1e3 * self.late_s:g} ms", f"{self.share_late:.1%}"
            return f"{share} of the requests were sent more than {late_ms} after they were due"
        if self.lag_p99_s > self.late_s:
            return f"tokens were read up to {1e3 * self.lag_p99_s:.3g} ms late at 99% of all moments"
        return ""

    @property
    def short(self) -> int:
        """Requests that ended well with another number of tokens than asked for: the load was not the one planned."""
        return int(((self.ending == Ending.DONE) & (self.tokens != self.asked_tokens)).sum())

    def count(self, ending: Ending) -> int:
        return int((self.ending == ending).sum())


def p99_of_sent(lateness_s: Seconds) -> float:
    """NaN stands for a request that was not sent; 0 if none was."""
    sent = lateness_s[~np.isnan(lateness_s)]
    return float(np.quantile(sent, 0.99)) if len(sent) else 0.0


_COLUMNS = (
    "scheduled_s",
    "sent_s",
    "first_token_s",
    "last_token_s",
    "ended_s",
    "prompt_tokens",
    "tokens",
    "asked_tokens",
    "ending",
    "error",
)
