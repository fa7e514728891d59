"""The HTML report of a plan: one file with its charts as SVG, for light and dark, that loads nothing."""

from splitserve.planner.deployment import Role
from splitserve.planner.explain import PART_NAMES, answer, explain
from splitserve.planner.plan import Plan
from splitserve.planner.report import figures
from splitserve.view.page import page


def report(plan: Plan) -> str:
    """A complete HTML document. The same plan gives the same bytes."""
    ranked = sorted(plan.phases, key=lambda phase: (list(Role).index(phase.role), -phase.goodput_per_gpu))
    values = {
        "plan": plan,
        "answer": answer(plan),
        "sections": explain(plan)[1:],
        "shown": figures.shown(plan),
        "parts": PART_NAMES,
        "charts": _charts(plan),
        "able": [phase for phase in ranked if phase.goodput_rps],
        "ruled_out": [phase for phase in ranked if not phase.goodput_rps],
    }
    return page(__package__, values, {"figure": _figure, "bytes": _bytes})


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _charts(plan: Plan) -> dict[str, str]:
    asked = plan.inputs
    charts = {
        "attainment": figures.attainment_chart(plan),
        "ttft": figures.distribution_chart(plan, "TTFT", asked.ttft, lambda one: one.ttft_s),
        "tpot": figures.distribution_chart(plan, "TPOT", asked.tpot, lambda one: one.tpot_s),
        "candidates": figures.candidates_chart(plan),
        "pareto": figures.pareto_chart(plan, by_cost=False),
        "ttft_parts": figures.time_chart(plan, whole=False),
        "all_parts": figures.time_chart(plan, whole=True),
    }
    if figures.cost_is_worth_a_chart(plan):
        charts["pareto_cost"] = figures.pareto_chart(plan, by_cost=True)
    return charts


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
