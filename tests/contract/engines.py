"""What the contract suite needs of engines under test: started, listened to, and paired by tickets."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, Delta, Job, Outcome, PrefillJob, Ticket, TransferEnd
from splitserve.engine.protocol import Engine, EngineInfo, EngineLoad

TIMEOUT_S = 60.0
_numbers = count(1)

Order = Callable[["Run"], None]
Orders = dict[int, Order]  # what to do once a job has made so many tokens


def eventually(holds: Callable[[], bool], what: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """For state that nobody announces. Fails showing `what()`."""
    deadline, never = time.monotonic() + timeout_s, threading.Event()
    while not holds():
        assert time.monotonic() < deadline, what()
        never.wait(0.002)


@dataclass(eq=False)
class Run:
    """One job's deltas as they come."""

    job: Job
    changed: threading.Condition
    deltas: list[Delta] = field(default_factory=list)
    orders: Orders = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return bool(self.deltas) and self.deltas[-1].outcome is not None

    def wait(self) -> "Run":
        return self.wait_until(lambda: self.ended)

    def wait_tokens(self, tokens: int) -> "Run":
        return self.wait_until(lambda: self.ended or len(self.tokens) >= tokens)

    def wait_news(self) -> "Run":
        return self.wait_until(lambda: bool(self.deltas))

    def wait_until(self, holds: Callable[[], bool]) -> "Run":
        with self.changed:
            assert self.changed.wait_for(holds, TIMEOUT_S), f"{self.job.job_id} got {self.deltas}"
        return self

    def due(self) -> list[Order]:
        """Takes the orders whose time has come."""
        return [self.orders.pop(tokens) for tokens in sorted(self.orders) if tokens <= len(self.tokens)]

    @property
    def outcome(self) -> Outcome:
        self.wait()
        outcome = self.deltas[-1].outcome
        assert outcome is not None
        return outcome

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for delta in self.deltas for token in delta.token_ids)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    def text_before(self, index: int) -> str:
        """What a client has that was sent this many tokens."""
        return "".join(delta.text for delta in self.deltas if delta.index + len(delta.token_ids) <= index)


class Listener:
    """One engine, and what it says of each job."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._runs: dict[str, Run] = {}
        self.transfers: list[TransferEnd] = []
        self.info: EngineInfo = engine.start(self._hear, self.transfers.append)
        self.at_rest: EngineLoad = engine.load()

    def submit(self, job: Job, orders: Orders | None = None) -> Run:
        """Orders are carried out on the engine's own thread, between two steps."""
        run = self._runs[job.job_id] = Run(job, self._changed, orders=dict(orders or {}))
        self.engine.submit(job)
        return run

    def wait_at_rest(self) -> None:
        """All blocks are back."""
        eventually(lambda: self.engine.load() == self.at_rest, lambda: (self.engine.load(), self.at_rest))

    def _hear(self, deltas: Sequence[Delta]) -> None:
        with self._changed:
            for delta in deltas:
                run = self._runs[delta.job_id]
                assert not run.ended, f"{delta} after the outcome"
                run.deltas.append(delta)
            self._changed.notify_all()
            due = [(run, call) for run in {self._runs[delta.job_id] for delta in deltas} for call in run.due()]
        for run, call in due:
            call(run)


class Bench(Protocol):
    """The engines under test: a source and a destination of KV, and one that serves alone, all alike; only the lease of
    the last is short."""

    source: Listener
    destination: Listener
    alone: Listener
    vocabulary: range  # of ordinary tokens

    def corrupting(self) -> AbstractContextManager[object]:
        """While it lasts, KV arrives damaged and nobody is told."""


@contextmanager
def started(engine: Engine) -> Iterator[Listener]:
    try:
        yield Listener(engine)
    finally:
        engine.close()


def a_prompt(vocabulary: range, tokens: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(vocabulary, k=tokens))


def a_ticket(source: Listener, destination: Listener) -> Ticket:
    return Ticket(f"transfer-{next(_numbers)}", 1, source.info.kv_peers, destination.info.kv_peers)


def a_prefill(prompt: Sequence[int], ticket: Ticket) -> PrefillJob:
    return PrefillJob(f"job-{next(_numbers)}", "request", tuple(prompt), ticket, TIMEOUT_S)


def a_decode(
    prompt: Sequence[int], sampling: SamplingParams, ticket: Ticket | None = None, output: Sequence[int] = ()
) -> DecodeJob:
    job_id = f"job-{next(_numbers)}"
    return DecodeJob(job_id, "request", tuple(prompt), sampling, TIMEOUT_S, tuple(output), ticket)


def greedy(tokens: int, **others: object) -> SamplingParams:
    sampling = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **others}
    return SamplingParams(**sampling)  # type: ignore[arg-type]


def served_alone(bench: Bench, prompt: tuple[int, ...], sampling: SamplingParams) -> Run:
    return bench.alone.submit(a_decode(prompt, sampling)).wait()
