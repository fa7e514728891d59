"""`splitserve bench`: measure what a cluster serves within its objectives. Wiring only."""

from pathlib import Path
from typing import Annotated, Any

import typer

from splitserve.cli.talk import ApiKey, CaFile, CertificateFile, KeyFile

LOAD, OBJECTIVES, TARGET, SEARCH, OUTPUT = "Load", "Objectives", "Target", "Search", "Output"
DEFAULT_TARGET, DEFAULT_WORKLOAD = "grpc://127.0.0.1:50051", "sharegpt"
RUN_REQUESTS, SWEEP_REQUESTS = 100, 200
_TARGETS = "grpc://host:port (a router), http://host:port (an OpenAI-compatible server), worker://host:port (listens "
_TARGETS += "there for one worker); pd=ADDRESS shows it as pd."

TargetText = Annotated[str, typer.Option("--target", rich_help_panel=TARGET, help=_TARGETS)]
Vocabulary = Annotated[
    int,
    typer.Option(min=2, rich_help_panel=TARGET, help="Prompts are random token ids below this; any model has 1000."),
]
Model = Annotated[
    str, typer.Option(rich_help_panel=TARGET, help="Of an OpenAI-compatible server. Default: the first it lists.")
]
FormText = Annotated[
    str, typer.Option(rich_help_panel=TARGET, help="What such a server is sent: ids, text (less exact) or chat.")
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", rich_help_panel=TARGET, help="worker:// may listen beyond this machine without TLS."),
]
WorkloadText = Annotated[
    str,
    typer.Option(
        "--workload",
        rich_help_panel=LOAD,
        help="Trace file, name, or prompt=512,output=128; `splitserve workload` shows one.",
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=LOAD, help="At each rate, after the warm-up. Default: 100; of a sweep, 200."),
]
Duration = Annotated[
    str | None, typer.Option(rich_help_panel=LOAD, help="Instead of --requests: as many as fall due in so long.")
]
Seed = Annotated[int, typer.Option(min=0, rich_help_panel=LOAD, help="The same seed sends the same requests.")]
WarmUp = Annotated[
    str, typer.Option(rich_help_panel=LOAD, help="What falls due in it is sent but not judged; 0: none.")
]
Wait = Annotated[
    str,
    typer.Option(rich_help_panel=LOAD, help="What has not ended so long after the last request was due is cut off."),
]
Late = Annotated[
    str,
    typer.Option(
        rich_help_panel=LOAD,
        help="By how much the load generator may send, or read, late; over 1% of the time more makes a run invalid.",
    ),
]
Ttft = Annotated[str | None, typer.Option(rich_help_panel=OBJECTIVES, help="Seconds, or 400ms. Default: 0.4.")]
Tpot = Annotated[str | None, typer.Option(rich_help_panel=OBJECTIVES, help="Seconds, or 100ms. Default: 0.1.")]
ItlP99 = Annotated[
    str | None,
    typer.Option("--itl-p99", rich_help_panel=OBJECTIVES, help="Of each request's gaps between tokens. Default: none."),
]
TtftPerToken = Annotated[
    str | None, typer.Option(rich_help_panel=OBJECTIVES, help="On top of --ttft, for each token of the prompt.")
]
Attainment = Annotated[
    str | None, typer.Option(rich_help_panel=OBJECTIVES, help="Share of requests to meet all of them. Default: 0.9.")
]
Rates = Annotated[
    str, typer.Option(rich_help_panel=SEARCH, help="Run these, such as 1,2,3, instead of looking for the goodput.")
]
Start = Annotated[
    str, typer.Option(rich_help_panel=SEARCH, help="Requests/s to begin with; then twice or half as many.")
]
Step = Annotated[
    str, typer.Option(rich_help_panel=SEARCH, help="How close the rates on both sides of the goodput get, as a share.")
]
Seeds = Annotated[
    int, typer.Option(min=1, rich_help_panel=SEARCH, help="At these two rates, runs of so many seeds from --seed on.")
]
RunFile = Annotated[
    Path | None,
    typer.Option("--out", rich_help_panel=OUTPUT, help="Save the run: .jsonl or .parquet, see docs/bench.md."),
]
RunDirectory = Annotated[
    Path | None,
    typer.Option("--out", rich_help_panel=OUTPUT, help="Save each run into this directory; go on from what is there."),
]
Plot = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, help="All figures as a picture: .svg or .png.")]
Html = Annotated[
    Path | None, typer.Option("--report", rich_help_panel=OUTPUT, help="Tables and figures as one HTML file.")
]
AsJson = Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="One JSON object instead of tables.")]

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    help="Measure a running cluster: attainment at a rate, and goodput, the highest rate at which enough requests meet "
    "their objectives.\n\nRequests are sent when they are due, whether earlier ones are answered or not, and TTFT "
    "counts from then. Start a cluster with [bold]splitserve up[/bold], then, in another terminal, "
    "[bold]splitserve bench run[/bold].\n\nExit codes: 0 measured; 1 the target is not there, went away, or served "
    "nothing; 2 an option is wrong; 5 the load generator itself was overloaded, so the figures are invalid; "
    "130 Ctrl-C, which cancels what runs and keeps what a sweep has finished.",
    epilog="Examples:  splitserve bench run --rate 2 --ttft 400ms --tpot 50ms --report run.html  ·  "
    "splitserve bench sweep --workload trace.jsonl --out runs/",
)


