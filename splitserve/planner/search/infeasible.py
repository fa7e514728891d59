"""Says why no placement will do: which objective binds, and the nearest rate and objectives that are feasible, each
with the others as asked. Found by the same search with less effort, which asks for the fastest placement alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import sqrt

from splitserve.core.slo import Slo
from splitserve.planner.deployment import Role
from splitserve.planner.question import Effort, Question
from splitserve.planner.result import Infeasible, Judged
from splitserve.planner.search.candidates import Aim, Option, Unfit, options
from splitserve.planner.search.hunt import Hunt, Progress
from splitserve.planner.search.queueing import Bound

_LIGHT_REQUESTS = 300
_NEVER_S = 1e6  # an objective that nothing misses

_NAMES = {"ttft": "time to first token", "tpot": "time per output token"}


def why(
    question: Question,
    bounds: Mapping[Option, Bound],
    unfit: Sequence[Unfit],
    judged: Sequence[Judged],
    progress: Progress,
) -> tuple[Infeasible, int]:
    """And how many requests were simulated for it. `judged` are the placements that came nearest."""
    if not bounds:
        return Infeasible("memory", _no_memory(question, unfit), None, None, None), 0
    near = _Near(question, progress)
    served = max((one.goodput_rps.mean for one in judged), default=0.0)
    rate = max(served, near.rate()) if question.rate_rps else 0.0
    nearest = (rate, near.ttft(), near.tpot())
    binding = _binding(question, bounds, judged, nearest)
    sentence = _sentence(question, binding, bounds, nearest)
    return Infeasible(binding, sentence, rate or None, nearest[1], nearest[2]), near.simulated


class _Near:
    """Asks the same question with one thing changed."""

    def __init__(self, question: Question, progress: Progress) -> None:
        effort = question.effort
        light = Effort(min(effort.requests, _LIGHT_REQUESTS), 1, 1, max(effort.rate_step, 0.05))
        self._question = replace(question, effort=light)
        self._progress = progress
        self._fit, _ = options(question)
        self.simulated = 0

    def rate(self) -> float:
        """The highest rate with the objectives as asked; 0 if there is none."""
        return self._fastest(replace(self._question, rate_rps=None))

    def ttft(self) -> float | None:
        return self._least(self._question.slo.ttft_s, lambda ttft_s: replace(self._question.slo, ttft_s=ttft_s))

    def tpot(self) -> float | None:
        return self._least(self._question.slo.tpot_s, lambda tpot_s: replace(self._question.slo, tpot_s=tpot_s))

    def _least(self, asked_s: float, slo_of: Callable[[float], Slo]) -> float | None:
        """The tightest objective that is feasible, to within the search's step; None if even no objective isn't."""
        if not self._feasible(slo_of(_NEVER_S)):
            return None
        low, high = asked_s, asked_s * 2
        while not self._feasible(slo_of(high)):
            low, high = high, high * 2
            if high > _NEVER_S:
                return None
        while high > low * (1 + self._question.effort.rate_step):
            middle = sqrt(low * high)
            low, high = (low, middle) if self._feasible(slo_of(middle)) else (middle, high)
        return high

    def _feasible(self, slo: Slo) -> bool:
        return self._fastest(replace(self._question, slo=slo)) > 0.0

    def _fastest(self, question: Question) -> float:
        self._progress("nearest feasible", 0.0)
        hunt = Hunt(Aim(question, fastest=True), self._fit, lambda stage, share: None)
        judged = hunt.finalists()
        self.simulated += hunt.simulated
        return max((one.value for one in judged), default=0.0)


def _binding(
    question: Question,
    bounds: Mapping[Option, Bound],
    judged: Sequence[Judged],
    near: tuple[float, float | None, float | None],
) -> str:
    rate, ttft_s, tpot_s = near
    if rate:
        return "rate"
    if _all_miss(bounds, Role.PREFILL) or _all_miss(bounds, Role.DECODE):
        return "ttft" if _all_miss(bounds, Role.PREFILL) else "tpot"
    if ttft_s is None or tpot_s is None:
        return judged[0].bottleneck if judged and ttft_s == tpot_s else "tpot" if ttft_s is None else "ttft"
    return "ttft" if ttft_s / question.slo.ttft_s <= tpot_s / question.slo.tpot_s else "tpot"


def _all_miss(bounds: Mapping[Option, Bound], role: Role) -> bool:
    return not any(bound.rate_rps for option, bound in bounds.items() if option.role is role)


def _sentence(
    question: Question, binding: str, bounds: Mapping[Option, Bound], near: tuple[float, float | None, float | None]
) -> str:
    rate, ttft_s, tpot_s = near
    ways = [f"a rate of {rate:.3g} requests/s"] if rate else []
    ways += [f"a time to first token of {ttft_s:.3g} s"] if ttft_s else []
    ways += [f"a time per output token of {tpot_s:.3g} s"] if tpot_s else []
    nearest = f"; with the rest as asked, {' or '.join(ways)} would be feasible" if ways else ""
    return f"{_complaint(question, binding, bounds)}{nearest}"


def _complaint(question: Question, binding: str, bounds: Mapping[Option, Bound]) -> str:
    slo, where = question.slo, f"{question.model.name} on {question.machines}"
    if binding == "rate":
        return f"no placement of {where} serves {question.rate_rps:g} requests/s within the objectives"
    asked = slo.ttft_s if binding == "ttft" else slo.tpot_s
    role = Role.PREFILL if binding == "ttft" else Role.DECODE
    missing = [bound for bound in bounds.values() if bound.binding == binding]
    fastest = min(missing, key=lambda bound: bound.idle_s).reason if missing and _all_miss(bounds, role) else ""
    why = f": even on the fastest worker {fastest}" if fastest else ""
    rate = f"at {question.rate_rps:g} requests/s" if question.rate_rps else "at any rate"
    objective = f"a {_NAMES[binding]} of {asked:g} s for {slo.attainment:.0%} of requests"
    return f"no placement of {where} meets {objective} {rate}{why}"


def _no_memory(question: Question, unfit: Sequence[Unfit]) -> str:
    """The reason of the worker with the most GPUs, which had the most room."""
    where = f"{question.model.name} fits no worker on {question.machines}"
    if not unfit:
        return f"{where}: there is no GPU"
    largest = max(unfit, key=lambda one: one.parallelism.gpus)
    return f"{where}: with {largest.parallelism}, {largest.reason}"
