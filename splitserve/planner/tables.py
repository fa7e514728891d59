"""A plan on a terminal: the answer first, then the candidates, what to be careful of, and what to do next.

It makes rich's renderables and prints nothing.
"""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from splitserve.planner.compare import Comparison, Difference
from splitserve.planner.explain import Section, answer, used
from splitserve.planner.plan import Candidate, Plan, Quantiles
from splitserve.planner.result import Infeasible
from splitserve.planner.trial import Trial
from splitserve.planner.watch import Change
from splitserve.view.table import bullet, table

SHOWN = 8


def plan_view(plan: Plan, written: Sequence[str] = ()) -> Group:
    """`written` names the files that were written."""
    parts: list[RenderableType] = [Text(answer(plan), style="bold"), Text(), candidates_table(plan)]
    if plan.notes:
        parts += [Text(), *(bullet(note, "yellow") for note in plan.notes)]
    return Group(*parts, Text(), *(bullet(line, "dim") for line in _next_steps(written)))


def candidates_table(plan: Plan) -> Table:
    """The chosen one and the best of the others, one row per pool."""
    made = table(
        ("", "placement"),
        ("GPUs", "goodput /s", "95% interval", "per GPU", *_more(plan), "TTFT p90", "TPOT p90"),
        folds=("placement",),
    )
    for nth, candidate in enumerate(plan.candidates[:SHOWN]):
        made.add_row(*_row(plan, candidate, nth), style="green" if nth == 0 else "")
    return made


def _more(plan: Plan) -> tuple[str, ...]:
    """A column of the objective's own."""
    return {"goodput-per-cost": ("per $/h",), "goodput-per-watt": ("per kW",)}.get(plan.inputs.objective, ())


def _row(plan: Plan, candidate: Candidate, nth: int) -> tuple[str, ...]:
    goodput = candidate.goodput_rps
    own = candidate.goodput_per_cost if plan.inputs.objective == "goodput-per-cost" else candidate.goodput_per_kilowatt
    return (
        str(nth + 1),
        "\n+ ".join(map(str, candidate.placement.pools)),
        str(candidate.placement.gpus),
        f"{goodput.mean:.3g}",
        f"{goodput.low:.3g} to {goodput.high:.3g}",
        f"{candidate.goodput_per_gpu:.3g}",
        *(["-" if own is None else f"{own:.3g}"] if _more(plan) else []),
        milliseconds(candidate.ttft_s, "p90"),
        milliseconds(candidate.tpot_s, "p90"),
    )


def milliseconds(quantiles: Quantiles, name: str) -> str:
    return f"{quantiles[name] * 1e3:.0f} ms" if name in quantiles else "-"


def _next_steps(written: Sequence[str]) -> Iterable[str]:
    yield from (f"wrote {file}" for file in written)
    if not written:
        yield "keep it: add --out plan.yaml, --report report.html, --cluster cluster.yaml or --values values.yaml"
    else:
        yield "next, with the plan file: splitserve plan explain, plan report, plan watch, simulate --plan"


def infeasible_view(found: Infeasible) -> Group:
    """What is in the way, then what would be possible."""
    return Group(Text(found.sentence, style="bold red"), *(bullet(line, "yellow") for line in nearest(found)))


def nearest(found: Infeasible) -> Iterable[str]:
    yield f"binding: {found.binding}"
    if found.nearest_rate_rps is not None:
        rate = f"{found.nearest_rate_rps:.3g}"
        yield f"with the objectives as asked, at most {rate} requests/s: --rate {rate}"
    if found.nearest_ttft_s is not None:
        ttft = f"{found.nearest_ttft_s:.3g}"
        yield f"with the rest as asked, TTFT {ttft} s is feasible: --ttft {ttft}"
    if found.nearest_tpot_s is not None:
        tpot = f"{found.nearest_tpot_s:.3g}"
        yield f"with the rest as asked, TPOT {tpot} s is feasible: --tpot {tpot}"


def explain_view(sections: Iterable[Section]) -> Group:
    parts: list[RenderableType] = []
    for section in sections:
        if section.sentences:
            parts += [Text(section.title, style="bold"), *(bullet(line) for line in section.sentences), Text()]
    return Group(*parts)


def comparison_view(names: tuple[str, str], comparison: Comparison, apart: bool) -> Group:
    """`apart`: the two goodputs differ by more than their intervals."""
    parts: list[RenderableType] = []
    blocks = {"Asked": comparison.inputs, "Placement": comparison.placement, "Figures": comparison.figures}
    for title, differences in {**blocks, "Origin": comparison.notes}.items():
        parts += [Text(title, style="bold"), _differences(names, differences), Text()]
    verdict = "goodputs differ beyond their intervals" if apart else "goodputs differ by less than their intervals show"
    return Group(*parts, Text(verdict, style="green" if apart else "yellow"))


def _differences(names: tuple[str, str], differences: Sequence[Difference]) -> RenderableType:
    if not differences:
        return Padding(Text("the same", style="dim"), (0, 0, 0, 2))
    changes = any(difference.change is not None for difference in differences)
    made = table(("", *names), ("change",) if changes else ())
    for each in differences:
        change = [] if not changes else ["" if each.change is None else f"{each.change:+.1%}"]
        made.add_row(each.what, each.a, each.b, *change)
    return made


def trial_view(plan: Plan, trial: Trial) -> Group:
    """What a plan's placement does at one rate."""
    asked, both = plan.inputs, trial.both_met
    holds = both.mean >= asked.attainment
    answered = (
        f"{plan.chosen.placement} at {trial.rate_rps:.3g} requests/s of {trial.workload}: {both.mean:.1%} of requests "
        f"(95% interval {both.low:.1%} to {both.high:.1%}) within TTFT {asked.ttft:g} s and TPOT {asked.tpot:g} s, "
        f"{'at least' if holds else 'below'} the {asked.attainment:.0%} asked for."
    )
    times = table(("", "within"), ("p50", "p90", "p95", "p99"))
    for name, met, quantiles in (("TTFT", trial.ttft_met, trial.ttft_s), ("TPOT", trial.tpot_met, trial.tpot_s)):
        times.add_row(name, f"{met:.1%}", *(milliseconds(quantiles, share) for share in ("p50", "p90", "p95", "p99")))
    parts: list[RenderableType] = [
        Text(answered, style="bold green" if holds else "bold yellow"),
        Text(),
        times,
        Text(),
    ]
    parts += [bullet(used(use)) for use in trial.use]
    parts += [bullet(f"link {link.name}: carries KV {link.busy_share:.1%} of the time") for link in trial.links[:4]]
    return Group(*parts)


def change_view(change: Change) -> Group:
    """What a new plan would change, as a diff."""
    styles = {"+": "green", "-": "red"}
    return Group(*(Text(line, style=styles.get(line[0], "")) for line in change.lines))
