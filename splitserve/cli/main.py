"""The command line: what each command takes. Each imports what it needs when it runs, so that --help is quick.

Every error that splitserve raises on purpose ends as one sentence on stderr: exit code 2 for a configuration or an
option (as typer's own), 1 for the rest.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from splitserve import __version__
from splitserve.cli.bench.commands import app as bench
from splitserve.cli.demo import demo
from splitserve.cli.gateway import gateway
from splitserve.cli.generate import generate
from splitserve.cli.operate import drain, migrate, pool, status
from splitserve.cli.plan import app as plan
from splitserve.cli.profile import profile
from splitserve.cli.simulate import simulate
from splitserve.cli.supervisor import StartFailed
from splitserve.cli.top import top
from splitserve.cli.workload import workload
from splitserve.core.config import RouterConfig, SettingsT, WorkerConfig, parse, read
from splitserve.core.errors import ConfigError, SplitserveError

app = typer.Typer(
    name="splitserve",
    help="Serve one large language model from a pool of prefill workers and a pool of decode workers.\n\n"
    "Start with [bold]splitserve up[/bold], then, in another terminal, "
    '[bold]splitserve generate "It is a truth universally acknowledged,"[/bold].',
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ReadyFd = Annotated[int | None, typer.Option(hidden=True)]
Parent = Annotated[int | None, typer.Option(hidden=True)]
SECURITY = "Security"
NODES = "A worker that spans machines"
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        rich_help_panel=SECURITY,
        help="Listen beyond this machine without TLS or keys, where the network itself keeps strangers out.",
    ),
]


def main() -> None:
    """The console script."""
    try:
        app()
    except (SplitserveError, StartFailed) as error:
        _fail(error)
    except ExceptionGroup as group:  # of tasks that ran at once: the first tells
        ours = group.subgroup(SplitserveError)
        if ours is None:
            raise
        _fail(next(_leaves(ours)))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _fail(error: BaseException) -> NoReturn:
    _say_error(str(error))
    raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


def _say_error(sentence: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(sentence, style="red"))


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


@app.command(
    epilog="Examples:  splitserve up  ·  splitserve up --engine sim --prefill 2 --decode 2  ·  "
    "splitserve up --model ~/models/Qwen3-0.6B  ·  splitserve up cluster.yaml"
)
def up(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CLUSTER.YAML]", help="Cluster description; options override it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face model directory, or `demo`.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm or sim.")] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode workers.")] = None,
    listen: Annotated[str | None, typer.Option(help="The router's gRPC address, host:port.")] = None,
    http: Annotated[str | None, typer.Option(help="Its OpenAI-compatible HTTP address. [127.0.0.1:8000]")] = None,
    metrics: Annotated[str | None, typer.Option(help="The router's Prometheus address, host:port.")] = None,
    insecure: Insecure = False,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds that requests get to end on Ctrl-C.")] = 30.0,
    run_dir: Annotated[Path | None, typer.Option(help="Keep configurations and logs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Start a router and workers on this machine; without a file, one prefill and one decode worker of the demo model.

    A worker that dies is started again. Ctrl-C lets running requests end, then stops everything; a second one stops at
    once.
    """
    from rich.console import Console

    from splitserve.cli.local import Overrides, cluster_of, with_http
    from splitserve.cli.up import ConsoleVoice, JsonVoice, run_directory
    from splitserve.cli.up import up as serve

    over = Overrides(model, engine, prefill, decode, listen, metrics, insecure or None, http)
    source = str(config or "options")
    cluster = cluster_of(with_http(read(config) if config else {}), over, source)
    with run_directory(run_dir) as directory:
        voice = JsonVoice() if as_json else ConsoleVoice(Console())
        asyncio.run(serve(cluster, source, directory, drain_timeout, voice))