@app.command(
    epilog="Examples:  splitserve bench run  ·  splitserve bench run --rate 4 --workload prompt=512,output=128 "
    "--ttft 400ms --tpot 50ms --out run.jsonl --report run.html  ·  "
    "splitserve bench run --target http://127.0.0.1:8000 --duration 60 --json"
)
def run(
    ctx: typer.Context,
    target: TargetText = DEFAULT_TARGET,
    vocabulary: Vocabulary = 1000,
    model: Model = "",
    form: FormText = "ids",
    insecure: Insecure = False,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    workload: WorkloadText = DEFAULT_WORKLOAD,
    rate: Annotated[str, typer.Option(rich_help_panel=LOAD, help="Requests/s.")] = "1",
    requests: Requests = None,
    duration: Duration = None,
    seed: Seed = 0,
    warm_up: WarmUp = "2",
    wait: Wait = "60",
    late: Late = "2ms",
    ttft: Ttft = None,
    tpot: Tpot = None,
    itl_p99: ItlP99 = None,
    ttft_per_token: TtftPerToken = None,
    attainment: Attainment = None,
    out: RunFile = None,
    plot: Plot = None,
    report_file: Html = None,
    as_json: AsJson = False,
) -> None:
    """Send a workload at one rate, and say what share of it was served within the objectives."""
    import uvloop

    from splitserve.bench.findings import judged
    from splitserve.cli.bench.asked import access_of, asked_of, named_targets, outputs_of, rate_of
    from splitserve.cli.bench.measuring import finish, run_once
    from splitserve.cli.bench.progress import Voice
    from splitserve.cli.bench.runs import keep

    said, voice = ctx.params, Voice()
    outputs, asked = outputs_of(said, one=True), asked_of(said, RUN_REQUESTS)
    (named,) = named_targets([target])
    saved = uvloop.run(run_once(named, access_of(said, voice.say), asked, rate_of("--rate", rate), seed, voice))
    if out is not None:
        keep(saved, out)
    finish(judged([saved], asked.slo), outputs)


@app.command(
    epilog="Examples:  splitserve bench sweep --ttft 400ms --tpot 50ms --out runs/ --report sweep.html  ·  "
    "splitserve bench sweep --rates 1,2,4,8 --requests 300"
)
def sweep(
    ctx: typer.Context,
    target: TargetText = DEFAULT_TARGET,
    vocabulary: Vocabulary = 1000,
    model: Model = "",
    form: FormText = "ids",
    insecure: Insecure = False,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    workload: WorkloadText = DEFAULT_WORKLOAD,
    rates: Rates = "",
    start: Start = "1",
    step: Step = "0.1",
    seeds: Seeds = 2,
    requests: Requests = None,
    duration: Duration = None,
    seed: Seed = 0,
    warm_up: WarmUp = "2",
    wait: Wait = "60",
    late: Late = "2ms",
    ttft: Ttft = None,
    tpot: Tpot = None,
    itl_p99: ItlP99 = None,
    ttft_per_token: TtftPerToken = None,
    attainment: Attainment = None,
    out: RunDirectory = None,
    plot: Plot = None,
    report_file: Html = None,
    as_json: AsJson = False,
) -> None:
    """Find the goodput: run one rate after the other, closer and closer to where the objectives are just met."""
    _search(ctx.params, [target])


