"""The report's charts, each from a plan alone."""

import math
from collections.abc import Callable, Iterable, Sequence

from splitserve.planner.explain import PART_NAMES
from splitserve.planner.plan import Candidate, Parts, Plan, Quantiles
from splitserve.planner.report.svg import (
    Frame,
    Point,
    Scale,
    area,
    axes,
    box,
    dot,
    drawing,
    line,
    path,
    percent,
    text,
)

BARS_SHOWN = 12
PANEL = 560


def shown(plan: Plan) -> list[tuple[str, Candidate]]:
    """Those whose curves are drawn, with their class: the chosen one, and its rival, which is the best of the other
    kind, or the second where there is none."""
    other = next((one for one in plan.runners_up if kind(one) != kind(plan.chosen)), None)
    rival = [(kind(other), other)] if other else [("second", one) for one in plan.runners_up[:1]]
    return [(kind(plan.chosen), plan.chosen), *rival]


def attainment_chart(plan: Plan) -> str:
    """Share of requests within both objectives, against the arrival rate per GPU."""
    curves = shown(plan)
    most = max(point.rate_rps / one.placement.gpus for _, one in curves for point in one.attainment)
    low = min(point.low for _, one in curves for point in one.attainment)
    frame = Frame.of((0.0, most * 1.05), (min(max(math.floor(low * 10) / 10, 0.0), 0.8), 1.0))
    marks = [*axes(frame, "requests/s per GPU", "attainment", y_label=percent), *_target(plan, frame)]
    for style, one in reversed(curves):
        marks += _attainment(one, frame, style)
    return drawing(frame.width, frame.height, marks, "Attainment against rate per GPU")


def _target(plan: Plan, frame: Frame) -> Iterable[str]:
    target, goodput, gpus = plan.inputs.attainment, plan.chosen.goodput_rps, plan.chosen.placement.gpus
    y, left, right = frame.y.at(target), frame.x.at(goodput.low / gpus), frame.x.at(goodput.high / gpus)
    yield box((left, frame.y.end), right - left, frame.y.start - frame.y.end, "interval", "goodput's 95% interval")
    yield line((frame.x.start, y), (frame.x.end, y), "objective", f"target {target:.0%}")
    yield text((frame.x.start + 4, y + 14), f"target {target:.0%}", "tick")


def _attainment(one: Candidate, frame: Frame, style: str) -> list[str]:
    gpus = one.placement.gpus
    points = [(point, point.rate_rps / gpus) for point in one.attainment]
    upper = [frame.point((rate, point.high)) for point, rate in points]
    lower = [frame.point((rate, point.low)) for point, rate in points]
    dots = [
        dot(frame.point((rate, point.mean)), style, f"{point.rate_rps:.3g} requests/s: {point.mean:.1%}", 3.5)
        for point, rate in points
    ]
    return [
        area([*upper, *reversed(lower)], f"band {style}"),
        path([frame.point((rate, point.mean)) for point, rate in points], f"curve {style}"),
        *dots,
    ]


def distribution_chart(plan: Plan, name: str, objective_s: float, of: Callable[[Candidate], Quantiles]) -> str:
    """Which share of requests is how fast at the goodput."""
    curves = [(style, _shares(of(one))) for style, one in shown(plan)]
    slowest = max((value for _, points in curves for value, share in points if share <= 0.95), default=objective_s)
    frame = Frame.of((0.0, max(slowest, objective_s) * 1.25 * 1e3), (0.0, 1.0), width=PANEL, height=260)
    x = frame.x.at(objective_s * 1e3)
    marks = [*axes(frame, f"{name}, ms", "share of requests", y_label=percent)]
    marks += [line((x, frame.y.start), (x, frame.y.end), "objective", f"objective {objective_s * 1e3:g} ms")]
    marks += [text((x + 5, frame.y.start - 8), f"objective {objective_s * 1e3:g} ms", "tick")]
    for style, points in reversed(curves):
        drawn = [(value * 1e3, share) for value, share in points if value * 1e3 <= frame.x.high]
        marks.append(path([frame.point(point) for point in drawn], f"curve {style}"))
        marks += [
            dot(frame.point(point), style, f"p{point[1] * 100:g}: {point[0]:.3g} ms", 3.5)
            for point in drawn
            if point[1] in _MARKED
        ]
    return drawing(frame.width, frame.height, marks, f"Distribution of {name} at the goodput")


_MARKED = (0.5, 0.9, 0.99)


def _shares(quantiles: Quantiles) -> list[Point]:
    return [(value, float(name[1:]) / 100) for name, value in quantiles.items() if math.isfinite(value)]


def candidates_chart(plan: Plan) -> str:
    """Goodput per GPU of every candidate, with its interval."""
    ones = plan.candidates[:BARS_SHOWN]
    most = max(one.goodput_rps.high / one.placement.gpus for one in ones) or 1.0
    x, row = Scale(0.0, most * 1.1, 8, 2 * PANEL - 80), 40
    marks = [mark for nth, one in enumerate(ones) for mark in _bar(one, nth, x, nth * row)]
    return drawing(2 * PANEL, row * len(ones) + 6, marks, "Goodput per GPU of every candidate")


