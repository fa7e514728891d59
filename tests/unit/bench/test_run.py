"""A run's arithmetic, against cases worked out by hand."""

import numpy as np
import pytest

from splitserve.bench.run import Chunks, Ending, Run
from splitserve.core.slo import Slo, Timeline

# Of each request: when it was due, and when which number of its tokens came.
SAID: list[tuple[float, list[tuple[float, int]]]] = [
    (0.0, [(0.5, 1), (0.6, 1), (0.9, 2), (1.0, 1)]),  # gaps 0.1, 0.3, 0 (one chunk), 0.1
    (0.2, [(1.2, 3)]),  # all at once
    (0.3, []),  # none
    (1.0, [(1.5, 1), (2.5, 1)]),
]


def made(said: list[tuple[float, list[tuple[float, int]]]] = SAID) -> Run:
    chunks = sorted((time, row, tokens) for row, (_, came) in enumerate(said) for time, tokens in came)
    times, rows, tokens = (np.array(column) for column in zip(*chunks, strict=True))
    due = np.array([due for due, _ in said])
    counts = np.array([sum(tokens for _, tokens in came) for _, came in said])
    return Run(
        scheduled_s=due,
        sent_s=due,
        first_token_s=np.array([came[0][0] if came else np.inf for _, came in said]),
        last_token_s=np.array([came[-1][0] if came else np.inf for _, came in said]),
        ended_s=np.array([came[-1][0] if came else due + 1.0 for due, came in said]),
        prompt_tokens=np.arange(len(said)) * 100,
        tokens=counts,
        asked_tokens=counts,
        ending=np.array([Ending.DONE if came else Ending.FAILED for _, came in said], dtype=np.int8),
        error=np.full(len(said), -1, dtype=np.int32),
        errors=(),
        chunks=Chunks(times, rows, tokens),
    )


def test_ttft_tpot_and_the_99th_gap_are_what_a_hand_works_out() -> None:
    lines = made().timelines
    assert lines.ttft_s == pytest.approx([0.5, 1.0, np.inf, 0.5])
    assert lines.tpot_s == pytest.approx([0.125, 0.0, np.inf, 1.0])
    assert lines.itl_p99_s == pytest.approx([0.3, 0.0, np.inf, 1.0])


def test_a_run_and_single_timelines_are_judged_alike() -> None:
    rng = np.random.default_rng(1)
    said = []
    for row in range(50):
        sizes = rng.integers(1, 5, rng.integers(1, 150))
        said.append((float(row), list(zip(row + np.cumsum(rng.exponential(0.02, len(sizes))), sizes, strict=True))))
    lines = made(said).timelines
    for row, (due, came) in enumerate(said):
        tokens = tuple(float(time) for time, count in came for _ in range(count))
        alone = Timeline(due, tokens, prompt_tokens=row * 100)
        assert lines.itl_p99_s is not None
        assert lines.itl_p99_s[row] == pytest.approx(alone.itl_p99_s)
        slo = Slo(0.01, 0.02, ttft_per_token_s=1e-5, itl_p99_s=0.08)
        assert lines.met(slo)[row] == slo.met_by(alone)


def test_the_requests_of_the_warm_up_are_left_out_with_their_chunks() -> None:
    rest = made().after(0.25)
    assert rest.scheduled_s.tolist() == [0.3, 1.0]
    assert rest.prompt_tokens.tolist() == [200, 300]
    assert (rest.chunks.request.tolist(), rest.chunks.time_s.tolist()) == ([1, 1], [1.5, 2.5])
    assert rest.timelines.itl_p99_s == pytest.approx([np.inf, 1.0])


def test_without_every_chunk_gaps_are_not_guessed() -> None:
    whole = made()
    cut = Run(**{**{name: getattr(whole, name) for name in Run.__slots__}, "chunks": Chunks(*whole_log(whole), 1)})
    assert cut.timelines.itl_p99_s is None


def whole_log(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return run.chunks.time_s, run.chunks.request, run.chunks.tokens
