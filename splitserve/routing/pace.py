"""How fast an engine reads prompts beside its decodes: what it knows of its jobs' objectives, and each step's share.

`Pacer` decides how many prompt tokens the next step computes, by `slack`; the planner's simulated worker asks it too.
`PacedJobs` keeps an engine's account of who made how many tokens since when. Pure state of one engine's thread: no
clock, no I/O, and it knows neither blocks nor queues.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isinf

from splitserve.core.worker import Objectives, Pace
from splitserve.latency.model import Step, StepLatency
from splitserve.routing.lengths import OutputLengths
from splitserve.routing.outlook import prompt_token_s
from splitserve.routing.slack import (
    ITL_MARGIN,
    STEPS_WITHOUT,
    TOO_SHORT,
    URGENT_TOO_SHORT,
    chunk_within,
    due_in_s,
    is_urgent,
    least_chunk,
    slack_of,
)

LEAST_SLOWDOWN, MOST_SLOWDOWN = 0.5, 4.0  # of steps: what lies beyond is taken for a mistake
_NEW_STEP_WEIGHT = 0.05  # of the moving mean of what steps take


@dataclass(frozen=True, slots=True)
class Prompt:
    """The one that is read next: tokens that are left of it and done, and the time until its first token is due."""

    left: int
    done: int
    due_in_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """What decodes in the next step: sequences, and the tokens of context that they read."""

    decodes: int
    context: int


class Pacer:
    """One worker's. `slowdown`: what its steps take of late, as a multiple of what `latency` says."""

    def __init__(self, latency: StepLatency) -> None:
        self._latency = latency
        self._token_s = prompt_token_s(latency)
        self._least_chunk = least_chunk(latency)
        self.least_step_s = latency.step_s(Step(0, 0, 0, 1, 0))
        self._without = 0  # steps in a row in which the decodes left no time for a prompt
        self.slowdown = 1.0

    def step_s(self, batch: Batch) -> float:
        """A step of these decodes alone."""
        return self._latency.step_s(Step(0, 0, 0, batch.decodes, batch.context)) * self.slowdown

    def took(self, step: Step, seconds: float) -> None:
        """What a step took, from when it was begun and the one before had ended."""
        expected_s = self._latency.step_s(step)
        if expected_s > 0.0:
            seen = min(MOST_SLOWDOWN, max(LEAST_SLOWDOWN, seconds / expected_s))
            self.slowdown += _NEW_STEP_WEIGHT * (seen - self.slowdown)

    def chunk(self, prompt: Prompt, batch: Batch, most: int, tpot_s: float, within_s: Callable[[float], float]) -> int:
        """Prompt tokens, up to `most`, that the next step computes beside this batch, of which the tightest objective
        is `tpot_s`. `within_s`: how long it may take if this share of outputs may end too soon to make up for it."""
        alone_s = prompt.left * self._token_s * self.slowdown
        share = URGENT_TOO_SHORT if is_urgent(prompt.due_in_s, alone_s, tpot_s) else TOO_SHORT
        fast_s = within_s(share) / self.slowdown
        fits = chunk_within(self._latency, fast_s, batch.decodes, batch.context, prompt.done, most, self._least_chunk)
        if not fits and self._without >= STEPS_WITHOUT:
            fits = min(self._least_chunk, most)
        self._without = 0 if fits else self._without + 1
        return fits


