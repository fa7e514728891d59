"""`splitserve workload`: what a trace or a named workload looks like, in numbers and as a picture."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def workload(
    spec: Annotated[str, typer.Argument(help="A trace file, a name such as sharegpt, or prompt=512,output=128.")],
    rate: Annotated[float, typer.Option(min=1e-9, help="Requests per second, for what is drawn.")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, help="How many are drawn.")] = 10_000,
    seed: Annotated[int, typer.Option(help="The same seed draws the same.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Lengths and arrivals as a picture: .svg or .png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Say what a workload looks like: lengths, arrivals, shared prefixes.

    What is said is of requests drawn from it, as `splitserve plan` and `simulate` draw them.
    """
    from rich.console import Console

    from splitserve.view.table import table
    from splitserve.workload.named import workload as named
    from splitserve.workload.plot import save
    from splitserve.workload.statistics import summary

    asked = named(spec)
    drawn = asked.draw(requests, rate, seed)
    said = summary(drawn)
    if plot is not None:
        save(drawn, asked.name, plot)
    if as_json:
        print(json.dumps({"name": asked.name, "notes": asked.notes, **asdict(said)}))
        return
    console = Console()
    sides = (("prompt", said.prompt), ("output", said.output))
    heads = ("mean", "p10", "p50", "p90", "p99", "longest")
    rows = [(f"{name} tokens", *(f"{getattr(side, head):,.0f}" for head in heads)) for name, side in sides]
    console.print(table((asked.name,), heads, rows))
    burst = "" if said.interarrival_cv is None else f"gaps vary by {said.interarrival_cv:.2f} (1 is Poisson); "
    turns = f"sessions of {said.turns:.2f} turns in the mean; " if said.turns > 1.0 else ""
    console.print(f"{turns}{burst}an endless prefix cache would hold {said.prefix_hit:.0%} of the prompt tokens")
    for note in (*asked.notes, *([f"wrote {plot}"] if plot is not None else [])):
        console.print(f"• {note}", highlight=False)
