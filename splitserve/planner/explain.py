"""Why this placement: a plan's figures as sentences, for the terminal and the report alike.

It looks at the plan alone; nothing is simulated again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from splitserve.planner.deployment import Role
from splitserve.planner.inputs import Inputs
from splitserve.planner.plan import Candidate, Parts, PhaseFigures, Plan, RoleUse
from splitserve.planner.question import Objective

PART_NAMES = {
    "wait_s": "waiting in the router",
    "prefill_queue_s": "queueing for prefill",
    "prefill_s": "prefill",
    "transfer_s": "KV transfer that prefill did not cover",
    "first_token_s": "the first decode step",
    "decode_s": "decode",
}


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    sentences: tuple[str, ...]


def explain(plan: Plan) -> tuple[Section, ...]:
    """From the answer to what it rests on."""
    return (
        Section("Answer", (answer(plan),)),
        Section("Each phase by itself", tuple(_phase_sentences(plan))),
        Section("What binds", tuple(_binding(plan.chosen, plan.inputs))),
        Section("Why the others lost", tuple(_losers(plan))),
        Section("What the latencies rest on", tuple(f"{source}." for source in plan.chosen.latencies)),
        Section("Keep in mind", tuple(f"{_capital(note)}." for note in plan.notes)),
    )


def answer(plan: Plan) -> str:
    """The whole result in three sentences at most."""
    chosen, asked = plan.chosen, plan.inputs
    goodput = chosen.goodput_rps
    verb = "serves" if len(chosen.placement.pools) == 1 and chosen.placement.pools[0].workers == 1 else "serve"
    wanted = f", {asked.rate:g} being asked for," if asked.rate else ""
    return (
        f"{chosen.placement} ({_gpus(chosen)}) {verb} {goodput.mean:.3g} requests/s (95% interval {goodput.low:.3g} to "
        f"{goodput.high:.3g}){wanted} with {asked.attainment:.0%} of requests within TTFT {asked.ttft:g} s and TPOT "
        f"{asked.tpot:g} s: {chosen.goodput_per_gpu:.3g} requests/s per GPU. {_against_the_other_kind(plan)}"
        f"{_adaptive(plan)}"
    )


def _adaptive(plan: Plan) -> str:
    """What the router gains on the same workers."""
    found, static = plan.adaptive_rps, plan.chosen.goodput_rps.mean
    if found is None:
        return ""
    advice = " Leave engine.profile out, as cluster.yaml does: it then goes by pools." if plan.better_by_pools else ""
    return (
        f" A router that schedules by these objectives (slo_classes, and engine.profile on each worker) makes that "
        f"{found.mean:.3g} requests/s ({found.low:.3g} to {found.high:.3g}), {found.mean / static:.2f} times as much."
        f"{advice}"
    )


def _gpus(candidate: Candidate) -> str:
    return f"{candidate.placement.gpus} GPU{'s' * (candidate.placement.gpus != 1)}"


def _against_the_other_kind(plan: Plan) -> str:
    """Separated against colocated, whichever won."""
    colocated = plan.chosen.placement.colocated
    others = [other for other in plan.runners_up if other.placement.colocated is not colocated]
    kind = "separating prefill and decode" if colocated else "colocated serving"
    if not others:
        return f"No placement {'that separates prefill and decode' if colocated else 'without separation'} was found."
    best = max(others, key=lambda other: other.goodput_per_gpu)
    if not best.goodput_per_gpu:
        return f"{_capital(kind)} ({best.placement}) meets the objectives at no rate."
    ratio = plan.chosen.goodput_per_gpu / best.goodput_per_gpu
    return f"That is {ratio:.2f} times the best of {kind} ({best.placement}: {best.goodput_per_gpu:.3g} per GPU)."


def used(use: RoleUse) -> str:
    """How busy the workers of one role are."""
    return (
        f"{_capital(use.role)}: {use.workers} worker{'s' * (use.workers != 1)}, {use.busy_mean:.0%} busy, "
        f"KV at most {use.kv_peak:.0%} full, {use.preemptions:,} preemptions"
    )


def why_lost(chosen: Candidate, other: Candidate, asked: Inputs) -> str:
    """One sentence or two on a placement that was not chosen."""
    if not other.goodput_rps.mean:
        return (
            f"no rate meets both objectives: at the lowest one tried {other.ttft_met:.0%} of requests are within the "
            f"TTFT and {other.tpot_met:.0%} within the TPOT objective"
        )
    return f"{_comparison(chosen, other, asked)}. {_capital(_what_breaks(other, asked))}"


def _comparison(chosen: Candidate, other: Candidate, asked: Inputs) -> str:
    if asked.objective is Objective.FEWEST:
        return _fewer(chosen, other, asked)
    best, its, what = _value(chosen, asked.objective), _value(other, asked.objective), _VALUES[asked.objective]
    if _overlap(chosen, other, asked.objective):
        return f"too close to call at this effort: {its:.3g} {what} against {best:.3g}, and their intervals meet"
    return f"{its:.3g} {what} are {1 - its / best:.0%} less than {best:.3g}"


def _fewer(chosen: Candidate, other: Candidate, asked: Inputs) -> str:
    if asked.rate and other.goodput_rps.mean < asked.rate:
        return f"{other.goodput_rps.mean:.3g} requests/s are below the {asked.rate:g} asked for"
    if other.placement.gpus != chosen.placement.gpus:
        return f"it takes {_gpus(other)} where {chosen.placement.gpus} do"
    return (
        f"it takes as many GPUs and serves {other.goodput_rps.mean:.3g} requests/s, not {chosen.goodput_rps.mean:.3g}"
    )


_VALUES = {
    Objective.PER_GPU: "requests/s per GPU",
    Objective.PER_COST: "requests/s for one currency unit per hour",
    Objective.PER_WATT: "requests/s per kW",
    Objective.FEWEST: "requests/s",
}


def _value(candidate: Candidate, objective: Objective) -> float:
    return {
        Objective.PER_GPU: candidate.goodput_per_gpu,
        Objective.PER_COST: candidate.goodput_per_cost or 0.0,
        Objective.PER_WATT: candidate.goodput_per_kilowatt or 0.0,
        Objective.FEWEST: candidate.goodput_rps.mean,
    }[objective]


def _overlap(chosen: Candidate, other: Candidate, objective: Objective) -> bool:
    """Whether the objective's value at the lower end of one interval is below that at the upper end of the other."""
    low = _value(chosen, objective) * chosen.goodput_rps.low / chosen.goodput_rps.mean
    high = _value(other, objective) * other.goodput_rps.high / other.goodput_rps.mean
    return low <= high