@app.command(epilog="Example:  splitserve router --model ~/models/Qwen3-0.6B --listen 127.0.0.1:50051")
def router(
    config: Annotated[Path | None, typer.Option(help="Router YAML; options override it.")] = None,
    model: Annotated[str | None, typer.Option(help="Model directory, for its tokenizer; or `demo`.")] = None,
    listen: Annotated[str | None, typer.Option(help="gRPC address, host:port.")] = None,
    http: Annotated[str | None, typer.Option(help="OpenAI-compatible HTTP address; none unless said.")] = None,
    console: Annotated[
        bool | None, typer.Option(help="Serve the operators' page at /console of the HTTP address. [yes]")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Prometheus address, host:port; /livez and /readyz are there too.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(rich_help_panel=SECURITY, help="PEM file: its certificate, for gRPC and metrics.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(rich_help_panel=SECURITY, help="PEM file: --tls-cert's key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(rich_help_panel=SECURITY, help="PEM file: let in only clients that it vouches for.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(rich_help_panel=SECURITY, help="YAML file: who may call, and how much.")
    ] = None,
    insecure: Insecure = False,
    ready_fd: ReadyFd = None,
    parent: Parent = None,
) -> None:
    """Run one router process."""
    import uvloop

    from splitserve.cli.build import run_router

    tls = _files(certificate=tls_cert, key=tls_key, client_ca=tls_client_ca)
    settings = _settings(
        RouterConfig,
        config,
        model=model,
        listen=listen,
        http=http,
        console=console,
        metrics=metrics,
        tls=tls,
        api_keys=str(api_keys) if api_keys else None,
        insecure=insecure or None,
    )
    uvloop.run(run_router(settings, ready_fd, parent))


@app.command(epilog="Example:  splitserve worker --pool decode --model ~/models/Qwen3-0.6B --router 10.0.0.5:50051")
def worker(
    config: Annotated[Path | None, typer.Option(help="Worker YAML; options override it.")] = None,
    pool: Annotated[str | None, typer.Option(help="prefill or decode; it can be changed while it runs.")] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face model directory, or `demo`.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm or sim.")] = None,
    router: Annotated[list[str] | None, typer.Option(help="Router to join, host:port; repeat for several.")] = None,
    name: Annotated[str | None, typer.Option(help="Shown in tables and metrics.")] = None,
    kv_host: Annotated[
        str | None,
        typer.Option(
            envvar="SPLITSERVE_KV_HOST",
            help="This machine's address at which workers on other machines reach its KV. [127.0.0.1: none do]",
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="SPLITSERVE_NODES",
            rich_help_panel=NODES,
            help="Machines that its engine spans, with one such process on each. [1]",
        ),
    ] = None,
    node_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            envvar="SPLITSERVE_NODE_RANK",
            rich_help_panel=NODES,
            help="Which of them this is; node 0 joins the routers and serves. [0]",
        ),
    ] = None,
    leader: Annotated[
        str | None,
        typer.Option(
            envvar="SPLITSERVE_LEADER", rich_help_panel=NODES, help="Node 0's host, as it and the others reach it."
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Prometheus address, host:port; /livez and /readyz are there too.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(rich_help_panel=SECURITY, help="PEM file: the CA that vouches for the routers.")
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(rich_help_panel=SECURITY, help="PEM file: the worker's certificate, for mTLS.")
    ] = None,
    key: Annotated[Path | None, typer.Option(rich_help_panel=SECURITY, help="PEM file: --cert's private key.")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(rich_help_panel=SECURITY, help="File: its API key; default: $SPLITSERVE_API_KEY, or none."),
    ] = None,
    insecure: Insecure = False,
    ready_fd: ReadyFd = None,
    parent: Parent = None,
) -> None:
    """Run one worker process: it loads the model, warms up and joins its routers.

    Where one machine does not hold the model, run it on several with the same file: `--nodes 2 --leader 10.0.0.7`, and
    `--node-rank 0` and `1`.
    """
    import uvloop

    from splitserve.cli.build import run_worker

    kind = {"kind": engine} if engine else None
    settings = _settings(
        WorkerConfig,
        config,
        pool=pool,
        model=model,
        engine=kind,
        routers=router or None,
        name=name,
        kv_transfer={"host": kv_host} if kv_host else None,
        nodes=_said(count=nodes, rank=node_rank, leader=leader),
        metrics=metrics,
        router_tls=_files(ca=ca, certificate=cert, key=key),
        api_key_file=str(api_key_file) if api_key_file else None,
        insecure=insecure or None,
    )
    raise typer.Exit(uvloop.run(run_worker(settings, ready_fd, parent)))


def _files(**said: Path | None) -> dict[str, str] | None:
    """What options say of one section of files; None if they say nothing."""
    return {name: str(file) for name, file in said.items() if file is not None} or None


def _said(**options: object) -> dict[str, object] | None:
    """What options say of one section; None if they say nothing."""
    return {name: value for name, value in options.items() if value is not None} or None


def _settings(kind: type[SettingsT], file: Path | None, **options: object) -> SettingsT:
    """The file's settings with the options that were given over them."""
    from splitserve.cli.local import merged

    said = {key: value for key, value in options.items() if value is not None}
    return parse(kind, merged(read(file) if file else {}, said), str(file or "options"))


app.command(epilog="Example:  splitserve gateway --router 10.0.0.5:50051,10.0.0.6:50051 --model demo")(gateway)
app.command(epilog='Example:  splitserve generate --chat "Who is Emma?" --max-tokens 60 --temperature 0')(generate)
app.command(epilog="Examples:  splitserve status --watch  ·  splitserve status --json")(status)
app.command(epilog="Examples:  splitserve top --router 10.0.0.5:50051  ·  splitserve top --once --json")(top)
app.command(epilog="Example:  splitserve drain decode-0")(drain)
app.command(epilog="Example:  splitserve migrate 3f2c --to decode-1")(migrate)
app.command(epilog="Example:  splitserve pool decode-0 prefill")(pool)
app.command()(demo)
app.command(epilog="Example:  splitserve profile --model ~/models/Qwen3-8B --hardware h100 --out qwen3.json")(profile)
app.add_typer(plan, name="plan")
app.command(epilog="Example:  splitserve workload trace.jsonl --plot trace.svg")(workload)
app.command(epilog="Example:  splitserve simulate --plan plan.yaml --rate 3 --seeds 5")(simulate)
app.add_typer(bench, name="bench")
