"""Finished points on disk: one line each, written when it is done, so that a run that was cut short goes on.

What a line keeps of each request is what any SLO is judged by; times are to a tenth of a millisecond.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.goodput.alone import NORMAL, Alone
from splitserve.bench.goodput import Point
from splitserve.core.slo import Timelines

MOST_LATE_S = 0.01  # of the generator, which shares the engines' cores; TTFT objectives are hundreds of milliseconds
_TIMES = ("arrival", "first_token", "last_token", "itl_p99_s")
_COUNTS = ("output_tokens", "prompt_tokens")


@dataclass(frozen=True, slots=True)
class Measured:
    """One system at one rate with one seed. Times of its requests are as if the machine had been as fast as when the
    unit was taken: `slower` is the factor that they were divided by. `cpu_s`: by process, over `wall_s`. `late_p99_s`:
    how late the generator sent."""

    system: str
    step: int
    seed: int
    timelines: Timelines
    slower: float
    slower_after: float
    wall_s: float
    cpu_s: Mapping[str, float]
    late_p99_s: float
    failed: int
    taken: str

    @property
    def doubt(self) -> str:
        """Why it should be taken once more; "" if it need not: the machine kept its speed from before to after, to a
        tenth, and the generator its schedule."""
        if abs(self.slower_after / self.slower - 1.0) > NORMAL:
            return f"the machine went from {self.slower:.2f} to {self.slower_after:.2f} times as slow"
        if self.late_p99_s > MOST_LATE_S:
            return f"the generator was {self.late_p99_s * 1000:.0f} ms late at P99"
        return ""

    def point(self, rate: float) -> Point:
        return Point(rate, self.seed, self.timelines)


class Points:
    """The points of one shape, in a file of their own; the first line is about all of them."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> tuple[dict[str, Alone], list[Measured]]:
        """What a request alone gets on each system, and the points. A last line that a crash cut off is left out."""
        alone: dict[str, Alone] = {}
        points: list[Measured] = []
        for line in self._lines():
            if "alone" in line:
                alone[line["system"]] = Alone(**line["alone"])
            else:
                points.append(_measured(line))
        return alone, points

    def add_alone(self, system: str, alone: Alone) -> None:
        self._append({"system": system, "alone": asdict(alone)})

    def add(self, measured: Measured) -> None:
        fields = {name: getattr(measured, name) for name in Measured.__slots__ if name != "timelines"}
        lines = measured.timelines
        assert lines.itl_p99_s is not None
        times = {name: _rounded(getattr(lines, name)) for name in _TIMES}
        counts = {name: getattr(lines, name).tolist() for name in _COUNTS}
        self._append({**fields, **times, **counts})

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self._file.exists():
            return
        for line in self._file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        whole = self._file.read_bytes() if self._file.exists() else b""
        if whole and not whole.endswith(b"\n"):
            self._file.write_bytes(whole[: whole.rfind(b"\n") + 1])
        with self._file.open("a") as out:
            out.write(json.dumps(line) + "\n")


def _rounded(times: npt.NDArray[np.float64]) -> list[float | None]:
    return [round(float(time), 4) if np.isfinite(time) else None for time in times]


def _measured(line: dict[str, Any]) -> Measured:
    columns: dict[str, Any] = {
        name: np.array([np.inf if time is None else time for time in line.pop(name)]) for name in _TIMES
    }
    counts: dict[str, Any] = {name: np.array(line.pop(name), dtype=np.int64) for name in _COUNTS}
    return Measured(timelines=Timelines(**columns, **counts), **line)
