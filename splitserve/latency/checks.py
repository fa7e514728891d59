"""What is wrong with a table of latencies: more work that costs less, steps that no machine takes. Pure.

A `Finding` is a value, not an error: the model that loaded the table says what it did about it, and reports show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NOISE = 0.02  # repeated measurements of Splitwise's table differ by as much
_JUMP = 0.3


@dataclass(frozen=True, slots=True)
class Finding:
    """`where` in which table, and one sentence: what is wrong and what the model does instead."""

    where: str
    sentence: str


def falls(where: str, axis: str, work: Sequence[float], seconds: Sequence[float], remedy: str) -> tuple[Finding, ...]:
    """Where time falls by more than the noise though work grows."""
    return tuple(
        Finding(
            where,
            f"time falls from {seconds[i] * 1e3:.1f} to {seconds[i + 1] * 1e3:.1f} ms between {axis} {work[i]:g} and "
            f"{work[i + 1]:g}; {remedy}",
        )
        for i in range(len(work) - 1)
        if seconds[i + 1] < seconds[i] * (1 - _NOISE)
    )


def jumps(where: str, axis: str, work: Sequence[float], seconds: Sequence[float]) -> tuple[Finding, ...]:
    """Where time grows by more than 30%, and by a quarter more than the work does."""
    return tuple(
        Finding(
            where,
            f"time jumps from {seconds[i] * 1e3:.1f} to {seconds[i + 1] * 1e3:.1f} ms between {axis} {work[i]:g} and "
            f"{work[i + 1]:g}; kept as measured",
        )
        for i in range(len(work) - 1)
        if seconds[i] > 0 and seconds[i + 1] / seconds[i] > max(1 + _JUMP, 1.25 * work[i + 1] / max(work[i], 1e-9))
    )


def pooled(seconds: Sequence[float]) -> npt.NDArray[np.float64]:
    """The nearest never-falling values in least squares: neighbours that fall are averaged until none does (pool
    adjacent violators: Ayer et al., 1955)."""
    blocks: list[list[float]] = []  # [sum, count]
    for value in seconds:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] > blocks[-1][0] * blocks[-2][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    return np.array([total / count for total, count in blocks for _ in range(int(count))])