def _bar(one: Candidate, nth: int, x: Scale, top: float) -> Iterable[str]:
    gpus, goodput = one.placement.gpus, one.goodput_rps
    low, high, end = x.at(goodput.low / gpus), x.at(goodput.high / gpus), x.at(one.goodput_per_gpu)
    tip = f"{goodput.mean:.3g} requests/s ({goodput.low:.3g} to {goodput.high:.3g}) on {gpus} GPUs"
    name = f"{one.placement}, {gpus} GPUs" + (" (chosen)" if nth == 0 else "")
    yield text((8, top + 13), name, "name strong" if nth == 0 else "name")
    yield box((8, top + 18), end - 8, 14, kind(one), tip)
    if high > low:
        yield line((low, top + 25), (high, top + 25), "whisker", tip)
    yield text((max(high, end) + 6, top + 29), f"{one.goodput_per_gpu:.3g}", "tick value")


def kind(one: Candidate) -> str:
    return "colocated" if one.placement.colocated else "separated"


def pareto_chart(plan: Plan, by_cost: bool) -> str:
    """What more GPUs, or more money, buy."""

    def price(one: Candidate) -> float:
        return one.placement.cost_per_hour if by_cost else float(one.placement.gpus)

    ones = [one for one in plan.candidates if one.goodput_rps.mean]
    highest = max(one.goodput_rps.mean for one in ones)
    frame = Frame.of((0.0, max(map(price, ones)) * 1.12), (0.0, highest * 1.15))
    front = pareto_front([(price(one), one.goodput_rps.mean) for one in ones])
    marks = [*axes(frame, "cost per hour" if by_cost else "GPUs", "goodput, requests/s")]
    marks.append(path([frame.point(point) for point in _stairs(front)], "curve front"))
    for one in reversed(ones):
        at = (price(one), one.goodput_rps.mean)
        style = f"{kind(one)}{'' if at in front else ' beaten'}"
        marks.append(dot(frame.point(at), style, f"{one.placement}: {at[1]:.3g} requests/s", 5.5))
    return drawing(frame.width, frame.height, marks, "Goodput against what it takes")


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Those that no other point beats with as little or less: cheapest first."""
    front: list[Point] = []
    for price, goodput in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or goodput > front[-1][1]:
            front.append((price, goodput))
    return front


def _stairs(front: Sequence[Point]) -> Iterable[Point]:
    for (_, before), point in zip([(0.0, front[0][1]), *front], front, strict=False):
        yield (point[0], before)
        yield point


def cost_is_worth_a_chart(plan: Plan) -> bool:
    """Not where every GPU costs the same: then the one chart is the other."""
    prices = {round(one.placement.cost_per_hour / one.placement.gpus, 6) for one in plan.candidates}
    return len(prices) > 1 and 0.0 not in prices


def time_chart(plan: Plan, whole: bool) -> str:
    """Stacked parts of the mean request and of those with the longest TTFT: until the first token, or `whole`."""
    rows = [
        (f"{title}, {which}", parts)
        for title, one in (("chosen", plan.chosen), ("rival", shown(plan)[-1][1]))[: len(shown(plan))]
        for which, parts in (("mean", one.parts), ("slowest tenth", one.slowest_parts))
    ]
    spans = [parts.ttft_s + parts.decode_s * whole for _, parts in rows]
    objective = 0.0 if whole else plan.inputs.ttft
    frame = Frame.of((0.0, max(*spans, objective) * 1.08), (0.0, 1.0), PANEL, 48 + 44 * len(rows), 14)
    marks = [line((frame.x.start, frame.y.start), (frame.x.end, frame.y.start), "axis")]
    marks += [mark for tick in frame.x.ticks() for mark in _second_tick(frame, tick)]
    for nth, (title, parts) in enumerate(rows):
        marks += _stack(title, parts, frame.x, 44 * nth, whole)
    if objective:
        x = frame.x.at(objective)
        marks.append(line((x, 0), (x, frame.y.start), "objective", f"TTFT objective {objective:g} s"))
    return drawing(frame.width, frame.height - 18, marks, "Where time goes")


def _second_tick(frame: Frame, tick: float) -> Iterable[str]:
    x, label = frame.x.at(tick), f"{tick:.3g} s"
    yield text((x, frame.y.start + 17), label, "tick middle")
    yield line((x, frame.y.start), (x, frame.y.start + 4), "axis")


def _stack(title: str, parts: Parts, x: Scale, top: float, whole: bool) -> Iterable[str]:
    """Decode comes last; without it, it is what happens until the first token."""
    yield text((x.start, top + 12), title, "name")
    begun = 0.0
    for nth, (key, name) in enumerate(list(PART_NAMES.items())[: None if whole else -1]):
        spent = getattr(parts, key)
        left, right = x.at(begun), x.at(begun + spent)
        gap = 1.5 if right - left > 4 else 0.0
        yield box((left, top + 17), right - left - gap, 18, f"part{nth}", f"{name}: {spent:.3g} s")
        begun += spent
