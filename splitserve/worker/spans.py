"""The spans of the jobs that run here: from taken to its outcome.

What the engine does in between is its own to tell: of vLLM, its own spans, which become children of these. The engine's
protocol says when a job's first token and its end come, and no more. State of the worker's event loop; holds only jobs
that are traced, so that for a worker without tracing a step costs one look.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from splitserve.core.worker import Delta, Job
from splitserve.telemetry import traces


@dataclass(slots=True)
class _Open:
    span: traces.Span
    tokens: int = 0


class JobSpans:
    def __init__(self, tracer: traces.Tracer) -> None:
        self._tracer = tracer
        self._open: dict[str, _Open] = {}

    def taken(self, job: Job, worker: str) -> Job:
        """Begins the job's span, if its request is traced. Returns the job as the engine is to have it: what that
        traces is within."""
        span = self._tracer.job(job, worker)
        if not span.recorded:
            return job
        self._open[job.job_id] = _Open(span)
        return replace(job, traceparent=span.traceparent)

    def step(self, deltas: Sequence[Delta]) -> None:
        """What one engine step made."""
        if not self._open:
            return
        for delta in deltas:
            open_ = self._open.get(delta.job_id)
            if open_ is not None:
                self._hear(delta, open_)

    def close(self) -> None:
        """The engine is closed: what has not ended will not."""
        while self._open:
            _, open_ = self._open.popitem()
            open_.span.fail("closed", "the worker's process ended")

    def _hear(self, delta: Delta, open_: _Open) -> None:
        if delta.token_ids and not open_.tokens:
            open_.span.event(traces.FIRST_TOKEN, traces.nothing)
        open_.tokens += len(delta.token_ids)
        if delta.outcome is not None:
            del self._open[delta.job_id]
            traces.end_job(open_.span, delta.outcome, open_.tokens)
