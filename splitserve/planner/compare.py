"""What differs between two plans: in what was asked, in the placement, in the figures."""

from collections.abc import Iterable
from dataclasses import dataclass

from splitserve.planner.plan import Plan, PoolFigures


@dataclass(frozen=True, slots=True)
class Difference:
    """`change` is the relative one, b against a; None where there is no such thing."""

    what: str
    a: str
    b: str
    change: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    inputs: tuple[Difference, ...]
    placement: tuple[Difference, ...]
    figures: tuple[Difference, ...]
    notes: tuple[Difference, ...]  # of where latencies come from, and of the release


def compare(a: Plan, b: Plan) -> Comparison:
    """Inputs, placement and notes only where they differ, figures always."""
    return Comparison(
        inputs=_changed(_inputs(a), _inputs(b)),
        placement=_changed(_placement(a), _placement(b)),
        figures=tuple(_figures(a, b)),
        notes=_changed(_origin(a), _origin(b)),
    )


def significant(a: Plan, b: Plan) -> bool:
    """Whether the goodputs' confidence intervals are apart."""
    one, other = a.chosen.goodput_rps, b.chosen.goodput_rps
    return one.high < other.low or other.high < one.low


def _changed(a: dict[str, str], b: dict[str, str]) -> tuple[Difference, ...]:
    keys = dict.fromkeys((*a, *b))
    return tuple(Difference(key, a.get(key, "-"), b.get(key, "-")) for key in keys if a.get(key) != b.get(key))


def _inputs(plan: Plan) -> dict[str, str]:
    return {
        key: "-" if value in (None, {}) else str(value) for key, value in plan.inputs.model_dump(mode="json").items()
    }


def _placement(plan: Plan) -> dict[str, str]:
    placement = plan.chosen.placement
    return {"affinity": placement.affinity, **dict(_pools(placement.pools))}


def _pools(pools: Iterable[PoolFigures]) -> Iterable[tuple[str, str]]:
    seen: dict[str, int] = {}
    for pool in pools:
        nth = seen[pool.role] = seen.get(pool.role, 0) + 1
        yield str(pool.role) + (f" {nth}" if nth > 1 else ""), str(pool)


def _origin(plan: Plan) -> dict[str, str]:
    sources = {f"latencies, {source.phase}": f"{source.trust}: {source.source}" for source in plan.chosen.latencies}
    return {"splitserve": plan.splitserve, **sources}


def _figures(a: Plan, b: Plan) -> Iterable[Difference]:
    one, other = dict(_numbers(a)), dict(_numbers(b))
    for what, (value, unit) in one.items():
        its = other[what][0]
        yield Difference(
            what, _told(value, unit), _told(its, unit), its / value - 1 if value and its is not None else None
        )


def _numbers(plan: Plan) -> Iterable[tuple[str, tuple[float | None, str]]]:
    chosen = plan.chosen
    yield "goodput", (chosen.goodput_rps.mean, "/s")
    yield "goodput, low", (chosen.goodput_rps.low, "/s")
    yield "goodput, high", (chosen.goodput_rps.high, "/s")
    yield "GPUs", (float(chosen.placement.gpus), "")
    yield "goodput per GPU", (chosen.goodput_per_gpu, "/s")
    yield "goodput per cost", (chosen.goodput_per_cost, "/s")
    yield "goodput per kW", (chosen.goodput_per_kilowatt, "/s")
    for name, quantiles in (("TTFT", chosen.ttft_s), ("TPOT", chosen.tpot_s)):
        for share in ("p50", "p90", "p99"):
            yield f"{name} {share}", (quantiles.get(share), " s")


def _told(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.4g}{unit}"
