"""Measures what an engine's steps cost, by running them: prompts alone, decodes alone, and both in one step.

It drives an `Engine` as a worker does and reads the time between the calls of `on_deltas`, one for each step; so the
engine's own overhead is part of what is measured, as it is of what is served. It knows nothing of latency models
(`latency/profile` fits one) and keeps no file. Its methods block; nothing else may run on the engine meanwhile.
"""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from operator import add
from random import Random

from splitserve.core.errors import EngineError
from splitserve.core.request import SamplingParams
from splitserve.core.worker import DecodeJob, Delta, Outcome
from splitserve.engine.protocol import Engine, EngineInfo
from splitserve.latency.model import PrefillChunk, Step

_LIMIT_S = 600.0  # for one point; beyond that the engine is stuck
_PLUG_TOKENS = 48  # of the prompt that keeps the engine busy while a batch is handed in
_DECODE_STEPS = 12
_WARM_STEPS = 2  # of a decode batch, which are not counted


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to measure: `prompts` prompts of `prompt_tokens` each, beside `decodes` sequences of `context`
    tokens."""

    prompts: int = 0
    prompt_tokens: int = 0
    decodes: int = 0
    context: int = 0

    @property
    def kind(self) -> str:
        if not self.decodes:
            return "prefill"
        return "mixed" if self.prompts else "decode"

    def __str__(self) -> str:
        parts = [f"{self.prompts} x {self.prompt_tokens} prompt tokens"] if self.prompts else []
        parts += [f"{self.decodes} decodes of {self.context} tokens"] if self.decodes else []
        return " + ".join(parts)


@dataclass(frozen=True, slots=True)
class Measured:
    """One engine step of a point, and the seconds that it took: the median of its repeats."""

    point: Point
    step: Step
    seconds: float


def grid(info: EngineInfo, longest: int | None = None) -> tuple[Point, ...]:
    """A grid that covers what the engine can be asked for, up to prompts of `longest` tokens; cheap points first."""
    most = min(info.max_model_len - _DECODE_STEPS - 1, longest or info.max_model_len, _kv_tokens(info) // 2)
    chunk = info.max_batched_tokens
    lengths = _doubling(32, most)
    points = [Point(prompts, tokens) for tokens in lengths for prompts in (1, 2, 4, 8) if prompts * tokens <= chunk]
    points += [Point(1, tokens, 1, 64) for tokens in lengths if tokens > chunk]
    for decodes in _doubling(1, info.max_sequences - 1):
        for context in (64, most // 8, most // 4, most // 2, most - 1):
            if decodes * (context + 2 * _DECODE_STEPS) <= 0.9 * _kv_tokens(info) and decodes * context <= 64 * chunk:
                points.append(Point(0, 0, decodes, context))
    points += _mixed(info, chunk, most)
    unique = dict.fromkeys(points)
    return tuple(sorted(unique, key=lambda point: point.prompts * point.prompt_tokens + point.decodes * point.context))


class Instrument:
    """Measures points on a started engine; `info` is the engine's. To be closed by `with`."""

    def __init__(self, engine: Engine, vocabulary: int, seed: int = 0) -> None:
        self._engine = engine
        self._words = range(min(300, vocabulary // 2), vocabulary)
        self._random = Random(seed)
        self._numbers = count(1)
        self._heard = _Heard()
        self.info = engine.start(self._heard.deltas)

    def __enter__(self) -> "Instrument":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def measure(self, point: Point, repeats: int = 3) -> tuple[Measured, ...]:
        """One step, or for a prompt longer than a step each of its chunks. Raises EngineError if a job fails or nothing
        comes back."""
        run = {"prefill": self._prefill, "decode": self._decode, "mixed": self._mixed}[point.kind]
        runs = [run(point) for _ in range(repeats)]
        medians = (sorted(same, key=lambda each: each.seconds)[repeats // 2] for same in zip(*runs, strict=True))
        return tuple(medians)

    def _prefill(self, point: Point) -> list[Measured]:
        """Prompts that are handed in together between two steps: until the last of them has its token."""
        began, jobs = self._heard.then(self._job(_PLUG_TOKENS, 1), lambda: self._jobs(point, 1), self._engine.submit)
        seconds = max(self._heard.ends(jobs)) - began
        return [Measured(point, Step.of([PrefillChunk(point.prompt_tokens)] * point.prompts), seconds)]

    def _decode(self, point: Point) -> list[Measured]:
        """The median gap between steps in which the whole batch made a token."""
        jobs = self._batch(point)
        self._heard.ends(jobs)
        whole = self._heard.gaps(jobs)[_WARM_STEPS:]
        if not whole:
            raise EngineError(f"{point}: the batch never ran as a whole; its KV does not fit")
        seconds, context = sorted(whole)[len(whole) // 2]
        return [Measured(point, Step(0, 0, 0, point.decodes, context), seconds)]

    def _mixed(self, point: Point) -> list[Measured]:
        """The gaps of a running batch in which a prompt was computed beside it, chunk by chunk."""
        jobs = self._batch(point)
        self._heard.first_tokens(jobs)
        began, (prompt,) = self._heard.then(jobs[-1], lambda: self._jobs(point, 1), self._engine.submit)
        (end,) = self._heard.ends([prompt])
        for job in jobs:
            self._engine.cancel(job)
        self._heard.ends(jobs, cancelled=True)
        return list(self._chunks(point, jobs, began, end))

    def _chunks(self, point: Point, jobs: list[str], began: float, end: float) -> Iterator[Measured]:
        """Each step's tokens as vLLM's scheduler shares them out: the decodes first."""
        budget, done = self.info.max_batched_tokens - len(jobs), 0
        for before, after in pairwise(self._heard.moments(jobs, began, end)):
            tokens = min(budget, point.prompt_tokens - done)
            prompt = Step.of([PrefillChunk(tokens, done)])
            beside = Step(0, 0, 0, len(jobs), self._heard.context(jobs, before))
            yield Measured(point, Step(*map(add, prompt, beside)), after - before)
            done += tokens
        if done != point.prompt_tokens:
            raise EngineError(f"{point}: the running batch ended before the prompt was computed")

    def _batch(self, point: Point) -> list[str]:
        """A running batch whose sequences have about `point.context` tokens while it is measured. Those computed first
        have to wait, decoding, for those computed last."""
        waits = point.decodes * point.context // self.info.max_batched_tokens
        beside = 2 * _DECODE_STEPS + point.prompt_tokens // self.info.max_batched_tokens if point.prompts else 0
        tokens = waits + _WARM_STEPS + _DECODE_STEPS + beside
        length = max(1, min(point.context - tokens // 2, self.info.max_model_len - 1 - tokens))
        jobs = [self._job(length, tokens) for _ in range(point.decodes)]
        for job in jobs:
            self._engine.submit(job)
        return [job.job_id for job in jobs]

    def _jobs(self, point: Point, output_tokens: int) -> list[DecodeJob]:
        return [self._job(point.prompt_tokens, output_tokens) for _ in range(point.prompts)]

    def _job(self, prompt_tokens: int, output_tokens: int) -> DecodeJob:
        job_id = f"measure-{next(self._numbers)}"
        prompt = tuple(self._random.choices(self._words, k=prompt_tokens))
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        self._heard.expect(job_id, prompt_tokens)
        return DecodeJob(job_id, job_id, prompt, sampling, _LIMIT_S)


class _Heard:
    """When each job's tokens came, as the engine's thread says, and what is to be done then. Times are seconds."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._prompt_tokens: dict[str, int] = {}
        self._tokens: dict[str, list[float]] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._next: tuple[str, Callable[[float], None]] | None = None

    def expect(self, job_id: str, prompt_tokens: int) -> None:
        with self._changed:
            self._prompt_tokens[job_id] = prompt_tokens
            self._tokens[job_id] = []

    def deltas(self, deltas: Sequence[Delta]) -> None:
        now, due = time.perf_counter(), None
        with self._changed:
            for delta in deltas:
                self._tokens[delta.job_id].extend([now] * len(delta.token_ids))
                if delta.outcome is not None:
                    self._outcomes[delta.job_id] = delta.outcome
                if self._next is not None and self._next[0] == delta.job_id:
                    (_, due), self._next = self._next, None
            self._changed.notify_all()
        if due is not None:
            due(now)

    def then(
        self, job: DecodeJob | str, jobs: Callable[[], list[DecodeJob]], submit: Callable[[DecodeJob], None]
    ) -> tuple[float, list[str]]:
        """Submits jobs on the engine's thread, right after the next token of `job` (which is submitted first unless it
        runs): so all of them are in the next step. When that was, and their ids."""
        later = jobs()
        done: list[float] = []

        def go(now: float) -> None:
            for each in later:
                submit(each)
            with self._changed:
                done.append(now)
                self._changed.notify_all()

        with self._changed:
            self._next = (job if isinstance(job, str) else job.job_id, go)
        if not isinstance(job, str):
            submit(job)
        self._wait(lambda: bool(done))
        return done[0], [each.job_id for each in later]

    def ends(self, jobs: Sequence[str], cancelled: bool = False) -> list[float]:
        """Waits until all have ended; when the last token of each came out."""
        self._wait(lambda: all(job in self._outcomes for job in jobs))
        for job in jobs:
            outcome = self._outcomes[job]
            if outcome.failure is not None and not cancelled:
                raise EngineError(f"a job that was to be measured failed: {outcome.message}")
        return [self._tokens[job][-1] if self._tokens[job] else 0.0 for job in jobs]

    def first_tokens(self, jobs: Sequence[str]) -> None:
        """Waits until all are running."""
        self._wait(lambda: all(self._tokens[job] or job in self._outcomes for job in jobs))

    def gaps(self, jobs: Sequence[str]) -> list[tuple[float, int]]:
        """Seconds between steps in which all made a token, and the context that they then read, in tokens."""
        whole = set.intersection(*(set(self._tokens[job]) for job in jobs))
        every = sorted(set().union(*(self._tokens[job] for job in jobs)))
        return [
            (later - before, self.context(jobs, before))
            for before, later in pairwise(every)
            if before in whole and later in whole
        ]

    def moments(self, jobs: Sequence[str], began: float, end: float) -> list[float]:
        """When any of these made a token between the two moments, which are among them."""
        return sorted({time_s for job in jobs for time_s in self._tokens[job] if began <= time_s <= end} | {began, end})

    def context(self, jobs: Sequence[str], time_s: float) -> int:
        """Tokens that the step after that moment reads."""
        return sum(self._prompt_tokens[job] + bisect_right(self._tokens[job], time_s) for job in jobs)

    def _wait(self, holds: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(holds, _LIMIT_S):
                raise EngineError(f"the engine made nothing in {_LIMIT_S:g} s; see its log")


def _mixed(info: EngineInfo, chunk: int, most: int) -> Iterator[Point]:
    for decodes in (1, 4, 16, 64):
        for tokens in (16, 64, 256, 1024):  # prompts are read in chunks down to about the smallest
            fits = decodes * (most // 4 + 3 * _DECODE_STEPS) + tokens <= 0.9 * _kv_tokens(info)
            if decodes < info.max_sequences - 1 and tokens + decodes <= min(chunk, most) and fits:
                yield Point(1, tokens, decodes, max(64, most // 4))


def _kv_tokens(info: EngineInfo) -> int:
    return info.total_blocks * info.kv.block_size


def _doubling(first: int, last: int) -> list[int]:
    """first, twice that, ... and last."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return [*values, max(1, last)]
