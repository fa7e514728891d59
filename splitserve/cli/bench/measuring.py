"""What the bench commands do: measure one run, a sweep or a comparison, and hand the findings over.

Nothing is kept of a run that did not end: half of one is not the workload.
"""

import json
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import NoReturn

import typer

from splitserve.bench import open_loop
from splitserve.bench.compare import compare
from splitserve.bench.facts import Facts, here_and_now
from splitserve.bench.findings import Figures, Findings, Saved
from splitserve.bench.run import Run
from splitserve.bench.search import Options as Search
from splitserve.bench.sweep import Sweep, sweep
from splitserve.bench.targets.address import Opened, opened
from splitserve.bench.targets.address import Options as Access
from splitserve.cli.bench.asked import Asked, Named, Outputs, renamed
from splitserve.cli.bench.progress import Patience, Voice
from splitserve.cli.bench.runs import Kept

INVALID = 5
TRIES = 3  # of a run within a sweep: a machine's hiccup is not the end of it
_SECRETS = ("--api-key",)
_NOTHING: Mapping[str, str] = MappingProxyType({})


async def run_once(named: Named, access: Access, asked: Asked, rate_rps: float, seed: int, voice: Voice) -> Saved:
    """Raises Unavailable if the target is not there, or in an ExceptionGroup if it goes away."""
    asked.drawn(rate_rps, seed)  # what can't be asked is said before anybody is called
    with renamed():
        async with opened(named.target, access) as ready:
            return await measured(ready, named.name, asked, rate_rps, seed, voice)


async def search(
    targets: Sequence[Named], access: Access, asked: Asked, options: Search, kept: Kept, voice: Voice
) -> tuple[list[Saved], list[str]]:
    """The goodput of one target, or of several that take turns. All runs, those that were there before too, and
    sentences on what was not found out."""
    kept.read()
    async with AsyncExitStack() as stack:
        measures: dict[str, Callable[[float, int], Awaitable[Run]]] = {}
        for named in targets:
            kept.check(_facts(named.name, named.target.name, asked))
            with renamed():
                ready = await stack.enter_async_context(opened(named.target, access))
            measures[named.name] = _measure(ready, named.name, asked, kept, voice)
        known = {name: [saved.measured for saved in kept.of(name)] for name in measures}

        def report(sentence: str, share: float) -> None:
            voice.say(f"{share:4.0%}  {sentence}")

        with renamed():
            if len(measures) == 1:
                ((name, measure),) = measures.items()
                found: Mapping[str, tuple[Sweep, ...]] = {
                    name: (await sweep(measure, asked.slo, options, report, known[name]),)
                }
            else:
                found = (await compare(measures, [asked.slo], options, report, known)).sweeps
    reasons = [f"{name}: {each.why}" for name, sweeps in found.items() for each in sweeps if each.why]
    return [saved for name in measures for saved in kept.of(name)], reasons


def _measure(
    ready: Opened, name: str, asked: Asked, kept: Kept, voice: Voice
) -> Callable[[float, int], Awaitable[Run]]:
    async def measure(rate_rps: float, seed: int) -> Run:
        saved = await measured(ready, name, asked, rate_rps, seed, voice)
        for _ in range(TRIES - 1):
            if not saved.run.overloaded:
                break
            voice.say(f"{name} at {rate_rps:.3g}/s is run again, as the load generator was late: {saved.run.overload}")
            saved = await measured(ready, name, asked, rate_rps, seed, voice)
        kept.add(saved)
        return saved.run

    return measure


async def measured(ready: Opened, name: str, asked: Asked, rate_rps: float, seed: int, voice: Voice) -> Saved:
    """One run. Raises Unavailable, in an ExceptionGroup, if the target goes away meanwhile."""
    requests, patience = asked.drawn(rate_rps, seed), Patience(ready.name)

    def watch(progress: open_loop.Progress) -> None:
        voice.tell(progress)
        patience.judge(progress)

    voice.begin(f"{name} at {rate_rps:.3g}/s")
    facts = _facts(name, ready.name, asked, rate_rps, seed, ready.facts)
    limits = open_loop.Limits(deadline_s=float(requests.arrival_s[-1]) + asked.wait_s)
    try:
        run = await open_loop.run(requests, ready.send(requests, seed), limits, watch=watch)
    finally:
        voice.end()
    return Saved(facts, replace(run, late_s=asked.late_s))


def _facts(
    name: str, target: str, asked: Asked, rate_rps: float = 0.0, seed: int = 0, about: Mapping[str, str] = _NOTHING
) -> Facts:
    return Facts(
        name=name,
        target=target,
        workload=asked.workload.name,
        workload_notes=tuple(asked.workload.notes),
        amount=asked.amount,
        rate_rps=rate_rps,
        seed=seed,
        warm_up_s=asked.warm_up_s,
        slo=asked.slo,
        command=command(sys.argv),
        about={key: said for key, said in about.items() if key != "server"},
        **here_and_now(),
    )


def command(arguments: Sequence[str]) -> str:
    """As it was typed, without what is secret."""
    said = ["splitserve", *arguments[1:]]
    for index, argument in enumerate(said):
        option, equals, _ = argument.partition("=")
        if option in _SECRETS and equals:
            said[index] = f"{option}=..."
        elif argument in _SECRETS and index + 1 < len(said):
            said[index + 1] = "..."
    return shlex.join(said)


def finish(findings: Findings, outputs: Outputs, notes: Sequence[str] = ()) -> None:
    """Writes and prints what was asked for. Leaves with an exit code where the figures are no answer."""
    written = list(_write(findings, outputs))
    if outputs.as_json:
        from splitserve.bench.as_json import as_json

        print(json.dumps({**as_json(findings), "notes": list(notes), "written": written}))
    else:
        from splitserve.bench.tables import view
        from splitserve.cli.planning import console

        console().print(view(findings, [*notes, *(f"wrote {file}" for file in written)]), highlight=False)
    _leave(findings)


def _write(findings: Findings, outputs: Outputs) -> Iterable[str]:
    if outputs.out is not None:
        yield str(outputs.out)
    if outputs.plot is not None:
        from splitserve.bench.plots import save

        save(findings, outputs.plot)
        yield str(outputs.plot)
    if outputs.report is not None:
        from splitserve.bench.report import report
        from splitserve.planner.plan import write_text

        write_text(outputs.report, report(findings))
        yield str(outputs.report)


def _leave(findings: Findings) -> None:
    for system in findings.systems:
        if not any(figures.done for figures in system.figures):
            _stop(1, f"{system.name} served no request{_most_frequent(system.figures)}")
    bad = [figures for system in findings.systems for figures in system.figures if not figures.valid]
    if bad:
        what = "the run is" if findings.kind == "run" else f"{len(bad)} of the runs are"
        _stop(INVALID, f"{what} INVALID: {bad[0].reasons[0]}")


def _most_frequent(figures: Sequence[Figures]) -> str:
    errors = [error for one in figures for error in one.errors]
    return f": {errors[0][0]}" if errors else ""


def _stop(code: int, sentence: str) -> NoReturn:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(sentence, style="red"))
    raise typer.Exit(code)
