"""`splitserve plan`: ask for a placement, and read, compare and watch the answers. Wiring only.

Exit code 3: nothing meets what was asked; what would is on stdout.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

QUESTION, MODEL, LATENCY, SEARCH, OUTPUT = "Question", "Model", "Latencies and prices", "Search", "Output"

PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, from `splitserve plan --out`.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON, for programs.", rich_help_panel=OUTPUT)]
Out = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, help="Write the plan file here (YAML).")]
Html = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, help="Write the HTML report here.")]
ClusterOut = Annotated[
    Path | None, typer.Option("--cluster", rich_help_panel=OUTPUT, help="Write cluster.yaml for `splitserve up` here.")
]
ValuesOut = Annotated[
    Path | None, typer.Option("--values", rich_help_panel=OUTPUT, help="Write the Helm chart's values here.")
]


class _PlanGroup(TyperGroup):
    """`splitserve plan question.yaml` is `splitserve plan --inputs question.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].endswith((".yaml", ".yml")):
            args = ["--inputs", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_PlanGroup, invoke_without_command=True, rich_markup_mode="rich", add_completion=False)


@app.callback(
    epilog="Examples:  splitserve plan --model opt-66b --gpus a100-80g:1x8 --workload sharegpt --ttft 0.4 --tpot 0.1"
    "  ·  splitserve plan question.yaml --out plan.yaml --report report.html  ·  splitserve plan explain plan.yaml"
)
def plan(
    ctx: typer.Context,
    inputs: Annotated[
        Path | None, typer.Option(rich_help_panel=QUESTION, help="All of it as YAML; options win.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(rich_help_panel=QUESTION, help="A known name or a Hugging Face directory.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(rich_help_panel=QUESTION, help="h100:2x8 is 2 nodes of 8; or a,b.")
    ] = None,
    link: Annotated[
        str | None, typer.Option(rich_help_panel=QUESTION, help="Between nodes: 200Gbps, 25GB/s, nic:4x400Gbps.")
    ] = None,
    ttft: Annotated[str | None, typer.Option(rich_help_panel=QUESTION, help="Seconds, or 400ms. Default: 0.4.")] = None,
    tpot: Annotated[str | None, typer.Option(rich_help_panel=QUESTION, help="Seconds, or 100ms. Default: 0.1.")] = None,
    attainment: Annotated[
        str | None, typer.Option(rich_help_panel=QUESTION, help="Share of requests to meet both. Default: 0.9.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(rich_help_panel=QUESTION, help="Requests/s that must be served.")
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(rich_help_panel=QUESTION, help="Trace file, name, or prompt=512,output=128. Default: sharegpt."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=QUESTION,
            help="goodput-per-gpu, goodput-per-cost, goodput-per-watt, fewest-gpus. Default: the first.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(rich_help_panel=MODEL, help="Default: the model's.")] = None,
    quantization: Annotated[
        str | None, typer.Option(rich_help_panel=MODEL, help="Of the weights: fp8, int4 ...")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(rich_help_panel=MODEL, help="Of the KV cache: fp8 ...")] = None,
    max_model_len: Annotated[int | None, typer.Option(rich_help_panel=MODEL, help="Prompt and output, tokens.")] = None,
    expert_parallel: Annotated[int | None, typer.Option(rich_help_panel=MODEL, help="Not supported yet.")] = None,
    data_parallel: Annotated[int | None, typer.Option(rich_help_panel=MODEL, help="Not supported yet.")] = None,
    source: Annotated[
        str | None, typer.Option(rich_help_panel=LATENCY, help="Where latencies come from. Default: the most trusted.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(rich_help_panel=LATENCY, help="What `splitserve profile` wrote.")
    ] = None,
    price: Annotated[
        list[str] | None, typer.Option(rich_help_panel=LATENCY, help="KIND=PER_HOUR for one GPU; repeat it.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(rich_help_panel=SEARCH, help="quick, normal or thorough. Default: normal.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(rich_help_panel=SEARCH, help="Simulations per interval.")] = None,
    seed: Annotated[int | None, typer.Option(rich_help_panel=SEARCH, help="Same seed, same plan. Default: 0.")] = None,
    out: Out = None,
    report: Html = None,
    cluster: ClusterOut = None,
    values: ValuesOut = None,
    as_json: AsJson = False,
) -> None:
    """Which parallelism, how many prefill and decode workers, placed where, serve most requests within TTFT and TPOT.

    Or whether prefill and decode should not be separated at all. Every candidate is simulated with the router's own
    code. Only a model and GPUs must be said.
    """
    if ctx.invoked_subcommand:
        return
    from splitserve.cli.planning import console, searched, write
    from splitserve.planner.inputs import Inputs, read_inputs

    said = {key: value for key, value in ctx.params.items() if key in Inputs.model_fields}
    made = searched(
        read_inputs(inputs, {**said, "prices": _prices(price or [])}), as_json, curves=bool(out or report or as_json)
    )
    written = write(made, out, report, cluster, values)
    if as_json:
        print(made.model_dump_json(indent=1))
        return
    from splitserve.planner.tables import plan_view

    console().print(plan_view(made, written), highlight=False)


@app.command(epilog="Example:  splitserve plan explain plan.yaml")
def explain(plan_file: PlanFile, as_json: AsJson = False) -> None:
    """Why this placement: what each phase could do by itself, what binds, why the others lost, what it rests on."""
    from dataclasses import asdict

    from splitserve.cli.planning import console
    from splitserve.planner.explain import explain as sections_of
    from splitserve.planner.plan import read_plan
    from splitserve.planner.tables import explain_view

    sections = sections_of(read_plan(plan_file))
    if as_json:
        print(json.dumps([asdict(section) for section in sections], indent=1))
    else:
        console().print(explain_view(sections), highlight=False)


@app.command(epilog="Example:  splitserve plan compare before.yaml after.yaml")
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A plan file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """What differs between two plans: what was asked, the placement, the figures."""
    from dataclasses import asdict

    from splitserve.cli.planning import console
    from splitserve.planner import compare as comparing
    from splitserve.planner.plan import read_plan
    from splitserve.planner.tables import comparison_view

    one, other = read_plan(a), read_plan(b)
    differences, apart = comparing.compare(one, other), comparing.significant(one, other)
    if as_json:
        print(json.dumps({**asdict(differences), "beyond_intervals": apart}, indent=1))
    else:
        console().print(comparison_view((a.name, b.name), differences, apart), highlight=False)


@app.command(epilog="Example:  splitserve plan report plan.yaml --report report.html --values values.yaml")
def report(
    plan_file: PlanFile,
    html: Annotated[Path, typer.Option("--report", help="Where to write it.")] = Path("report.html"),
    cluster: ClusterOut = None,
    values: ValuesOut = None,
) -> None:
    """Write the HTML report of a plan: one file, no network; cluster.yaml and Helm values too, if asked for."""
    from splitserve.cli.planning import write
    from splitserve.planner.plan import read_plan

    for file in write(read_plan(plan_file), None, html, cluster, values):
        print(f"wrote {file}")


@app.command(epilog="Example:  splitserve plan watch plan.yaml --metrics http://127.0.0.1:9400/metrics --every 10")
def watch(
    plan_file: PlanFile,
    metrics: Annotated[str, typer.Option(help="A router's Prometheus address.")] = "http://127.0.0.1:9400/metrics",
    every: Annotated[str, typer.Option(help="Between two readings: seconds, or 500ms.")] = "10",
    span: Annotated[str, typer.Option("--window", help="How far back traffic is looked at, seconds.")] = "300",
    once: Annotated[
        bool,
        typer.Option("--once", help="Two readings, one verdict; exit code 4 if it drifted, 3 if nothing serves it."),
    ] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare live traffic with what was planned for; where it has drifted, plan again and print what would change."""
    from splitserve.cli.watching import Watching
    from splitserve.cli.watching import watch as watched
    from splitserve.planner.plan import read_plan

    watching = Watching(metrics, _seconds("--every", every), _seconds("--window", span), out, as_json)
    raise typer.Exit(watched(read_plan(plan_file), watching, once))


def _prices(said: list[str]) -> dict[str, str]:
    """KIND=PRICE pieces. Raises ConfigError naming the piece."""
    from splitserve.core.errors import ConfigError

    pairs = [piece.partition("=") for piece in said]
    for kind, equals, price in pairs:
        if not (kind and equals and price):
            raise ConfigError("--price", f"{kind + equals + price!r} is not KIND=PER_HOUR, such as h100=2.5")
    return {kind: price for kind, _, price in pairs}


def _seconds(option: str, said: str) -> float:
    from splitserve.core.errors import ConfigError
    from splitserve.planner.inputs import seconds

    try:
        return seconds(said)
    except ValueError as error:
        raise ConfigError(option, str(error)) from error