def _what_breaks(candidate: Candidate, asked: Inputs) -> str:
    rate = f"above {candidate.goodput_rps.mean:.3g} requests/s"
    if candidate.bottleneck == "ttft":
        name, part = _longest_before_first_token(candidate.slowest_parts)
        return (
            f"{rate} TTFT breaks first (p90 {_of(candidate.ttft_s, 'p90')} of {asked.ttft:g} s): the slowest tenth of "
            f"requests spend {part:.0%} of their TTFT in {name}"
        )
    if candidate.bottleneck == "tpot":
        return f"{rate} TPOT breaks first (p90 {_of(candidate.tpot_s, 'p90')} of {asked.tpot:g} s)" + (
            ": prefill chunks share steps with decodes" if candidate.placement.colocated else ""
        )
    return f"{rate} {candidate.bottleneck} breaks first"


def _of(quantiles: dict[str, float], name: str) -> str:
    return f"{quantiles[name]:.3g}" if name in quantiles else "?"


def _longest_before_first_token(parts: Parts) -> tuple[str, float]:
    """Its name, and its share of TTFT."""
    spent = {key: value for key, value in parts.model_dump().items() if key != "decode_s"}
    key = max(spent, key=lambda each: spent[each])
    return PART_NAMES[key], spent[key] / (parts.ttft_s or 1.0)


def _phase_sentences(plan: Plan) -> Iterable[str]:
    for role in Role:
        phases = [phase for phase in plan.phases if phase.role is role]
        if phases:
            yield _best_phases(role, sorted(phases, key=lambda phase: -phase.goodput_per_gpu))


def _best_phases(role: Role, ranked: list[PhaseFigures]) -> str:
    able = [phase for phase in ranked if phase.goodput_rps]
    if not able:
        return f"{_capital(role)}: no parallelism meets its objective{_because(ranked[0].reason)}."
    said = ", ".join(
        f"{phase.parallelism} on {phase.gpu} {phase.goodput_per_gpu:.3g} (worker: {phase.goodput_rps:.3g})"
        for phase in able[:4]
    )
    unable = [f"{phase.parallelism} on {phase.gpu} ({phase.reason})" for phase in ranked if not phase.goodput_rps]
    return f"{_capital(role)}, requests/s per GPU: {said}." + (f" Ruled out: {_counted(unable)}." if unable else "")


def _counted(unable: list[str]) -> str:
    """One with its reason stands for all: the report has the rest."""
    return unable[0] + (f" and {len(unable) - 1} others" if len(unable) > 1 else "")


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


def _binding(chosen: Candidate, asked: Inputs) -> Iterable[str]:
    yield f"{_capital(_what_breaks(chosen, asked))}."
    yield (
        f"At the goodput {chosen.ttft_met:.1%} of requests are within the TTFT objective, {chosen.tpot_met:.1%} within "
        f"the TPOT objective, {chosen.both_met:.1%} within both."
    )
    for use in chosen.use:
        yield f"{used(use)}."
    if chosen.links:
        yield f"The busiest link, {chosen.links[0].name}, carries KV {chosen.links[0].busy_share:.1%} of the time."


def _losers(plan: Plan) -> Iterable[str]:
    for other in plan.runners_up:
        yield f"{other.placement}: {other.lost}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
