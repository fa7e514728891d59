"""`splitserve simulate`: a plan's placement under any rate and workload."""

from pathlib import Path
from typing import Annotated

import typer


def simulate(
    plan: Annotated[Path, typer.Option(help="A plan file, from `splitserve plan --out`.")],
    rate: Annotated[float | None, typer.Option(help="Requests/s. Default: the plan's goodput.")] = None,
    workload: Annotated[str | None, typer.Option(help="Trace file or name. Default: the plan's.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of each simulation.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Simulations, each with its own arrivals and lengths.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Simulate a plan's placement: attainment, TTFT and TPOT, and how busy workers and links are."""
    from splitserve.cli.planning import console, progress
    from splitserve.core.errors import ConfigError
    from splitserve.planner.inputs import resolve
    from splitserve.planner.plan import read_plan
    from splitserve.planner.planned import deployment_of
    from splitserve.planner.tables import trial_view
    from splitserve.planner.trial import tried

    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError("--rate", f"{rate:g} is no rate above 0; give requests per second")
    planned = read_plan(plan)
    asked = planned.inputs.model_copy(update={"workload": workload} if workload else {})
    question = resolve(asked)
    with progress() as report:
        trial = tried(
            deployment_of(planned, question), question, rate or planned.chosen.goodput_rps.mean, requests, seeds, report
        )
    if as_json:
        print(trial.model_dump_json(indent=1))
    else:
        console().print(trial_view(planned, trial), highlight=False)
