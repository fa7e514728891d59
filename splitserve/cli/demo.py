"""`splitserve demo`: prompts of several lengths at once through a prefill and a decode worker, then through one
colocated worker, and whether both gave the same tokens. The exit code says so too.

The two clusters run one after the other, so that each has the machine to itself.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitserve.core.request import Chunk, SamplingParams

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from splitserve.cli.streams import Streams
    from splitserve.client import AsyncClient
    from splitserve.core.config import ClusterConfig

PROMPTS = Path(__file__).parents[1] / "demo" / "prompts.json"
_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """One prompt's answer. `last` has usage and timings."""

    name: str
    token_ids: tuple[int, ...]
    text: str
    last: Chunk


def demo(
    engine: Annotated[str, typer.Option(help="vllm or sim.")] = "vllm",
    model: Annotated[str, typer.Option(help="Hugging Face model directory, or `demo`.")] = "demo",
    max_tokens: Annotated[int, typer.Option(min=1, help="Output tokens per prompt, at most.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="The results as JSON, for programs.")] = False,
) -> None:
    """Serve prompts of several lengths from a prefill and a decode worker; compare with one colocated worker."""
    from rich.console import Console

    console = Console(stderr=as_json)
    split, whole = asyncio.run(_both(console, engine, model, max_tokens))
    differing = [difference for difference in map(first_difference, split, whole) if difference is not None]
    if as_json:
        print(json.dumps({"requests": [asdict(served) for served in split], "differing": differing}))
    console.print(f"token-exact: {len(split) - len(differing)}/{len(split)}", style="red" if differing else "green")
    for difference in differing:
        console.print(difference, style="red", highlight=False)
    raise typer.Exit(1 if differing else 0)


def first_difference(split: Served, whole: Served) -> str | None:
    """Where the two answers to one prompt part, as a sentence; None if they are the same."""
    if split.token_ids == whole.token_ids:
        return None
    pairs = zip(split.token_ids, whole.token_ids, strict=False)
    at = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if at is None:
        return f"{split.name}: {len(split.token_ids)} tokens, colocated {len(whole.token_ids)}"
    return f"{split.name}: output token {at} is {split.token_ids[at]}, colocated {whole.token_ids[at]}"


async def _both(console: "Console", engine: str, model: str, max_tokens: int) -> tuple[list[Served], list[Served]]:
    prompts = json.loads(PROMPTS.read_text())
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, repetition_penalty=1.2)  # a tiny model loops
    console.rule("1 prefill worker + 1 decode worker")
    split = await _serve(console, _cluster(engine, model, prefill=1), prompts, sampling)
    console.print(results_table(split))
    console.rule("1 colocated worker")
    whole = await _serve(console, _cluster(engine, model, prefill=0), prompts, sampling)
    return split, whole


def _cluster(engine: str, model: str, prefill: int) -> "ClusterConfig":
    """On free ports, beside whatever runs. A decode worker alone prefills for itself: a colocated engine."""
    from splitserve.cli.local import Overrides, cluster_of

    said = {"router": {"listen": "127.0.0.1:0", "metrics": None}, "worker_metrics_port": None, "restart": False}
    return cluster_of(said, Overrides(model=model, engine=engine, prefill=prefill, decode=1), "options")


async def _serve(
    console: "Console", cluster: "ClusterConfig", prompts: Sequence[dict[str, str]], sampling: SamplingParams
) -> list[Served]:
    """All prompts at once through one cluster, streamed to the terminal."""
    from splitserve.cli.streams import Streams
    from splitserve.cli.up import ConsoleVoice, run_directory, told
    from splitserve.client import AsyncClient

    streams = Streams(console, [prompt["name"] for prompt in prompts])
    with run_directory(None) as directory:
        async with (
            told(cluster, "options", directory, _DRAIN_S, ConsoleVoice(console)) as up,
            AsyncClient(up.address) as client,
        ):
            return await _ask_all(client, prompts, sampling, streams)


async def _ask_all(
    client: "AsyncClient", prompts: Sequence[dict[str, str]], sampling: SamplingParams, streams: "Streams"
) -> list[Served]:
    with streams.shown():
        async with asyncio.TaskGroup() as tasks:
            served = [tasks.create_task(_ask(client, prompt, sampling, streams)) for prompt in prompts]
    return [task.result() for task in served]


async def _ask(client: "AsyncClient", prompt: dict[str, str], sampling: SamplingParams, streams: "Streams") -> Served:
    name = prompt["name"]
    token_ids: list[int] = []
    text: list[str] = []
    async for chunk in client.generate(prompt["text"], sampling, request_id=f"demo {name}"):
        token_ids.extend(chunk.token_ids)
        text.append(chunk.text)
        streams.add(name, chunk.text, chunk.finish_reason is not None)
    return Served(name, tuple(token_ids), "".join(text), chunk)


def results_table(results: Sequence[Served]) -> "Table":
    """One row per request; the share is of the KV that moved while the prompt was still being read."""
    from splitserve.view.table import table

    workers = ("request", "prefill worker", "decode worker")
    figures = ("prompt tokens", "output tokens", "TTFT ms", "TPOT ms", "KV bytes", "before prefill ended")
    return table(workers, figures, ((served.name, *_row(served.last)) for served in results))


def _row(last: Chunk) -> tuple[str, ...]:
    usage, timings = last.usage, last.timings
    assert usage is not None
    assert timings is not None
    early = f"{timings.kv_bytes_before_prefill_ended / timings.kv_bytes:.0%}" if timings.kv_bytes else "-"
    return (
        timings.prefill_worker or "-",
        timings.decode_worker,
        f"{usage.prompt_tokens:,}",
        f"{usage.output_tokens:,}",
        f"{timings.ttft_s * 1e3:.0f}",
        f"{timings.tpot_s * 1e3:.1f}",
        f"{timings.kv_bytes:,}",
        early,
    )
