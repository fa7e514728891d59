"""A function known at points: straight lines between them, the outer lines going on outside. Pure values.

Built from values that never fall, so it never falls; `checks.pooled` makes them so.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Curve:
    """`of(x)` = at[i] + slope[i] * (x - starts[i]) in the piece that x is in. Left of the first point it is level."""

    starts: tuple[float, ...]
    at: tuple[float, ...]
    slope: tuple[float, ...]

    @classmethod
    def through(cls, xs: Sequence[float], ys: Sequence[float]) -> "Curve":
        """xs rise, ys never fall; at least one point."""
        assert len(xs) == len(ys) > 0
        slopes = [(ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i]) for i in range(len(xs) - 1)] or [0.0]
        assert min(slopes) >= 0
        assert all(a < b for a, b in pairwise(xs))
        last = slopes[-1]
        return cls(
            (float("-inf"), *map(float, xs)),
            (float(ys[0]), *map(float, ys)),
            (0.0, *map(float, slopes[: len(xs) - 1]), float(last)),
        )

    def of(self, x: float) -> float:
        starts = self.starts
        piece = bisect_right(starts, x) - 1
        return self.at[piece] + self.slope[piece] * (x - starts[piece]) if piece else self.at[0]
