"""What the planning commands share: searching with a progress bar, writing files, saying that nothing fits."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.console import Console

from splitserve.planner.inputs import Inputs, resolve
from splitserve.planner.plan import Plan, write_plan, write_text
from splitserve.planner.planned import plan_of

if TYPE_CHECKING:
    from splitserve.planner.result import Infeasible

INFEASIBLE = 3

Report = Callable[[str, float], None]  # what is being done, and the share that is done


def answered(inputs: Inputs, curves: bool = False) -> "Plan | Infeasible":
    """Looks up and searches. `curves`: simulates other rates too, for a report. Raises ConfigError."""
    from splitserve.planner.curve import with_curves
    from splitserve.planner.search.search import search

    question = resolve(inputs)
    with progress() as report:
        result = search(question, report)
        if result.infeasible is not None:
            return result.infeasible
        return plan_of(inputs, question, with_curves(question, result, report) if curves else result)


def searched(inputs: Inputs, as_json: bool = False, curves: bool = False) -> Plan:
    """Leaves with exit code 3 if nothing meets what was asked. Raises ConfigError."""
    answer = answered(inputs, curves)
    return answer if isinstance(answer, Plan) else _refuse(answer, as_json)


def _refuse(found: "Infeasible", as_json: bool) -> NoReturn:
    from splitserve.planner.tables import infeasible_view

    if as_json:
        print(json.dumps({"infeasible": asdict(found)}, indent=1))
    else:
        console().print(infeasible_view(found), highlight=False)
    raise typer.Exit(INFEASIBLE)


@contextmanager
def progress() -> Iterator[Report]:
    """A bar on stderr while something runs; none where stderr is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    to = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=to, transient=True, disable=not to.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda doing, share: bar.update(task, description=doing, completed=share)


def write(
    plan: Plan,
    out: Path | None = None,
    html: Path | None = None,
    cluster: Path | None = None,
    values: Path | None = None,
) -> tuple[str, ...]:
    """What was asked for, and which files that were. Raises ConfigError naming a file that can't be written, or for
    a placement that `splitserve up` can't start."""
    from splitserve.planner.cluster import cluster_yaml
    from splitserve.planner.report import report
    from splitserve.planner.values import values_yaml

    if out is not None:
        write_plan(plan, out)
    for file, text in ((html, report), (cluster, cluster_yaml), (values, values_yaml)):
        if file is not None:
            write_text(file, text(plan))
    return tuple(str(file) for file in (out, html, cluster, values) if file is not None)


def console() -> Console:
    """For results. As wide as the terminal; where there is none, wide enough for any table."""
    return Console() if sys.stdout.isatty() else Console(width=160)