class PacedJobs:
    """The jobs of one engine, by id; `now` is seconds on the caller's clock."""

    def __init__(self, latency: StepLatency) -> None:
        self.pacer = Pacer(latency)
        self._lengths = OutputLengths()
        self._jobs: dict[str, _Paced] = {}
        self._parked: set[str] = set()  # jobs without a token whose KV comes from elsewhere
        self._bound: dict[str, _Paced] = {}  # decodes with objectives that a step could break
        self._objectives = Counter[float]()  # mean steps that these allow

    def add(self, job_id: str, objectives: Objectives, waits_for_kv: bool, now: float) -> None:
        self._jobs[job_id] = _Paced(objectives, now + objectives.first_token_s)
        if waits_for_kv:
            self._parked.add(job_id)

    def made(self, job_id: str, tokens: int, now: float) -> None:
        """So many output tokens are out by now, the first of them the first that was made here."""
        job = self._jobs[job_id]
        if tokens and isinf(job.first_token_at):
            job.first_token_at = now
            self._parked.discard(job_id)
            if self.pacer.least_step_s < job.objectives.step_s < inf:  # one that no step keeps must slow nobody
                self._bound[job_id] = job
                self._objectives[job.objectives.step_s] += 1
        job.made = tokens

    def end(self, job_id: str, output_tokens: int = 0) -> None:
        """The job is over. `output_tokens`: of its whole output, if that has its end. Jobs without objectives say
        nothing about the outputs of others."""
        job = self._jobs.pop(job_id)
        self._parked.discard(job_id)
        bound = self._bound.pop(job_id, None)
        if bound is not None:
            self._objectives -= Counter((bound.objectives.step_s,))  # which leaves no zeros
        if output_tokens and not isinf(job.objectives.step_s):
            self._lengths.add(output_tokens)

    @property
    def parked(self) -> int:
        """Jobs that wait for KV, or have it and no token yet."""
        return len(self._parked)

    @property
    def tpot_s(self) -> float:
        """The tightest mean step that the decodes' objectives allow; infinite if none has one."""
        return min(self._objectives, default=inf)

    def chunk(self, job_id: str, left: int, done: int, batch: Batch, most: int, now: float) -> int:
        """Prompt tokens, up to `most`, that the next step computes beside this batch. `job_id`: whose prompt is read
        next, of which so many tokens are left, and done."""
        tpot_s = self.tpot_s
        if not batch.decodes or isinf(tpot_s):
            return most
        step_s = self.pacer.step_s(batch)

        def within_s(share: float) -> float:
            return min(self._slack_s(step_s, share, now, job_id), self._first_tokens_within_s(step_s, now))

        job = self._jobs.get(job_id)
        prompt = Prompt(left, done, job.due - now if job is not None else inf)
        return self.pacer.chunk(prompt, batch, most, tpot_s, within_s)

    def pace(self, batch: Batch, now: float) -> Pace:
        """What routers are told."""
        if not self._bound:
            return Pace(slowdown=self.pacer.slowdown)
        return Pace(self.tpot_s, self._slack_s(self.pacer.step_s(batch), TOO_SHORT, now), self.pacer.slowdown)

    def _slack_s(self, step_s: float, share: float, now: float, reads: str = "") -> float:
        """How long the next step may take for every decode to keep its objectives, but for a `share` of them whose
        outputs may turn out too short; infinite if none has any. `step_s`: what a step without prompts takes. `reads`:
        the job whose tokens are read; if it was preempted, its own objectives speak for that."""
        least_s = inf
        running = 0 if self._lengths.known else sum(job.made for job in self._bound.values())
        for job_id, job in self._bound.items():
            if job_id == reads:
                continue
            allowed_s, since_first_s = job.objectives.step_s, now - job.first_token_at
            least_s = min(least_s, job.objectives.itl_s * ITL_MARGIN)
            if due_in_s(since_first_s, job.made, allowed_s) < least_s:  # what is still to come only adds to that
                slack_s = slack_of(since_first_s, job.made, allowed_s, step_s, self._lengths, share, running)
                least_s = min(least_s, slack_s)
        return least_s

    def _first_tokens_within_s(self, step_s: float, now: float) -> float:
        """How long a step may keep those waiting whose KV comes from elsewhere: their first token takes another step,
        of `step_s`. Who is late already keeps nobody waiting."""
        left = (self._jobs[job_id].due - now for job_id in self._parked)
        return min((left_s - step_s for left_s in left if left_s > step_s), default=inf)


@dataclass(slots=True)
class _Paced:
    """A job: when its first token is due, when it was made, and how many there are."""

    objectives: Objectives
    due: float
    first_token_at: float = inf
    made: int = 0
