"""A started engine behind a worker's own account of its memory, and a queue: what serves requests without a router.

What the account can't tell is what a worker can't either: how long an output will be. Requests go in order of arrival,
each as soon as the account takes it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from splitserve.core.errors import EngineError
from splitserve.core.request import SamplingParams
from splitserve.core.slo import Timelines
from splitserve.core.worker import DecodeJob, Delta
from splitserve.engine.protocol import Engine, EngineInfo
from splitserve.routing.admission import Capacity
from splitserve.workload.requests import Requests

DEADLINE_S = 600.0
SAY_S = 5.0


class ByWhatIsHeld(Capacity):
    """Takes whatever fits in the blocks that are free now."""

    def _growth_blocks(self) -> int:
        return 0


class EngineQueue:
    """`engine` is not started yet. To be closed by `with`."""

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        self._engine, self._vocabulary = engine, vocabulary
        self._changed = threading.Condition()
        self._heard: deque[tuple[float, Sequence[Delta]]] = deque()
        self.info: EngineInfo = engine.start(self._hear)

    def __enter__(self) -> "EngineQueue":
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def serve(
        self, requests: Requests, seed: int, account: type[Capacity], say: Callable[[str], None]
    ) -> tuple[Timelines, int]:
        """What came of them, and how many preemptions that took. Raises EngineError if one fails."""
        info, random, before = self.info, Random(seed), self._engine.load().preemptions
        capacity = account(
            info.total_blocks, info.kv.block_size, info.max_sequences, info.max_model_len, info.max_batched_tokens
        )
        waiting: deque[DecodeJob] = deque()
        first, last = np.full(len(requests), np.inf), np.full(len(requests), np.inf)
        began, come, ended, said = time.monotonic(), 0, 0, 0.0
        while ended < len(requests):
            now = time.monotonic() - began
            while come < len(requests) and requests.arrival_s[come] <= now:
                prompt = tuple(random.choices(range(self._vocabulary), k=int(requests.prompt_tokens[come])))
                waiting.append(_job(come, prompt, int(requests.output_tokens[come])))
                come += 1
            while waiting and capacity.admit(_as_a_worker_sees_it(waiting[0], info.max_model_len)) is None:
                self._engine.submit(waiting.popleft())
            if now > said:
                say(f"{now:5.0f} s: {come} came, {len(waiting)} wait, {ended} of {len(requests)} ended")
                said = now + SAY_S
            until_next_s = requests.arrival_s[come] - now if come < len(requests) else DEADLINE_S
            for at, deltas in self._news(until_next_s):
                for delta in deltas:
                    row = int(delta.job_id)
                    if delta.token_ids:
                        first[row] = min(first[row], at - began)
                        last[row] = at - began
                    ended += _booked(capacity, delta)
        outputs = requests.output_tokens
        lines = Timelines(requests.arrival_s, first, last, outputs, requests.prompt_tokens)
        return lines, self._engine.load().preemptions - before

    def _hear(self, deltas: Sequence[Delta]) -> None:
        with self._changed:
            self._heard.append((time.monotonic(), deltas))
            self._changed.notify_all()

    def _news(self, within_s: float) -> list[tuple[float, Sequence[Delta]]]:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._heard), within_s)
            news = list(self._heard)
            self._heard.clear()
        return news


def _booked(capacity: Capacity, delta: Delta) -> bool:
    """Whether it is the job's last."""
    capacity.progressed(delta.job_id, len(delta.token_ids))
    if delta.outcome is None:
        return False
    if delta.outcome.failure is not None:
        raise EngineError(f"request {delta.job_id} failed: {delta.outcome.message}")
    capacity.ended(delta.job_id, finished=True)
    return True


def _job(row: int, prompt: tuple[int, ...], output_tokens: int) -> DecodeJob:
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    return DecodeJob(str(row), str(row), prompt, sampling, DEADLINE_S)


def _as_a_worker_sees_it(job: DecodeJob, longest: int) -> DecodeJob:
    return replace(job, sampling=replace(job.sampling, max_tokens=longest - len(job.prompt)))
