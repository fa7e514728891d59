"""What is asked: the shapes of requests and the grid of objectives, in multiples of what a request alone gets."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.goodput.alone import Alone
from splitserve.core.slo import Slo
from splitserve.workload.arrivals import rescaled
from splitserve.workload.named import workload
from splitserve.workload.requests import Requests

ATTAINMENT = 0.9
TTFT_TIMES, TPOT_TIMES, ITL_TIMES = (2, 5, 10), (2, 3, 5), (3, 5, 10)
RATE_STEP = 1.1
LONGEST_TOKENS = 3072
WARM_UP_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class Shape:
    """`workload` as on the command line; `start_rps` is where the search for rates begins."""

    name: str
    workload: str
    start_rps: float

    @property
    def mean_prompt_tokens(self) -> int:
        return int(workload(self.workload).mean_prompt_tokens)

    def requests(self, rate_rps: float, count: int, seed: int) -> Requests:
        """The warm-up's and `count` more; the same ones at every rate, arrivals stretched to exactly that rate."""
        drawn = workload(self.workload).draw(WARM_UP_REQUESTS + count, rate_rps, seed)
        return Requests(rescaled(drawn.arrival_s, rate_rps), drawn.prompt_tokens, drawn.output_tokens)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("balanced", f"lognormal:prompt=750,output=130,sigma=0.4,limit={LONGEST_TOKENS}", 2.5),
        Shape("prefill-heavy", f"lognormal:prompt=1200,output=40,sigma=0.4,limit={LONGEST_TOKENS}", 2.5),
        Shape("decode-heavy", f"lognormal:prompt=250,output=250,sigma=0.4,limit={LONGEST_TOKENS}", 2.5),
    )
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One SLO of the grid, in multiples of the unloaded values; an objective that is not set is infinite."""

    ttft_times: int
    tpot_times: float = math.inf
    itl_times: float = math.inf

    def slo(self, alone: Alone) -> Slo:
        return Slo(
            ttft_s=self.ttft_times * alone.ttft_s,
            ttft_per_token_s=self.ttft_times * alone.ttft_per_token_s,
            tpot_s=self.tpot_times * alone.tpot_s,
            itl_p99_s=self.itl_times * alone.tpot_s,
            attainment=ATTAINMENT,
        )

    def __str__(self) -> str:
        second = f"TPOT {self.tpot_times:g}x" if np.isfinite(self.tpot_times) else f"P99 ITL {self.itl_times:g}x"
        return f"TTFT {self.ttft_times}x, {second}"


TPOT_CELLS = tuple(Cell(ttft, tpot_times=tpot) for tpot in TPOT_TIMES for ttft in TTFT_TIMES)
ITL_CELLS = tuple(Cell(ttft, itl_times=itl) for itl in ITL_TIMES for ttft in TTFT_TIMES)
CELLS = (*TPOT_CELLS, *ITL_CELLS)
DIAGONAL = tuple(Cell(ttft, tpot_times=tpot) for ttft, tpot in zip(TTFT_TIMES, TPOT_TIMES, strict=True))


def rate_rps(step: int) -> float:
    """Rates are steps of 10%: 0 is one request per second."""
    return float(RATE_STEP**step)


def step_of(rate: float) -> int:
    """The nearest."""
    return round(math.log(rate, RATE_STEP))


def rows(cells: tuple[Cell, ...]) -> Iterator[tuple[Cell, ...]]:
    """As they stand in a table: TTFT grows along a row."""
    width = len(TTFT_TIMES)
    yield from (cells[start : start + width] for start in range(0, len(cells), width))
