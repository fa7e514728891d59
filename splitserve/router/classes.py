"""SLO classes: what a request of each is to meet, who goes first, and how many did of late.

Counted in a `Window`; of the last minute each output's times are kept too. What an objective and a percentile mean is
`core/slo`'s; what follows from one is `routing`'s.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from splitserve.core.config import DEFAULT_CLASS, Late, SloClass
from splitserve.core.fleet import ClassStatus, Percentiles, RecentOutputs
from splitserve.core.slo import Slo, percentile
from splitserve.core.worker import Objectives
from splitserve.router.window import Window
from splitserve.routing.lengths import FIRST, OutputLengths

RECENT_S = 60.0
MOST_RECENT = 10_000  # outputs of a class that are kept: those of a minute at 160 a second, else the newest


@dataclass(frozen=True, slots=True)
class Class:
    """One SLO class. `refuses`: requests that would be late."""

    name: str
    slo: Slo
    priority: int = 0
    refuses: bool = False

    def objectives(self, first_token_s: float) -> Objectives:
        """Of a job whose first token is due in so long."""
        return Objectives(first_token_s, self.slo.tpot_s, self.slo.itl_p99_s)


@dataclass(slots=True)
class _Judged:
    ended: dict[str, int] = field(default_factory=dict)
    met: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Output:
    """One that has ended. Times are None where it did not finish, and TPOT where it has a single token."""

    at: float
    met: bool
    ttft_s: float | None
    tpot_s: float | None


class _Recent:
    """One class's outputs of the last minute."""

    def __init__(self) -> None:
        self._outputs: deque[_Output] = deque(maxlen=MOST_RECENT)

    def add(self, output: _Output) -> None:
        self._outputs.append(output)
        self._forget(output.at)

    def status(self, now: float) -> RecentOutputs:
        self._forget(now)
        outputs = self._outputs
        return RecentOutputs(
            ended=len(outputs),
            met=sum(each.met for each in outputs),
            ttft=_percentiles(each.ttft_s for each in outputs),
            tpot=_percentiles(each.tpot_s for each in outputs),
        )

    def _forget(self, now: float) -> None:
        while self._outputs and self._outputs[0].at < now - RECENT_S:
            self._outputs.popleft()


class SloClasses:
    """The router's own; `of` raises KeyError for a name that `names` lacks."""

    def __init__(self, settings: Mapping[str, SloClass], clock: Callable[[], float] = time.monotonic) -> None:
        self._classes = {name: _class(name, said) for name, said in settings.items()}
        self._classes.setdefault(DEFAULT_CLASS, _class(DEFAULT_CLASS, SloClass()))
        self._clock = clock
        self._window = Window(_Judged, clock)
        self._recent = {name: _Recent() for name in self._classes}
        self._lengths = {name: OutputLengths() for name in self._classes}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def of(self, name: str) -> Class:
        return self._classes[name]

    def ended(
        self,
        name: str,
        met: bool,
        output_tokens: int = 0,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
    ) -> None:
        """An output of this class has ended; `output_tokens` and its times if it has all of them."""
        slot = self._window.now()
        slot.ended[name] = slot.ended.get(name, 0) + 1
        slot.met[name] = slot.met.get(name, 0) + met
        self._recent[name].add(_Output(self._clock(), met, ttft_s, tpot_s))
        if output_tokens:
            self._lengths[name].add(output_tokens)

    def output_tokens(self, name: str, made: int, most: int) -> int:
        """How many more an output of this class is expected to have, of which `made` are out, and `most` may follow."""
        return max(1, min(most, self._lengths[name].remaining(made, 0.5) or FIRST))

    def status(self) -> tuple[ClassStatus, ...]:
        """Of the last five minutes, and of the last one."""
        slots, over_s = self._window.recent()
        return tuple(self._status(each, slots, over_s) for each in self._classes.values())

    def _status(self, each: Class, slots: list[_Judged], over_s: float) -> ClassStatus:
        ended = sum(slot.ended.get(each.name, 0) for slot in slots)
        met = sum(slot.met.get(each.name, 0) for slot in slots)
        slo = each.slo
        objectives = slo.ttft_s, slo.ttft_per_token_s, slo.tpot_s, slo.itl_p99_s
        last_minute = self._recent[each.name].status(self._clock())
        return ClassStatus(each.name, *objectives, ended, met, met / over_s, last_minute)


def _percentiles(times_s: Iterable[float | None]) -> Percentiles:
    ordered = sorted(each for each in times_s if each is not None)
    if not ordered:
        return Percentiles()
    return Percentiles(percentile(ordered, 50), percentile(ordered, 90), percentile(ordered, 99))


def _class(name: str, said: SloClass) -> Class:
    slo = Slo(
        ttft_s=said.ttft_s or inf,
        tpot_s=said.tpot_s or inf,
        ttft_per_token_s=said.ttft_per_token_s,
        itl_p99_s=said.itl_p99_s or inf,
    )
    return Class(name, slo, said.priority, said.late is Late.REFUSE)