@app.command(
    epilog="Example:  splitserve bench compare pd=grpc://10.0.0.5:50051 colocated=http://10.0.0.6:8000 --ttft 400ms "
    "--tpot 50ms --out runs/ --report comparison.html"
)
def compare(
    ctx: typer.Context,
    targets: Annotated[
        list[str], typer.Argument(metavar="A B", help=f"Two or more, as --target elsewhere: {_TARGETS}")
    ],
    vocabulary: Vocabulary = 1000,
    model: Model = "",
    form: FormText = "ids",
    insecure: Insecure = False,
    ca: CaFile = None,
    cert: CertificateFile = None,
    key: KeyFile = None,
    api_key: ApiKey = None,
    workload: WorkloadText = DEFAULT_WORKLOAD,
    rates: Rates = "",
    start: Start = "1",
    step: Step = "0.1",
    seeds: Seeds = 2,
    requests: Requests = None,
    duration: Duration = None,
    seed: Seed = 0,
    warm_up: WarmUp = "2",
    wait: Wait = "60",
    late: Late = "2ms",
    ttft: Ttft = None,
    tpot: Tpot = None,
    itl_p99: ItlP99 = None,
    ttft_per_token: TtftPerToken = None,
    attainment: Attainment = None,
    out: RunDirectory = None,
    plot: Plot = None,
    report_file: Html = None,
    as_json: AsJson = False,
) -> None:
    """Compare the goodput of two systems that get the same requests and take turns, run by run."""
    if len(targets) < 2:
        from splitserve.core.errors import ConfigError

        raise ConfigError("targets", f"a comparison needs two, and got {targets[0]}")
    _search(ctx.params, targets)


def _search(said: dict[str, Any], targets: list[str]) -> None:
    import uvloop

    from splitserve.bench.findings import judged
    from splitserve.cli.bench.asked import access_of, asked_of, named_targets, outputs_of, search_of
    from splitserve.cli.bench.measuring import finish, search
    from splitserve.cli.bench.progress import Voice
    from splitserve.cli.bench.runs import Kept

    outputs, asked, voice = outputs_of(said, one=False), asked_of(said, SWEEP_REQUESTS), Voice()
    options, kept = search_of(said, asked.warm_up_s), Kept(outputs.out)
    searching = search(named_targets(targets), access_of(said, voice.say), asked, options, kept, voice)
    try:
        saved, notes = uvloop.run(searching)
    except KeyboardInterrupt:
        if outputs.out is not None:
            voice.say(f"stopped; {outputs.out} has the finished runs, and the same command goes on from there")
        raise
    finish(judged(saved, asked.slo), outputs, notes)


@app.command(
    epilog="Examples:  splitserve bench report run.jsonl --tpot 30ms  ·  splitserve bench report runs/ --report a.html"
)
def report(
    ctx: typer.Context,
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="Saved runs, or directories of them.")],
    ttft: Ttft = None,
    tpot: Tpot = None,
    itl_p99: ItlP99 = None,
    ttft_per_token: TtftPerToken = None,
    attainment: Attainment = None,
    plot: Plot = None,
    report_file: Html = None,
    as_json: AsJson = False,
) -> None:
    """Judge saved runs again, by their own objectives or others: tables, figures, report. Nothing is sent."""
    from splitserve.bench.findings import judged
    from splitserve.cli.bench.asked import SLO, outputs_of, slo_of
    from splitserve.cli.bench.measuring import finish
    from splitserve.cli.bench.runs import load_all

    outputs, saved = outputs_of(ctx.params, one=True), load_all(files)
    finish(judged(saved, slo_of(ctx.params, saved[0].facts.slo or SLO)), outputs)
