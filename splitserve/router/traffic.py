"""What has come in of late, and how far it is from the workload that the cluster was planned for.

Counted in a `Window`. How far is far, and what follows, is `splitserve plan watch`'s to say.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from splitserve.core.request import Usage
from splitserve.router.window import Window
from splitserve.telemetry.metrics import LENGTH_BUCKETS
from splitserve.workload.drift import Histogram, Tolerance, Traffic, drift
from splitserve.workload.workload import Summary

BOUNDS = (*LENGTH_BUCKETS, float("inf"))  # tokens
_UNKNOWN = float("nan")


@dataclass(frozen=True, slots=True)
class Planned:
    """What a plan file says of the traffic that it is for."""

    workload: Summary
    rate_rps: float


@dataclass(slots=True)
class _Lengths:
    prompts: list[int] = field(default_factory=lambda: [0] * len(BOUNDS))
    outputs: list[int] = field(default_factory=lambda: [0] * len(BOUNDS))


class LiveTraffic:
    """The last five minutes of it."""

    def __init__(self, planned: Planned, clock: Callable[[], float] = time.monotonic) -> None:
        self._planned = planned
        self._window = Window(_Lengths, clock)

    def add(self, usage: Usage) -> None:
        """A request has ended well."""
        slot = self._window.now()
        slot.prompts[bisect_left(BOUNDS, usage.prompt_tokens)] += 1
        slot.outputs[bisect_left(BOUNDS, usage.output_tokens)] += 1

    def drift(self) -> Mapping[str, float]:
        """`rate`: live over planned; `prompt` and `output`: the largest distance between the cumulative shares of live
        and planned lengths (Kolmogorov-Smirnov). NaN while there are too few requests to tell."""
        live = self._traffic()
        if live.prompt.total < Tolerance().requests:
            return {"rate": live.rate_rps / self._planned.rate_rps, "prompt": _UNKNOWN, "output": _UNKNOWN}
        found = drift(self._planned.workload, self._planned.rate_rps, live)
        assert found.prompt is not None
        assert found.output is not None
        return {"rate": found.rate_ratio, "prompt": found.prompt.ks, "output": found.output.ks}

    def _traffic(self) -> Traffic:
        slots, elapsed_s = self._window.recent()
        prompts = [sum(column) for column in zip(*(slot.prompts for slot in slots), strict=True)] or [0] * len(BOUNDS)
        outputs = [sum(column) for column in zip(*(slot.outputs for slot in slots), strict=True)] or [0] * len(BOUNDS)
        return Traffic(sum(prompts) / elapsed_s, Histogram(BOUNDS, tuple(prompts)), Histogram(BOUNDS, tuple(outputs)))
